"""Settings: everything an operator can change, from ``PALISADE_*`` environment variables."""

from __future__ import annotations

import sys
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.identity import ForwardedHeader, parse_networks
from service.policy import Policy
from service.quota import Window, parse_windows

TIERS = ("anonymous", "standard", "trusted")
SUSPECT = "suspect"
"""The policy, with a quota of its own beside their tier's, of callers of any tier that are under suspicion."""


Windows = Annotated[
    tuple[Window, ...], NoDecode, BeforeValidator(lambda value: parse_windows(value) if isinstance(value, str) else value)
]
Networks = Annotated[
    tuple[IPv4Network | IPv6Network, ...],
    NoDecode,
    BeforeValidator(lambda value: parse_networks(value) if isinstance(value, str) else value),
]
OptionalPort = Annotated[
    Annotated[int, Field(ge=0, le=65535)] | None, BeforeValidator(lambda value: None if value == "" else value)
]
WatchMode = Literal["act", "count", "off"]
SECRETS = ("limiter_store", "limiter_secret")
"""Settings that hold passwords: never shown."""
TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


class Settings(BaseSettings):
    """The service's settings; every unit is in its name. docs/operations.md lists them all.

    Lengths are in bytes, times in the unit named, counts in images.
    """

    model_config = SettingsConfigDict(env_prefix="PALISADE_", frozen=True, extra="forbid", hide_input_in_errors=True)

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
    drain_delay_ms: float = Field(
        0, ge=0, description="How long SIGTERM leaves proxies to notice: /readyz is 503, and what still comes is answered."
    )
    drain_deadline_ms: float = Field(20_000, gt=0, description="How long it then waits for accepted requests.")

    max_body_bytes: int = Field(16 * 2**20, ge=1, description="Largest request body.")
    max_in_flight_bytes: int = Field(256 * 2**20, ge=1, description="Bodies held at one time; beyond it requests get 503.")
    max_images_per_request: int = Field(128, ge=1, description="Most images in one request.")
    max_image_bytes: int = Field(8 * 2**20, ge=1, description="Largest encoded image.")
    max_image_pixels: int = Field(16_000_000, ge=1, description="Largest image, width times height.")
    decode_threads: int = Field(2, ge=1, le=256, description="Threads that decode images.")
    answer_cache_images: int = Field(10_000, ge=0, description="Answers kept, so that repeats get the same one; 0 keeps none.")

    limits: Literal["on", "off"] = Field("on", description="'off' turns quotas and the watch off, for benchmarks.")
    limiter_max_callers: int = Field(100_000, ge=1, description="Callers whose quotas are remembered in memory, per tier.")
    limiter_store: SecretStr = Field(
        SecretStr("memory://"), description="Where quotas are counted: memory://, or redis://host:port/db (rediss:// with TLS)."
    )
    limiter_fail: Literal["open", "closed"] = Field(
        "open", description="While the store is down, hours, days and lifetimes are not counted, or their callers get 503."
    )
    limiter_timeout_ms: float = Field(250, gt=0, le=10_000, description="Longest wait for the store.")
    limiter_secret: SecretStr = Field(
        SecretStr(""), description="Keys what the store knows of callers; the same in all replicas."
    )
    tier_anonymous_limits: Windows = Field(
        parse_windows("60/minute;500/day"), description="Windows of images of callers without a key; empty for no limit."
    )
    tier_anonymous_decimals: int = Field(2, ge=0, le=6, description="Decimals to which their probabilities are rounded.")
    tier_anonymous_top_n: int = Field(0, ge=0, description="Scores they are shown, the largest; 0 shows all.")
    tier_anonymous_label_only: bool = Field(False, description="Show them no probabilities at all.")
    tier_anonymous_reverse_sigmoid: float = Field(0, ge=0, le=1, description="How much their probabilities are bent.")
    tier_anonymous_certificate: bool = Field(False, description="Show them the certificates of a vote, and so its votes.")
    tier_standard_limits: Windows = Field(
        parse_windows("600/minute;5000/day"), description="Windows of images of a key of tier standard; empty for no limit."
    )
    tier_standard_decimals: int = Field(2, ge=0, le=6, description="Decimals to which their probabilities are rounded.")
    tier_standard_top_n: int = Field(0, ge=0, description="Scores they are shown, the largest; 0 shows all.")
    tier_standard_label_only: bool = Field(False, description="Show them no probabilities at all.")
    tier_standard_reverse_sigmoid: float = Field(0, ge=0, le=1, description="How much their probabilities are bent.")
    tier_standard_certificate: bool = Field(False, description="Show them the certificates of a vote, and so its votes.")
    tier_trusted_limits: Windows = Field(
        parse_windows(""), description="Windows of images of a key of tier trusted; empty for no limit."
    )
    tier_trusted_decimals: int = Field(4, ge=0, le=6, description="Decimals to which their probabilities are rounded.")
    tier_trusted_top_n: int = Field(0, ge=0, description="Scores they are shown, the largest; 0 shows all.")
    tier_trusted_label_only: bool = Field(False, description="Show them no probabilities at all.")
    tier_trusted_reverse_sigmoid: float = Field(0, ge=0, le=1, description="How much their probabilities are bent.")
    tier_trusted_certificate: bool = Field(True, description="Show them the certificates of a vote, and so its votes.")

    tier_anonymous_watch: WatchMode = Field("act", description="'act' restricts suspects, 'count' only lists them, or 'off'.")
    tier_standard_watch: WatchMode = Field("act", description="'act' restricts suspects, 'count' only lists them, or 'off'.")
    tier_trusted_watch: WatchMode = Field("count", description="As above; 'off' does not look at them.")
    watch_near_duplicates: Literal["on", "off"] = Field("on", description="Refuse long runs of nearly equal images.")
    watch_off_distribution: Literal["auto", "on", "off"] = Field(
        "auto", description="Suspect callers whose answers are mostly unsure; 'auto' is on with the embedded checkpoint."
    )
    watch_distances: Literal["on", "off"] = Field("on", description="Suspect callers whose images seem made from each other.")
    watch_max_callers: int = Field(2048, ge=1, description="Callers remembered, of up to 72 kB each.")
    watch_recent_images: int = Field(128, ge=2, le=4096, description="Images remembered of a caller, as codes and thumbnails.")
    watch_sequence_images: float = Field(100, gt=0, description="Nearly equal images in a row that are answered.")
    watch_memory_minutes: float = Field(60, gt=0, description="Time in which a run of nearly equal images is half forgotten.")
    watch_unsure_below: float = Field(0.6, gt=0, lt=1, description="An answer whose best probability is below is unsure.")
    watch_honest_share: float = Field(0.62, gt=0, lt=1, description="Largest share of unsure answers of an honest caller.")
    watch_thief_share: float = Field(0.85, gt=0, lt=1, description="Smallest share of unsure answers of a thief.")
    watch_horizon_images: int = Field(10_000, ge=1, description="Images within which an honest caller is rarely suspected.")
    watch_false_alarms: float = Field(1e-6, gt=0, lt=1, description="How rarely, as a probability.")
    watch_least_w: float = Field(0.9, gt=0, lt=1, description="Least Shapiro-Wilk W of an honest caller's distances.")
    suspect_minutes: float = Field(60, gt=0, description="How long a caller stays suspect after the last suspicious image.")
    suspect_limits: Windows = Field(
        parse_windows("10/minute;200/day"), description="Windows of images of suspects, charged beside their tier's."
    )
    suspect_decimals: int = Field(1, ge=0, le=6, description="Decimals to which their probabilities are rounded.")
    suspect_top_n: int = Field(1, ge=0, description="Scores they are shown, the largest; 0 shows all.")
    suspect_label_only: bool = Field(True, description="Show them no probabilities at all.")
    suspect_reverse_sigmoid: float = Field(0, ge=0, le=1, description="How much their probabilities are bent.")

    keys_file: str = Field("", description="File of API keys (`palisade-serve keys`); empty means that there are none.")
    anonymous: Literal["on", "off"] = Field("on", description="Whether callers without a key are served.")
    trusted_proxies: Networks = Field(
        (), description="Addresses or networks of proxies whose word on a caller's address counts."
    )
    forwarded_header: ForwardedHeader = Field("x-forwarded-for", description="The header in which those proxies say it.")

    admin_socket: str = Field(
        "", description="Path of the admin interface's Unix socket, for this user alone; empty means that there is none."
    )
    admin_port: OptionalPort = Field(
        None, description="The admin interface's port on 127.0.0.1; 0 picks a free one, empty means that there is none."
    )
    admin_key_file: str = Field("", description="File that holds the key of that port.")

    tracing: Literal["on", "off"] = Field("off", description="Spans of every request's steps, sent by OpenTelemetry.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log line written.")

    @field_validator("limiter_store")
    @classmethod
    def _store_is_known(cls, store: SecretStr) -> SecretStr:
        if store.get_secret_value() != "memory://" and not _is_redis(store.get_secret_value()):
            raise ValueError(
                "write memory://, redis://[user:password@]host[:port][/db] or rediss://..., with ?ssl_ca_certs=FILE, "
                "ssl_certfile and ssl_keyfile if needed; in a user or password write @ : / ? # % as %40 %3A %2F %3F %23 %25"
            )
        return store

    @model_validator(mode="after")
    def _somebody_is_served(self) -> Settings:
        if self.anonymous == "off" and not self.keys_file:
            raise ValueError("anonymous is off and keys_file is empty: nobody could ask; set PALISADE_KEYS_FILE")
        return self

    @model_validator(mode="after")
    def _suspects_are_told_no_more(self) -> Settings:
        if self.watch_honest_share >= self.watch_thief_share:
            raise ValueError(
                f"watch_honest_share is {self.watch_honest_share:g} and watch_thief_share {self.watch_thief_share:g}: "
                "a thief's share of unsure answers has to be larger"
            )
        policies = self.policies()
        for tier, mode in self.watch_modes().items():
            if mode == "act" and not policies[SUSPECT].is_as_strict_as(policies[tier]):
                raise ValueError(
                    f"suspects would be told more than callers of tier {tier}: lower PALISADE_SUSPECT_DECIMALS and "
                    "PALISADE_SUSPECT_TOP_N, or set PALISADE_SUSPECT_LABEL_ONLY=true"
                )
        return self

    @model_validator(mode="after")
    def _the_admin_port_is_guarded(self) -> Settings:
        if self.admin_port is not None and not self.admin_key_file:
            raise ValueError("admin_port is set and admin_key_file is empty: anybody could ask; set PALISADE_ADMIN_KEY_FILE")
        if self.admin_port and self.admin_port in (self.port, self.metrics_port):
            raise ValueError(f"admin_port is {self.admin_port}, and so is another port: give it one of its own")
        return self

    def policies(self) -> dict[str, Policy]:
        """Return each tier's policy, and that of suspects; without quotas if ``limits`` is off."""
        return {
            tier: Policy(
                tier,
                decimals=getattr(self, f"{prefix}_decimals"),
                top_n=getattr(self, f"{prefix}_top_n"),
                label_only=getattr(self, f"{prefix}_label_only"),
                reverse_sigmoid=getattr(self, f"{prefix}_reverse_sigmoid"),
                certificate=tier != SUSPECT and getattr(self, f"{prefix}_certificate"),
                windows=getattr(self, f"{prefix}_limits") if self.limits == "on" else (),
            )
            for tier, prefix in {**{tier: f"tier_{tier}" for tier in TIERS}, SUSPECT: SUSPECT}.items()
        }

    def watch_modes(self) -> dict[str, WatchMode]:
        """Return what the watch does about the callers of each tier; nothing if ``limits`` is off."""
        modes: dict[str, WatchMode] = {tier: getattr(self, f"tier_{tier}_watch") for tier in TIERS}
        return {tier: mode if self.limits == "on" else "off" for tier, mode in {**modes, SUSPECT: "act"}.items()}

    def watches(self) -> bool:
        """Tell whether any detector may look at any caller."""
        detectors = (self.watch_near_duplicates, self.watch_off_distribution, self.watch_distances)
        modes = self.watch_modes()
        return any(each != "off" for each in detectors) and any(modes[tier] != "off" for tier in TIERS)


def _is_redis(url: str) -> bool:
    """Tell whether a URL names a Redis or Valkey server, with nothing in it that would be passed over in silence."""
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    known = set(TLS_OPTIONS) if parts.scheme == "rediss" else set()
    path = parts.path.removeprefix("/")
    is_plain = not parts.fragment and (not path or (path.isascii() and path.isdigit()))
    return parts.scheme in ("redis", "rediss") and has_host and is_plain and options.keys() <= known


def read_settings() -> Settings | None:
    """Return the settings from the environment, or ``None`` after saying on standard error which of them are wrong."""
    try:
        return Settings()
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0]) if problem["loc"] else ""
            shown = "..." if name in SECRETS else repr(problem["input"])
            where = f"PALISADE_{name.upper()}={shown}: " if name else ""
            print(f"palisade-serve: {where}{problem['msg']}", file=sys.stderr)
        return None
