"""What training, sampling and data sets answer, as immutable values."""

from typing import Any, Generic, TypeVar

from twinkle_dask_client.models import Reply

T = TypeVar("T")


class Result(Reply, Generic[T]):
    """The envelope of most answers."""

    result: T


class Forwarded(Reply):
    """What a batch gave.

    Attributes:
        loss: None where only the forward pass was asked for.
        logprobs: Of each row's labels, filled up to the longest row of the batch.
        embeddings: Of each row, if the task was ``embedding``.
    """

    loss: float | None = None
    logps: tuple[tuple[float | None, ...], ...] | None = None
    logits: Any = None
    embeddings: Any = None

    @property
    def logprobs(self) -> tuple[tuple[float | None, ...], ...]:
        """Row by row."""
        return self.logps or ()


class AdapterMade(Reply):
    """``adapter_name`` is the run's id."""

    adapter_name: str


class Saved(Reply):
    """A checkpoint.

    Attributes:
        address: ``twinkle://...``, or None if the interval said not now.
        folder: Where the service has it, if that is a folder.
    """

    twinkle_path: str
    checkpoint_dir: str | None = None

    @property
    def address(self) -> str:
        """What to load or sample it by."""
        return self.twinkle_path


class Sequence(Reply):
    """One drawn continuation.

    Attributes:
        stop_reason: ``stop`` or ``length``.
        text: The tokens, decoded.
        feature: Prompt and continuation as an example that can be trained on.
    """

    stop_reason: str
    tokens: tuple[int, ...]
    logprobs: tuple[tuple[tuple[int, float], ...] | None, ...] | None = None
    decoded: str | None = None
    new_input_feature: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """What was drawn, in words."""
        return self.decoded or ""

    @property
    def feature(self) -> dict[str, Any]:
        """To be trained on."""
        return self.new_input_feature or {}


class Sample(Reply):
    """The continuations of one prompt, and its own scores if they were asked for."""

    sequences: tuple[Sequence, ...]
    prompt_logprobs: tuple[float | None, ...] | None = None
    topk_prompt_logprobs: Any = None


class Samples(Reply):
    """One ``Sample`` for each prompt, in order."""

    samples: tuple[Sample, ...]


class Made(Reply):
    """Something that lives on the service."""

    processor_id: str


class Delta(Reply):
    """A piece of text as it is drawn; the last one says why it ended."""

    delta: str = ""
    finish_reason: str | None = None
    error: str | None = None
