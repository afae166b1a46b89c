"""What a host can be told, and what it answers: values that travel packed.

A command's ``body`` is packed by itself, so that the bytes which went into the journal go to the
host as they are, and a stored result is what the host sent.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from twinkle_dask import errors, packing
from twinkle_dask.types import LoraSpec, RunId, SamplePart, TenantId

#: Name of the handler through which a worker's host and a gateway talk: see ``Host.carry``.
STREAM: Final = "twinkle-dask"


class Role(StrEnum):
    """What a host does with its copy of the base weights."""

    BOTH = "both"
    TRAINER = "trainer"
    SAMPLER = "sampler"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """Everything a host needs to start.

    Attributes:
        source: Of the base weights.
        blob_url: Where checkpoints and snapshots lie; the host must be able to reach it.
        threads: Threads for arithmetic on a CPU; None leaves the worker's setting.
        tokens_per_micro_batch: See ``config.EngineConfig``; so the next ones.
    """

    source: str
    role: Role
    dtype: str
    max_rank: int
    blob_url: str
    threads: int | None = None
    tokens_per_micro_batch: int | None = None
    kv_cache_bytes: int | None = None
    adapter_bytes: int | None = None
    adapter_host_bytes: int | None = None
    deterministic: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRun:
    """Make a run with a fresh adapter, or replace what the host has under that id."""

    spec: LoraSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFolder:
    """Set a run to what a checkpoint or snapshot folder holds; makes the run if need be."""

    folder: str
    with_optimizer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFolder:
    """Write a run to a new folder of the blob store. Answers ``FolderSaved``.

    Attributes:
        gradients: Also what has been accumulated and not yet spent (snapshots).
        optimizer: Also the moments; sampler weights go without.
        base_model: Name to record.
    """

    folder: str
    base_model: str
    optimizer: bool
    gradients: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFolder:
    """Write a run's adapter for other programs to a new folder. Answers ``FolderSaved``.

    Attributes:
        recipients: Public keys of age, for which the files are encrypted; none for plain files.
    """

    folder: str
    base_model: str
    recipients: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSaved:
    """A folder is durable. ``num_bytes`` counts all its files."""

    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DropRun:
    """Forget a run and free its memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Carries a packed ``SampleRequest``.

    Attributes:
        adapter: Folder with the adapter's weights; None samples the base model.
        watched: Send what is drawn as it comes, as ``Part``s before the completion.
    """

    request: bytes
    adapter: str | None
    watched: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Stop the sample command with this id, if it is still going on."""

    command_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One envelope to a host.

    Attributes:
        id: Unique over all time; names the completion.
        run: The run whose order the command joins; empty for samples and cancels.
        body: One of the above, a ``ForwardBackward`` or a step, packed.
    """

    id: str
    run: RunId
    tenant: TenantId
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A class of ``errors`` by name, its message, and what its kind has besides."""

    kind: str
    message: str
    incident: str = ""
    retry_after_s: float = 1.0

    def error(self) -> errors.TwinkleDaskError:
        """The exception again; an unknown kind becomes a ServiceFault."""
        kind = _ERRORS.get(self.kind, errors.ServiceFault)
        if issubclass(kind, errors.ServiceFault):
            return kind(self.message, self.incident)
        if issubclass(kind, errors.CapacityError):
            return kind(self.message, self.retry_after_s)
        return kind(self.message)

    @classmethod
    def of(cls, error: errors.TwinkleDaskError) -> "Failure":
        """What travels of an exception."""
        failure = cls(kind=type(error).__name__, message=error.message)
        if isinstance(error, errors.ServiceFault):
            return replace(failure, incident=error.incident)
        if isinstance(error, errors.CapacityError):
            return replace(failure, retry_after_s=error.retry_after_s)
        return failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What became of a command.

    Attributes:
        result: A packed result value, or empty where there is nothing to say.
    """

    id: str
    result: bytes = b""
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some of what a watched sample command has drawn, in order, before its completion."""

    id: str
    drawn: SamplePart


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The answer to a probe.

    Attributes:
        paused: Runs whose work waits for room in the trainer's memory.
        reason: Why they wait, in words for their tenants.
    """

    paused: tuple[RunId, ...] = ()
    reason: str = ""


def _leaves(cls: type[errors.TwinkleDaskError]) -> dict[str, type[errors.TwinkleDaskError]]:
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found |= _leaves(child)
    return found


_ERRORS = _leaves(errors.TwinkleDaskError)

packing.register(
    Cancel,
    Command,
    Completion,
    CreateRun,
    DropRun,
    ExportFolder,
    Failure,
    FolderSaved,
    Health,
    HostConfig,
    LoadFolder,
    Part,
    Role,
    Sample,
    SaveFolder,
)
