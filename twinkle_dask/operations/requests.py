"""What a lane may carry, as it stands in the journal: enough to do it again after a crash."""

from dataclasses import dataclass
from typing import TypeAlias

from twinkle_dask import packing
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.values import CheckpointAddress, TicketKind
from twinkle_dask.store.records import CheckpointRecord
from twinkle_dask.types import (
    Embed,
    ForwardBackward,
    GradientStep,
    Json,
    LoraSpec,
    OptimStep,
    SamplerId,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRun:
    """Make a run with a fresh adapter."""

    spec: LoraSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveState:
    """Save a training checkpoint. Folder and id are fixed here, so that a repeat is harmless.

    Attributes:
        actor: Who asked, for the audit trail; so ``key_hint``.
        optimizer: Whether the optimizer's memory is saved, too.
    """

    name: str
    overwrite: bool
    ttl_s: int | None
    user_metadata: Json
    checkpoint_id: str
    folder: str
    actor: str = ""
    key_hint: str = ""
    optimizer: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveForSampler:
    """Save sampler weights under a name, or as the sampler ``sampler``.

    Attributes:
        inflight: The sampler, and every other one that was made so, samples with the newest of
            these weights.
    """

    name: str | None
    sampler: SamplerId | None
    sampler_seq: int | None
    ttl_s: int | None
    user_metadata: Json
    checkpoint_id: str
    folder: str
    actor: str = ""
    key_hint: str = ""
    inflight: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveExternal:
    """Export the adapter under a name, for other programs.

    Attributes:
        recipients: Public keys of age, for which the files are encrypted; none for plain files.
    """

    name: str
    ttl_s: int | None
    recipients: tuple[str, ...]
    checkpoint_id: str
    folder: str
    actor: str = ""
    key_hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadRun:
    """Free the run's memory for good, once everything before is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadState:
    """Set the run to a checkpoint; as a run's first operation this makes the run.

    Attributes:
        address: None for an address that has no name of its own.
    """

    address: CheckpointAddress
    folder: str
    with_optimizer: bool


LaneRequest: TypeAlias = (
    StartRun
    | ForwardBackward
    | Embed
    | OptimStep
    | GradientStep
    | SaveState
    | SaveForSampler
    | SaveExternal
    | LoadState
    | UnloadRun
)


def load_of(
    record: CheckpointRecord, address: CheckpointAddress, *, with_optimizer: bool
) -> LoadState:
    """A request to load a checkpoint.

    Raises:
        InvalidRequest: The optimizer is wanted and was not saved.
    """
    if with_optimizer and not record.has_optimizer:
        raise InvalidRequest(
            f"Checkpoint {address.name!r} was saved without its optimizer; load the weights alone, "
            "or a checkpoint that was saved with it."
        )
    return LoadState(address=address, folder=record.path, with_optimizer=with_optimizer)


def kind_of(request: LaneRequest) -> TicketKind:
    """The journal's word for a request."""
    match request:
        case StartRun():
            return TicketKind.CREATE_RUN
        case ForwardBackward():
            return TicketKind.FORWARD_BACKWARD
        case Embed():
            return TicketKind.EMBED
        case OptimStep():
            return TicketKind.OPTIM_STEP
        case GradientStep():
            return TicketKind.GRADIENT_STEP
        case SaveState():
            return TicketKind.SAVE_STATE
        case SaveForSampler():
            return TicketKind.SAVE_FOR_SAMPLER
        case SaveExternal():
            return TicketKind.SAVE_EXTERNAL
        case UnloadRun():
            return TicketKind.UNLOAD_RUN
        case LoadState():
            return TicketKind.LOAD_STATE


def changes_run(request: LaneRequest) -> bool:
    """Whether the run differs afterwards, so that recovery must do it again."""
    match request:
        case ForwardBackward() | Embed():
            return request.backward
        case SaveState() | SaveForSampler() | SaveExternal() | UnloadRun():
            return False
        case StartRun() | OptimStep() | GradientStep() | LoadState():
            return True


packing.register(LoadState, SaveExternal, SaveForSampler, SaveState, StartRun, UnloadRun)
