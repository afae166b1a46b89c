"""What the trainer is asked to do, and what it answers."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

from twinkle_dask.errors import TwinkleDaskError
from twinkle_dask.types import (
    Embed,
    EmbedResult,
    ForwardBackward,
    ForwardBackwardResult,
    GradientStep,
    GradientStepResult,
    LoraSpec,
    OptimStep,
    RunId,
    RunState,
    StepResult,
    TenantId,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRun:
    """Make a run with a freshly initialised adapter; a run that is there already is an error."""

    spec: LoraSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadState:
    """Put a saved state in the run's place, making the run if it is not there.

    Attributes:
        state: Read elsewhere. The work becomes ready when it is done; telling the engine's thread
            so is the caller's part. Its exception becomes the work's outcome.
        with_optimizer: False starts a fresh optimizer.
    """

    state: "Future[RunState]" = field(repr=False)
    with_optimizer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportState:
    """Copy a run's state as it stands at this place in its order."""

    gradients: bool
    optimizer: bool


RowsBody: TypeAlias = ForwardBackward | Embed
"""What is made of rows, which share passes with those of others."""

WorkBody: TypeAlias = RowsBody | OptimStep | GradientStep | CreateRun | LoadState | ExportState


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One operation on one run.

    Attributes:
        id: Unique among what is queued; names the ``Completion``.
        tenant: Whom the tokens are counted for.
    """

    id: str
    run: RunId
    tenant: TenantId
    body: WorkBody

    @property
    def ready(self) -> bool:
        """Whether the work could be done now, had its turn come."""
        return not isinstance(self.body, LoadState) or self.body.state.done()


Outcome: TypeAlias = (
    ForwardBackwardResult
    | EmbedResult
    | StepResult
    | GradientStepResult
    | RunState
    | TwinkleDaskError
    | None
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The end of a work: its result, None where there is nothing to say, or why it failed."""

    id: str
    outcome: Outcome
