"""The one typed configuration: YAML file, environment ``TWINKLE_DASK_*``, command line.

Flags win over the environment, which wins over the file. Unknown keys are errors whose message
names the nearest known one. ``docs/configuration.md`` lists every setting.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from twinkle_dask.errors import StartupError

ENVIRONMENT_PREFIX = "TWINKLE_DASK_"

_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_URL = re.compile(r"https?://[A-Za-z0-9._~:\[\]-]+(/[A-Za-z0-9._~-]+)*/?")
_KEY = re.compile(r"[!-~]{8,512}")
_HOST_AND_PORT = re.compile(r".+:[0-9]{1,5}")


class Settings(BaseModel):
    """Base of every group of settings: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Settings):
    """One name that tenants may ask for.

    Attributes:
        source: Hugging Face folder, GGUF file or folder, or hub id. Names that share a source
            share one copy of the weights.
        tokenizer: What clients are told to load as tokenizer; a folder or a hub id. By default the
            source if clients can be expected to read it (a hub id, or a folder while the server
            listens on loopback only), else the name.
        trainers: Hosts that only train, on a cluster.
        samplers: Hosts that only sample, on a cluster. With both 0 the free workers are shared
            out: see ``cluster.placement``.
    """

    source: str
    tokenizer: str | None = None
    trainers: int = Field(default=0, ge=0)
    samplers: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _both_roles(self) -> "ModelConfig":
        if (self.trainers == 0) != (self.samplers == 0):
            raise ValueError("give both trainers and samplers, or neither")
        return self


class LimitConfig(Settings):
    """What one tenant, or one request, may ask for.

    Attributes:
        max_body_bytes: Largest request body, after decompression.
        max_rank: Largest LoRA rank.
        max_data: Most data in one ``forward_backward``.
        max_samples: Largest ``num_samples``.
        max_alternatives: Most tokens that a sample request may have named or drawn at one place.
        max_answer_bytes: Largest answer with the logprobs of such tokens, to one sample request,
            and of one call of a processor.
        max_images: Most images in one request.
        max_image_bytes: Largest image, as a file.
        max_image_pixels: Largest image, as width times height.
        max_request_pixels: All images of one request together.
        max_queued_operations: Operations waiting in one run.
        max_queued_bytes: Of requests that wait or are in progress, per tenant.
        max_runs: Runs of sessions that are alive, per tenant.
        max_samples_in_flight: Sample requests that wait or are drawn, per tenant.
        max_input_tokens: Most tokens of one batch, or of one prompt times its samples; None leaves
            that to the other limits.
        operations_per_s: Batches, steps, saves and sample requests that a tenant may send in a
            second, on average over ``rate_window_s``; None is no limit.
        input_tokens_per_s: The same of their tokens.
        rate_window_s: What rates are counted over.
        queue_timeout_s: An operation that no host has taken for so long fails; None lets it wait.
        run_lifetime_s: A run takes no more work after so long, whatever its session does; None is
            no limit.
        max_processors: Data sets, loaders and other processors of sessions that are alive, per
            tenant.
        processor_bytes: Files of all of a tenant's data sets together, saved data included.
        max_inline_bytes: Rows that come with a request instead of from a file, as JSON.
        session_timeout_s: A session without heartbeat for so long expires; its runs leave the
            hosts' memory and stay in the store.
    """

    max_body_bytes: int = Field(default=256 * 2**20, gt=0)
    max_rank: int = Field(default=256, gt=0)
    max_data: int = Field(default=16384, gt=0)
    max_samples: int = Field(default=1024, gt=0)
    max_alternatives: int = Field(default=1024, gt=0)
    max_answer_bytes: int = Field(default=64 * 2**20, gt=0)
    max_images: int = Field(default=1024, gt=0)
    max_image_bytes: int = Field(default=16 * 2**20, gt=0)
    max_image_pixels: int = Field(default=2**22, gt=0, le=2**26)
    max_request_pixels: int = Field(default=2**26, gt=0)
    max_queued_operations: int = Field(default=4096, gt=0)
    max_queued_bytes: int = Field(default=2 * 2**30, gt=0)
    max_runs: int = Field(default=4096, gt=0)
    max_samples_in_flight: int = Field(default=20_000, gt=0)
    max_input_tokens: int | None = Field(default=None, gt=0)
    operations_per_s: float | None = Field(default=None, gt=0)
    input_tokens_per_s: float | None = Field(default=None, gt=0)
    rate_window_s: float = Field(default=1.0, gt=0, le=3600.0)
    queue_timeout_s: float | None = Field(default=None, gt=0)
    run_lifetime_s: float | None = Field(default=None, gt=0)
    max_processors: int = Field(default=20, gt=0)
    processor_bytes: int = Field(default=8 * 2**30, gt=0)
    max_inline_bytes: int = Field(default=64 * 2**20, gt=0)
    session_timeout_s: float = Field(default=1800.0, gt=0)


