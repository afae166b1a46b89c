"""``state.json``: what of a run's state is no array, and the digests of the other files."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from twinkle_dask.errors import CheckpointCorrupt
from twinkle_dask.types import Float32Array, LoraSpec, RunState, StepState

STATE_FILE = "state.json"
FORMAT_VERSION = 1


class FileDigest(BaseModel):
    """Size and SHA-256 of one file, against halves, mix-ups and failing disks."""

    model_config = ConfigDict(extra="forbid", strict=True)

    num_bytes: int
    sha256: str


class StepCounts(BaseModel):
    """``StepState`` without its tensors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    gradients: Annotated[int, Field(ge=0)]
    at_boundary: bool
    gradient_tokens: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    steps: Annotated[int, Field(ge=0)]
    schedule_steps: Annotated[int, Field(ge=0)]
    optimizer: str | None

    @classmethod
    def of(cls, state: StepState) -> "StepCounts":
        """What of a state is no array."""
        return cls(
            gradients=state.gradients,
            at_boundary=state.at_boundary,
            gradient_tokens=state.gradient_tokens,
            steps=state.steps,
            schedule_steps=state.schedule_steps,
            optimizer=state.optimizer,
        )

    def state(self, tensors: Mapping[str, Float32Array]) -> StepState:
        """The state again."""
        return StepState(**self.model_dump(), tensors=tensors)


class StateFile(BaseModel):
    """The file's contents.

    Attributes:
        optimizer_step: Steps taken by AdamW; None where no optimizer was saved.
        steps: Of ``GradientStep``; None where there is nothing to say, and in folders of before.
        files: Digests by file name, of every other file of the folder.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format_version: int
    base_model: str
    spec: LoraSpec
    optimizer_step: Annotated[int, Field(ge=0)] | None
    steps: StepCounts | None = None
    files: dict[str, FileDigest]

    def check_digest(self, name: str, data: bytes, where: str) -> None:
        """Raise ``CheckpointCorrupt`` unless ``data`` is the file that was written."""
        expected = self.files.get(name)
        if expected is None:
            raise CheckpointCorrupt(f"{where} is not part of the checkpoint, says its state.json.")
        if len(data) != expected.num_bytes:
            raise CheckpointCorrupt(
                f"{where} has {len(data)} bytes where {expected.num_bytes} were written."
            )
        if hashlib.sha256(data).hexdigest() != expected.sha256:
            raise CheckpointCorrupt(f"{where} does not hold the bytes that were written.")


def state_file(state: RunState, base_model: str, files: Mapping[str, bytes]) -> StateFile:
    """Describe a run's state and the files that hold its arrays."""
    return StateFile(
        format_version=FORMAT_VERSION,
        base_model=base_model,
        spec=state.adapter.spec,
        optimizer_step=None if state.optimizer is None else state.optimizer.step,
        steps=None if state.steps is None else StepCounts.of(state.steps),
        files={
            name: FileDigest(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in files.items()
        },
    )


def parse_state(data: bytes, where: str) -> StateFile:
    """Read the file; ``where`` names it in messages.

    Raises:
        CheckpointCorrupt: It is no such file, or of a version that this program does not know.
    """
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise CheckpointCorrupt(f"{where} is no valid JSON.") from error
    version = cast("dict[str, Any]", raw).get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointCorrupt(
            f"{where} has format version {version!r}; this program reads {FORMAT_VERSION}."
        )
    try:
        return StateFile.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointCorrupt(f"{where} is damaged: {place}: {first['msg']}.") from error
