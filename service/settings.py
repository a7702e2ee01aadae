"""Settings: everything an operator can change, from ``PALISADE_*`` environment variables."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.quota import Window, parse_windows


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
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="'auto' is bfloat16 where it is faster.")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the engine; 0 means all cores.")
    top_k: int = Field(0, ge=0, le=1024, description="Experts run per image; 0 takes the checkpoint's default.")

    max_batch_size: int = Field(64, ge=1, le=4096, description="Most images in one engine batch.")
    max_queue_delay_ms: float = Field(2.0, ge=0, le=1000, description="How long a batch may wait for more images.")
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
    tier_anonymous_limits: Annotated[tuple[Window, ...], NoDecode] = Field(
        parse_windows("60/minute;2000/day"), description="Windows of images of a caller without a key."
    )
    tier_anonymous_decimals: int = Field(2, ge=0, le=6, description="Decimals to which probabilities are rounded.")
    tier_anonymous_top_n: int = Field(0, ge=0, description="Scores shown, the largest; 0 shows all.")
    tier_anonymous_label_only: bool = Field(False, description="Show no probabilities at all.")

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log line written.")

    @field_validator("tier_anonymous_limits", mode="before")
    @classmethod
    def _parse_limits(cls, value: object) -> object:
        return parse_windows(value) if isinstance(value, str) else value