class JournalConfig(Settings):
    """How long things are kept, and how often runs are written down.

    Attributes:
        snapshot_operations: Snapshot a run after so many state-changing operations.
        snapshot_bytes: Or after so many bytes of journal.
        keep_delivered_s: A delivered result stays readable for so long.
        keep_finished_s: An undelivered one.
        prune_interval_s: Time between clean-ups.
        gap_grace_s: An operation whose predecessor never arrives starts after so long.
        keep_idle_weights_s: Weights saved for one sampler alone are removed after so long without a
            sample, but for the newest of each run.
        keep_saved_data_s: Rows that a tenant saved from a data set are removed after so long
            without being read.
    """

    snapshot_operations: int = Field(default=100, gt=0)
    snapshot_bytes: int = Field(default=256 * 2**20, gt=0)
    keep_delivered_s: float = Field(default=600.0, gt=0)
    keep_finished_s: float = Field(default=86400.0, gt=0)
    prune_interval_s: float = Field(default=30.0, gt=0)
    gap_grace_s: float = Field(default=2.0, gt=0)
    keep_idle_weights_s: float = Field(default=7200.0, gt=0)
    keep_saved_data_s: float = Field(default=30 * 86400.0, gt=0)


class EngineConfig(Settings):
    """How hosts compute.

    Attributes:
        tokens_per_micro_batch: Most tokens in one micro-batch of training; None chooses by device
            and memory.
        kv_cache_bytes: Memory for the sampler's keys and values; None chooses by memory.
        threads: Threads of one host's arithmetic on a CPU; None shares the cores out, but gives one
            to a model too small to gain from more.
        adapter_bytes: Most memory that a trainer's runs take where it computes: adapters, moments
            and gradients. Runs that have no work make place for those that have; None takes a
            fifth of what is free once the weights are loaded.
        adapter_host_bytes: Most host memory for runs that left a GPU; what exceeds it goes to the
            worker's local disk. None takes a fifth of what is free. Refused without a GPU.
        deterministic: Make what a run computes independent of who else trains, bit for bit.
    """

    tokens_per_micro_batch: int | None = Field(default=None, gt=0)
    kv_cache_bytes: int | None = Field(default=None, gt=0)
    threads: int | None = Field(default=None, gt=0)
    adapter_bytes: int | None = Field(default=None, gt=0)
    adapter_host_bytes: int | None = Field(default=None, gt=0)
    deterministic: bool = False


class ProcessingConfig(Settings):
    """Work on processors beside the engines: chat templates, tokenizing, data sets.

    Attributes:
        threads: Tasks that the embedded cluster's CPU worker does at the same time.
        memory_bytes: Most memory of that worker; a task that exceeds it is ended and refused.
        max_tasks: Tasks of one tenant at the same time.
        max_waiting: Tasks of one tenant that may wait; more are refused until some are done.
        timeout_s: Longest time of one task, waiting included.
    """

    threads: int = Field(default=4, gt=0)
    memory_bytes: int = Field(default=4 * 2**30, ge=2**28)
    max_tasks: int = Field(default=2, gt=0)
    max_waiting: int = Field(default=1024, gt=0)
    timeout_s: float = Field(default=300.0, gt=0)


