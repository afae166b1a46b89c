"""What the service answers, as immutable values.

The wire's names stand in the aliases, the attributes use our words. Fields this client does not
know are ignored, so a newer service is fine.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    RootModel,
)


class Reply(BaseModel):
    """Base of all replies."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Health(Reply):
    """The service answers and can reach its store."""

    status: Literal["ok"]


class ServedModel(Reply):
    """A base model that runs can be made on.

    Attributes:
        name: What to give as ``base_model``.
        context_length: Longest input plus output in tokens, where the service says so.
    """

    name: str = Field(validation_alias="model_name")
    context_length: int | None = Field(default=None, validation_alias="max_context_length")
    trainable: bool = True
    sampleable: bool = True


class Capabilities(Reply):
    """What the service can do."""

    models: tuple[ServedModel, ...] = Field(validation_alias="supported_models")


def _of_our_protocol(address: str) -> str:
    """The list is Tinker's; saves answer the same places with Twinkle's scheme."""
    return address.replace("tinker://", "twinkle://", 1)


class Checkpoint(Reply):
    """Saved state of a run.

    Attributes:
        id: Kind and name, for example ``weights/first``.
        kind: ``training`` (with optimizer state) or ``sampler``.
        address: What to load it by, ``twinkle://...``, which every client knows.
    """

    id: str = Field(validation_alias="checkpoint_id")
    kind: str = Field(validation_alias="checkpoint_type")
    address: Annotated[str, AfterValidator(_of_our_protocol)] = Field(
        validation_alias="tinker_path"
    )
    created_at: AwareDatetime = Field(validation_alias="time")
    expires_at: AwareDatetime | None = None
    size_bytes: int | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None


class RunInfo(Reply):
    """One adapter with its optimizer state and history.

    Attributes:
        rank: Rank of the adapter, where the service says so.
        corrupted: The run cannot go on.
    """

    id: str = Field(validation_alias="training_run_id")
    base_model: str
    owner: str = Field(validation_alias="model_owner")
    rank: int | None = Field(default=None, validation_alias="lora_rank")
    corrupted: bool = False
    last_request_at: AwareDatetime = Field(validation_alias="last_request_time")
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


class Cursor(Reply):
    """Where a page lies in the whole list."""

    offset: NonNegativeInt
    limit: NonNegativeInt
    total: NonNegativeInt = Field(validation_alias="total_count")


class RunPage(Reply):
    """Some of the tenant's runs, the newest first."""

    runs: tuple[RunInfo, ...] = Field(validation_alias="training_runs")
    cursor: Cursor

    @property
    def next_offset(self) -> int | None:
        """Where the next page begins; None if this is the last one."""
        end = self.cursor.offset + len(self.runs)
        return end if self.runs and end < self.cursor.total else None


class CheckpointList(Reply):
    """The checkpoints of a run, oldest first."""

    checkpoints: tuple[Checkpoint, ...]


class SessionMade(Reply):
    """A session, for as long as its heartbeats arrive."""

    session_id: str


class Nothing(RootModel[Any]):
    """Whatever is said does not matter."""
