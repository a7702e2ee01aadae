"""Settings: everything an operator can change, from ``PALISADE_*`` environment variables."""

from __future__ import annotations

import sys
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.identity import ForwardedHeader, parse_networks
from service.policy import Policy
from service.quota import Window, parse_windows

TIERS = ("anonymous", "standard", "trusted")


Windows = Annotated[
    tuple[Window, ...], NoDecode, BeforeValidator(lambda value: parse_windows(value) if isinstance(value, str) else value)
]
Networks = Annotated[
    tuple[IPv4Network | IPv6Network, ...],
    NoDecode,
    BeforeValidator(lambda value: parse_networks(value) if isinstance(value, str) else value),
]


class Settings(BaseSettings):
    """The service's settings; every unit is in its name. docs/operations.md lists them all.

    Lengths are in bytes, times in the unit named, counts in images.
    """

    model_config = SettingsConfigDict(env_prefix="PALISADE_", frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address of the HTTP port.")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 picks a free one.")
    metrics_host: str = Field("127.0.0.1", description="Address of the metrics port; the metrics are for operators only.")
    metrics_port: int = Field(8002, ge=0, le=65535, description="Port of GET /metrics; 0 picks a free one.")
    checkpoint: str = Field("compact", description="Checkpoint: 'compact' (embedded) or a path.")
    device: str = Field("auto", description="'auto' (a GPU if there is one), 'cpu', 'cuda' or 'cuda:N'.")
    precision: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto", description="'auto' is bfloat16 where the processor has it; int8 needs `palisade-serve tune`."
    )
    tuning_dir: str = Field("", description="Folder of `palisade-serve tune`; empty means ~/.cache/palisade.")
    frontends: int = Field(
        1, ge=1, le=256, description="HTTP worker processes; from 2 on, the engine has a process of its own."
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the engine; 0 means all cores.")
    top_k: int = Field(0, ge=0, le=1024, description="Experts run per image; 0 takes the checkpoint's default.")

    max_batch_size: int = Field(64, ge=1, le=4096, description="Most images in one engine batch.")
    max_queue_delay_ms: float = Field(2.0, ge=0, le=1000, description="How long, under load, a batch may wait for more images.")
    max_queue_images: int = Field(512, ge=1, description="Images that may wait; beyond it requests get 503 at once.")
    request_deadline_ms: float = Field(10_000, gt=0, description="A request older than this gets 504.")
    body_deadline_ms: float = Field(10_000, gt=0, description="A body that takes longer to arrive gets 408.")
    drain_deadline_ms: float = Field(20_000, gt=0, description="How long SIGTERM waits for accepted requests.")

    max_body_bytes: int = Field(16 * 2**20, ge=1, description="Largest request body.")
    max_in_flight_bytes: int = Field(256 * 2**20, ge=1, description="Bodies held at one time; beyond it requests get 503.")
    max_images_per_request: int = Field(128, ge=1, description="Most images in one request.")
    max_image_bytes: int = Field(8 * 2**20, ge=1, description="Largest encoded image.")
    max_image_pixels: int = Field(16_000_000, ge=1, description="Largest image, width times height.")
    decode_threads: int = Field(2, ge=1, le=256, description="Threads that decode images.")
    answer_cache_images: int = Field(10_000, ge=0, description="Answers kept, so that repeats get the same one; 0 keeps none.")

    limits: Literal["on", "off"] = Field("on", description="'off' turns quotas off, for benchmarks.")
    limiter_max_callers: int = Field(100_000, ge=1, description="Callers whose quotas are remembered.")
    tier_anonymous_limits: Windows = Field(
        parse_windows("60/minute;2000/day"), description="Windows of images of callers without a key; empty for no limit."
    )
    tier_anonymous_decimals: int = Field(2, ge=0, le=6, description="Decimals to which their probabilities are rounded.")
    tier_anonymous_top_n: int = Field(0, ge=0, description="Scores they are shown, the largest; 0 shows all.")
    tier_anonymous_label_only: bool = Field(False, description="Show them no probabilities at all.")
    tier_standard_limits: Windows = Field(
        parse_windows("600/minute;50000/day"), description="Windows of images of a key of tier standard; empty for no limit."
    )
    tier_standard_decimals: int = Field(2, ge=0, le=6, description="Decimals to which their probabilities are rounded.")
    tier_standard_top_n: int = Field(0, ge=0, description="Scores they are shown, the largest; 0 shows all.")
    tier_standard_label_only: bool = Field(False, description="Show them no probabilities at all.")
    tier_trusted_limits: Windows = Field(
        parse_windows(""), description="Windows of images of a key of tier trusted; empty for no limit."
    )
    tier_trusted_decimals: int = Field(4, ge=0, le=6, description="Decimals to which their probabilities are rounded.")
    tier_trusted_top_n: int = Field(0, ge=0, description="Scores they are shown, the largest; 0 shows all.")
    tier_trusted_label_only: bool = Field(False, description="Show them no probabilities at all.")

    keys_file: str = Field("", description="File of API keys (`palisade-serve keys`); empty means that there are none.")
    anonymous: Literal["on", "off"] = Field("on", description="Whether callers without a key are served.")
    trusted_proxies: Networks = Field(
        (), description="Addresses or networks of proxies whose word on a caller's address counts."
    )
    forwarded_header: ForwardedHeader = Field("x-forwarded-for", description="The header in which those proxies say it.")

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log line written.")

    @model_validator(mode="after")
    def _somebody_is_served(self) -> Settings:
        if self.anonymous == "off" and not self.keys_file:
            raise ValueError("anonymous is off and keys_file is empty: nobody could ask; set PALISADE_KEYS_FILE")
        return self

    def policies(self) -> dict[str, Policy]:
        """Return each tier's policy; without quotas if ``limits`` is off."""
        return {
            tier: Policy(
                tier,
                decimals=getattr(self, f"tier_{tier}_decimals"),
                top_n=getattr(self, f"tier_{tier}_top_n"),
                label_only=getattr(self, f"tier_{tier}_label_only"),
                windows=getattr(self, f"tier_{tier}_limits") if self.limits == "on" else (),
            )
            for tier in TIERS
        }


def read_settings() -> Settings | None:
    """Return the settings from the environment, or ``None`` after saying on standard error which of them are wrong."""
    try:
        return Settings()
    except ValidationError as error:
        for problem in error.errors():
            where = f"PALISADE_{problem['loc'][0]}".upper() + f"={problem['input']!r}: " if problem["loc"] else ""
            print(f"palisade-serve: {where}{problem['msg']}", file=sys.stderr)
        return None