class TokenConfig(Settings):
    """Tokens (JWT) that Tinker clients get for their API key and send in its place.

    Attributes:
        enabled: Tell clients to ask for one; without, tokens are neither given nor taken.
        lifetime_s: How long one is valid. Clients ask for the next at half of it.
    """

    enabled: bool = True
    lifetime_s: float = Field(default=3600.0, ge=120.0, le=30 * 86400.0)


class NoticeConfig(Settings):
    """What every new session is told; the Tinker SDK logs it at the level of that name.

    Attributes:
        info: For example a planned restart.
        warning: For example a disk that is getting full.
        error: For example that this server is about to go away.
    """

    info: str | None = None
    warning: str | None = None
    error: str | None = None


class ServiceConfig(Settings):
    """Everything ``twinkle-dask serve`` can be told.

    Attributes:
        models: Served names.
        host: Address to listen on. Beyond loopback an API key must be configured.
        port: 0 takes a free one.
        data_dir: Folder of everything durable; one server at a time.
        database_url: SQLAlchemy URL; None is SQLite in ``data_dir``.
        blob_url: fsspec URL of checkpoints and journal payloads; None is ``data_dir``.
        save_roots: Folders below which Twinkle clients may have checkpoints written as PEFT folders
            (``save_dir``); each tenant gets one of its own there.
        upload_roots: Folders or fsspec URLs that Twinkle clients may upload checkpoints to, by
            names of their choosing below a folder of the tenant's own.
        api_keys: Each is a tenant. None given: one is made and printed.
        scheduler: Address of a Dask scheduler; None starts an embedded cluster.
        dtype: Of the base weights.
        dashboard: ``HOST:PORT`` of the embedded cluster's Dask dashboard; None is off.
        compress_uploads: Tell clients to compress training data (zstd).
        custom_losses: Compute loss functions that tenants define; without, their clients do.
        multiplex_polls: Tell clients to poll for all samples of a sampler in one request.
        url_prefix: Path in front of every route, for example ``/tinker``.
        public_url: Where clients reach the service, as they are told it (with the prefix, if any);
            addresses of downloads begin with it. None takes the address of each request.
        data_roots: Folders below which clients may name data files for data sets; every CPU worker
            must see them. None given: no files.
        allow_hub_datasets: Let clients name data sets of the Hugging Face hub.
        log_level: Least severe level written to standard error.
        start_timeout_s: Longest wait for workers and model loading.
    """

    models: Mapping[str, ModelConfig] = Field(min_length=1)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    data_dir: Path = Path("twinkle-data")
    database_url: str | None = None
    blob_url: str | None = None
    save_roots: tuple[Path, ...] = ()
    upload_roots: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    scheduler: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    dashboard: str | None = None
    compress_uploads: bool = False
    custom_losses: bool = True
    multiplex_polls: bool = False
    url_prefix: str = ""
    public_url: str | None = None
    data_roots: tuple[Path, ...] = ()
    allow_hub_datasets: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    start_timeout_s: float = Field(default=900.0, gt=0)
    limits: LimitConfig = LimitConfig()
    journal: JournalConfig = JournalConfig()
    engine: EngineConfig = EngineConfig()
    processing: ProcessingConfig = ProcessingConfig()
    tokens: TokenConfig = TokenConfig()
    notices: NoticeConfig = NoticeConfig()

    @field_validator("models", mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        """Accept ``NAME: SOURCE`` beside ``NAME: {source: SOURCE}``."""
        if not isinstance(value, Mapping):
            return value
        items = cast(Mapping[str, object], value)
        return {k: {"source": v} if isinstance(v, str) else v for k, v in items.items()}

    @field_validator("api_keys")
    @classmethod
    def _key_form(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for key in value:
            if not _KEY.fullmatch(key):
                raise ValueError(
                    "an API key has 8 to 512 printable characters without spaces; the Tinker SDK "
                    "sends only those that begin with 'tml-'"
                )
        return value

    @field_validator("url_prefix")
    @classmethod
    def _prefix_form(cls, value: str) -> str:
        if value and not _PREFIX.fullmatch(value):
            raise ValueError(f"a prefix looks like '/a/b', not {value!r}")
        return value

    @field_validator("public_url")
    @classmethod
    def _url_form(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not _URL.fullmatch(value):
            raise ValueError(f"a public URL looks like 'https://host/a/b', not {value!r}")
        return value.rstrip("/")

    @field_validator("dashboard")
    @classmethod
    def _dashboard_form(cls, value: str | None) -> str | None:
        # Dask takes an address without a host for all interfaces.
        if value is not None and not _HOST_AND_PORT.fullmatch(value):
            raise ValueError(f"the dashboard's address is HOST:PORT, not {value!r}")
        return value

    @model_validator(mode="after")
    def _one_dashboard(self) -> "ServiceConfig":
        if self.dashboard is not None and self.scheduler is not None:
            raise ValueError(
                "Setting 'dashboard' is for the embedded cluster; with 'scheduler', the dashboard "
                "is that scheduler's own (dask scheduler --dashboard-address HOST:PORT)"
            )
        return self

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in {"127.0.0.1", "localhost", "::1"} or self.host.startswith("127.")


class Places(BaseModel):
    """Where a service keeps its records: all of its settings that other commands need."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    data_dir: Path = Path("twinkle-data")
    database_url: str | None = None


def load_places(
    file: Path | None, flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> Places:
    """As ``load_config``, for commands beside the server; a file is not needed.

    Raises:
        StartupError: Unreadable file, or a value of the wrong kind.
    """
    try:
        return Places.model_validate(_merged(file, flags, environment))
    except ValidationError as error:
        raise StartupError(_explain(error)) from None


def load_config(
    file: Path | None, flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> ServiceConfig:
    """Merge file, environment and flags.

    Args:
        file: YAML with the names of ``ServiceConfig``.
        flags: Settings given on the command line; None values are not given.
        environment: Reads ``TWINKLE_DASK_PORT``, ``TWINKLE_DASK_LIMITS__MAX_RANK`` and so on;
            values are YAML.

    Raises:
        StartupError: Unreadable file, unknown key, or a value of the wrong kind.
    """
    try:
        return ServiceConfig.model_validate(_merged(file, flags, environment))
    except ValidationError as error:
        raise StartupError(_explain(error)) from None


def _merged(
    file: Path | None, flags: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    if file is not None:
        merged = _read(file)
    _merge(merged, _from_environment(environment))
    _merge(merged, {key: value for key, value in flags.items() if value is not None})
    return merged


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except OSError as error:
        raise StartupError(f"Cannot read the configuration {file}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise StartupError(f"The configuration {file} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise StartupError(f"The configuration {file} must be a mapping of settings.")
    return cast(dict[str, Any], tree)


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, text in environment.items():
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        *groups, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        if not groups and key in _CLIENT_VARIABLES:
            continue
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[key] = yaml.safe_load(text)
    return tree


# Variables of the same prefix that the client and the launcher read.
_CLIENT_VARIABLES = frozenset({"url", "api_key"})


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], cast(Mapping[str, Any], value))
        else:
            into[key] = value


def _explain(error: ValidationError) -> str:
    lines: list[str] = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), _known_names(), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            lines.append(f"Unknown setting {where!r}.{hint}")
        elif problem["type"] == "missing":
            lines.append(f"Setting {where!r} is missing.")
        else:
            what = problem["msg"].removeprefix("Value error, ")
            lines.append(f"Setting {where!r}: {what}." if where else f"{what}.")
    return "\n".join(lines)


def _known_names() -> list[str]:
    groups = (
        ServiceConfig,
        ModelConfig,
        LimitConfig,
        JournalConfig,
        EngineConfig,
        ProcessingConfig,
        TokenConfig,
        NoticeConfig,
    )
    return [name for group in groups for name in group.model_fields]
