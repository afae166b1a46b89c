"""The values that everything else passes around. Immutable; numpy but no torch, no wire.

Shapes: N tokens of one datum, K targets per position, R rank, D in, E out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NewType, TypeAlias

import numpy as np
from numpy.typing import NDArray

TenantId = NewType("TenantId", str)
SessionId = NewType("SessionId", str)
RunId = NewType("RunId", str)
SamplerId = NewType("SamplerId", str)
TicketId = NewType("TicketId", str)

Int32Array: TypeAlias = NDArray[np.int32]
Int64Array: TypeAlias = NDArray[np.int64]
Float32Array: TypeAlias = NDArray[np.float32]
Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """The shape of one adapter; the effective weight is ``W + scale * B_ER @ A_RD``.

    Attributes:
        rank: Inner dimension R, at least 1.
        seed: Seeds the initial A; the same seed gives the same adapter on any machine.
        alpha: Numerator of the scale, which is ``alpha / rank``.
        train_attn: Adapt the projections of attention (and linear attention) layers.
        train_mlp: Adapt the projections of feed-forward layers.
        train_unembed: Adapt the output head.
        targets: Names of linear modules to adapt, the last part of their path or more of it; the
            ``train_`` flags are not looked at then. None goes by the flags.
        dropout: Share of an adapter's inputs that are left out while it learns, below 1.
        rslora: Scale by ``alpha / sqrt(rank)`` instead (https://arxiv.org/abs/2312.03732).
    """

    rank: int
    seed: int
    alpha: float = 32.0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LossName(StrEnum):
    """Losses a tenant may name; ``twinkle_dask.losses`` says what each of them takes."""

    CROSS_ENTROPY = "cross_entropy"
    IMPORTANCE_SAMPLING = "importance_sampling"
    PPO = "ppo"
    CISPO = "cispo"
    DRO = "dro"
    GSPO = "gspo"
    STABLE_REINFORCE = "stable_reinforce"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """A loss with its settings; ``config`` holds every key of the loss, defaults filled in."""

    name: LossName
    config: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomLoss:
    """A loss that a tenant has defined; ``twinkle_dask.custom_losses`` says what it may be.

    It travels whole with every batch, so that a replay depends on nothing else.

    Attributes:
        id: What its session calls it.
        name: The tenant's word for it, for messages.
        ranks: Of each input, by name: ``logprobs`` first, then what a datum must have.
        graph: A checked program, as ``custom_losses.program_of`` reads it.
    """

    id: str
    name: str
    ranks: Mapping[str, int]
    graph: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """What a datum must have besides its targets, in order."""
        return tuple(self.ranks)[1:]


Loss: TypeAlias = LossSpec | CustomLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image among the tokens of a row.

    A face hands it over without its positions, since it does not know the model: then it stands
    between the tokens before and from ``position``. ``operations.images`` makes room for it.

    Attributes:
        position: Where it begins among the row's tokens.
        num_positions: How many of the row's tokens stand for it, all of them the model's
            placeholder; 0 until there is room.
        format: ``png`` or ``jpeg``.
        data: The encoded file.
        expected_positions: What the sender thinks that it takes; None if nothing was said.
    """

    position: int
    format: str
    data: bytes
    num_positions: int = 0
    expected_positions: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Datum:
    """One example.

    Attributes:
        tokens: Model input, int32 (N,).
        target_tokens: int64 (N,) or (N, K); ``target_tokens[i]`` is predicted at position i.
        loss_inputs: float32 arrays by name, each of the shape of ``target_tokens``.
        custom_inputs: What a custom loss reads, by name; any shape of its rank, as it was sent.
        images: In the order of their positions, without overlap.
    """

    tokens: Int32Array
    target_tokens: Int64Array
    loss_inputs: Mapping[str, Float32Array]
    custom_inputs: Mapping[str, Float32Array | Int64Array] = field(
        default_factory=dict[str, Float32Array | Int64Array]
    )
    images: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackward:
    """Add the gradient of a summed loss to a run, or only evaluate it (``backward=False``).

    Attributes:
        adapter: False computes with the base model alone; only without ``backward``.
        temperature: Logits are divided by it before anything else.
        raw_scores: The scores of targets are logits, not log-probabilities; so are slopes by them.
        want_correct: Also tell at which targets the likeliest token is the target.
        dropout_seed: Draws what the adapter's dropout leaves out; the same seed and data leave out
            the same. None leaves out nothing.
        num_counted: What this batch adds to the run's ``gradient_tokens`` if it has a gradient.
    """

    data: tuple[Datum, ...]
    loss: Loss
    backward: bool = True
    adapter: bool = True
    temperature: float = 1.0
    raw_scores: bool = False
    want_correct: bool = False
    dropout_seed: int | None = None
    num_counted: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Input tokens over all data."""
        return sum(len(d.tokens) for d in self.data)

    @property
    def num_rows(self) -> int:
        """How many rows go through the model."""
        return len(self.data)

    @property
    def num_scores(self) -> int:
        """Targets over all data."""
        return sum(d.target_tokens.size for d in self.data)

    def length_of(self, row: int) -> int:
        """Tokens of one of them."""
        return len(self.data[row].tokens)

    @property
    def num_image_bytes(self) -> int:
        """Encoded images over all data."""
        return sum(len(image.data) for d in self.data for image in d.images)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamParams:
    """Settings of one AdamW step (decoupled weight decay, bias correction).

    Attributes:
        grad_clip_norm: Clip the global L2 norm to this; 0 means no clipping.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimStep:
    """Spend a run's accumulated gradient."""

    adam: AdamParams


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """An optimizer of ``twinkle_dask.optimizers`` with its settings, checked there."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSpec:
    """A learning rate schedule of ``twinkle_dask.optimizers`` with its settings, checked there."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipGradient:
    """Divide the gradient by the run's ``gradient_tokens``, then clip its global norm.

    Attributes:
        max_norm: Above 0; infinity clips nothing.
        norm_type: Of the norm, at least 1; infinity takes the largest number.
    """

    max_norm: float
    norm_type: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientStep:
    """Any of the parts of an optimizer step, in this order; nothing between boundaries.

    A boundary is where the number of gradients since the last one is ``accumulation`` or more, or
    ``accumulation`` is 1. It lasts until the next gradient, so the parts may come one by one.
    Without a gradient a step changes nothing, as torch's without ``grad``.

    Attributes:
        clip: None leaves the gradient as it is.
        step: Take a step with this optimizer; None takes none. Another class than that of the step
            before starts without memory, other settings go on with it.
        schedule: What the learning rate follows; None keeps the optimizer's own.
        zero: Forget the gradient, and what was counted with it.
        advance: Move the schedule on by one.
        accumulation: At least 1.
        optimizer: Whose learning rate is told where no step is taken.
        fresh_optimizer: First forget the optimizer's memory, boundary or not.
        fresh_schedule: First start the schedule anew, boundary or not.
    """

    clip: ClipGradient | None = None
    step: OptimizerSpec | None = None
    schedule: SchedulerSpec | None = None
    zero: bool = False
    advance: bool = False
    accumulation: int = 1
    optimizer: OptimizerSpec | None = None
    fresh_optimizer: bool = False
    fresh_schedule: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientStepResult:
    """What a ``GradientStep`` did.

    Attributes:
        done: False between boundaries, where nothing happened.
        grad_norm: Before clipping; None without ``clip`` or between boundaries.
        learning_rate: That the next step will use; None if no optimizer was given.
        steps: Optimizer steps that the run has taken in this way.
        gradients: Backward passes of this window whose gradient is held.
    """

    done: bool
    grad_norm: float | None
    learning_rate: float | None
    steps: int
    gradients: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed:
    """Embed rows: the final hidden state of each row's last token, scaled to length 1.

    Attributes:
        rows: Tokens of each row, int32 (N,).
        slopes: Derivative of a loss by each row's embedding, float32 (D,); with them the gradient
            is added to the run. None only embeds.
        dropout_seed: As in ``ForwardBackward``; so ``adapter`` and ``num_counted``.
    """

    rows: tuple[Int32Array, ...]
    slopes: tuple[Float32Array, ...] | None = None
    adapter: bool = True
    dropout_seed: int | None = None
    num_counted: float = 0.0

    @property
    def backward(self) -> bool:
        """Whether a gradient is added to the run."""
        return self.slopes is not None

    @property
    def num_tokens(self) -> int:
        """Over all rows."""
        return sum(len(row) for row in self.rows)

    @property
    def num_rows(self) -> int:
        """How many rows go through the model."""
        return len(self.rows)

    def length_of(self, row: int) -> int:
        """Tokens of one of them."""
        return len(self.rows[row])


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedResult:
    """``embeddings``: float32 (B, D)."""

    embeddings: Float32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackwardResult:
    """What a forward or forward_backward gives back.

    Attributes:
        logprobs: Per datum, float32 of the shape of its ``target_tokens``: log softmax of the
            unmodified logits at the targets, at zero-weight positions too.
        metrics: Finite numbers under names of the form ``x:suffix`` (the suffix says how chunks
            combine); ``loss:sum`` is always there. ``docs/losses.md`` lists them. Those of a
            custom loss (``custom/``) may be infinite or NaN.
        correct: If asked for: per datum, bool of the shape of its ``target_tokens``.
    """

    logprobs: tuple[Float32Array, ...]
    metrics: Mapping[str, float]
    correct: tuple[NDArray[np.bool_], ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Metrics of an optimizer step; ``grad_norm:mean`` is the L2 norm before clipping.

    ``docs/losses.md`` lists the others, which are there if a step was taken.
    """

    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """When generation ends besides ``max_tokens``.

    Attributes:
        strings: End once the generated text contains one of them.
        tokens: End after one of these token ids.
        end_of_sequence: End after the model's own end-of-sequence tokens.
    """

    strings: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    end_of_sequence: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to draw tokens.

    Attributes:
        max_tokens: Upper bound of generated tokens; None means up to the context length.
        temperature: 0 is greedy.
        top_k: Keep the k likeliest tokens; -1 keeps all.
        top_p: Keep the smallest set of likeliest tokens whose mass reaches p.
        seed: Fixes the draws independently of what else is in the batch; None draws freshly.
        repetition_penalty: Above 0. Logits of tokens that stand in the prompt or were drawn already
            are divided by it where they are positive and multiplied where not, before anything
            else (arXiv 1909.05858, section 4.1). Logprobs are told without it.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    stop: Stop = Stop()
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CsrLayout:
    """Which cells of a matrix are listed: row ``i`` has columns ``col[crow[i]:crow[i + 1]]``.

    The faces see to it that this is so.

    Attributes:
        crow: int64, one more than there are rows.
        col: int64 (M,), increasing within a row.
        num_columns: Width of the matrix.
    """

    crow: Int64Array
    col: Int64Array
    num_columns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTokens:
    """Tokens to score in a prompt: row ``i`` after its first ``i + 1`` tokens.

    Attributes:
        tokens: int64 (N - 1, K), or with a layout (M,), those of its cells. -1 asks for nothing.
        layout: None where every cell is there.
    """

    tokens: Int64Array
    layout: CsrLayout | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """Draw ``num_samples`` continuations of a prompt.

    Attributes:
        prompt: int32 (N,), N at least 1.
        prompt_logprobs: Also score the prompt.
        prompt_logprobs_last_n: Score only so many of the prompt's tokens, likeliest ones included.
        topk_prompt_logprobs: Name and score so many of the likeliest tokens at each place of the
            prompt but the first.
        topk_sample_logprobs: The same at each place that is drawn.
        target_prompt_logprobs: Score these tokens in the prompt.
        prompt_alt_tokens_k: Draw so many tokens at each place of the prompt but the first.
        images: In the order of their positions in the prompt, without overlap.
        recorded: Keep prompt and tokens with the session, for training data to be compared with.
        score_only: Nobody is told what is drawn, so the prompt may fill the context.
    """

    prompt: Int32Array
    params: SamplingParams
    num_samples: int = 1
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TargetTokens | None = None
    prompt_alt_tokens_k: int = 0
    images: tuple[Image, ...] = ()
    recorded: bool = False
    score_only: bool = False


class StopReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTokens:
    """K tokens at each of N places.

    Attributes:
        tokens: int32 (N, K).
        logprobs: float32 (N, K), log softmax of the unmodified logits; NaN where there is no token,
            which is then 0.
    """

    tokens: Int32Array
    logprobs: Float32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetLogprobs:
    """The scores of ``TargetTokens``: float32 in their shape and layout, 0 where they were -1."""

    logprobs: Float32Array
    layout: CsrLayout | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledSequence:
    """One continuation.

    Attributes:
        tokens: int32 (M,), the stop token included, M at least 1.
        logprobs: float32 (M,), log softmax of the unmodified logits (temperature 1).
        topk_logprobs: The likeliest tokens at the M places, likeliest first; None if not asked
            for.
    """

    tokens: Int32Array
    logprobs: Float32Array
    stop_reason: StopReason
    topk_logprobs: ScoredTokens | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePart:
    """What was drawn for one continuation since its part before.

    Attributes:
        index: The continuation's place among the samples of its request.
        tokens: int32 (M,); the other arrays as in ``SampledSequence``.
        texts: What each token adds to the text, special tokens nothing and a character only with
            its last token; nothing at all without a tokenizer.
    """

    index: int
    tokens: Int32Array
    logprobs: Float32Array
    texts: tuple[str, ...]
    topk_logprobs: ScoredTokens | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """The continuations, in sample order.

    What was not asked for is None.

    Attributes:
        prompt_logprobs: float32 (N,) with NaN at position 0, at images and where not asked for.
        topk_prompt_logprobs: The likeliest tokens at the N places, likeliest first; none at the
            first place and where not asked for.
        target_prompt_logprobs: Of the tokens that were named.
        prompt_alt_tokens: Drawn for the N - 1 places after the first.
    """

    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: Float32Array | None = None
    topk_prompt_logprobs: ScoredTokens | None = None
    target_prompt_logprobs: TargetLogprobs | None = None
    prompt_alt_tokens: ScoredTokens | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterState:
    """An adapter's weights outside of any engine.

    Attributes:
        weights: float32 arrays by PEFT's name without its prefix, for example (R, D)
            ``model.layers.0.self_attn.q_proj.lora_A.weight`` and (E, R) ``...lora_B.weight``.
    """

    spec: LoraSpec
    weights: Mapping[str, Float32Array]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(array.nbytes for array in self.weights.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerState:
    """AdamW's memory: steps taken, first and second moments under the weights' names."""

    step: int
    exp_avg: Mapping[str, Float32Array]
    exp_avg_sq: Mapping[str, Float32Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepState:
    """What ``GradientStep`` goes by. The counters are of the run's life, not of one optimizer.

    Attributes:
        gradients: Backward passes since the last boundary.
        at_boundary: Something was done there; the next backward pass is the first of its window.
        gradient_tokens: Sum of ``num_counted`` since the last clipping or zeroing.
        steps: Optimizer steps taken.
        schedule_steps: How often the schedule moved on.
        optimizer: The optimizer that took the last step; None if there is no memory of one.
        tensors: Its memory, as ``<weight's name>.<torch's word for it>``; what it has one of for
            all weights, such as ``step``, under torch's word alone, of the shape ().
    """

    gradients: int = 0
    at_boundary: bool = False
    gradient_tokens: float = 0.0
    steps: int = 0
    schedule_steps: int = 0
    optimizer: str | None = None
    tensors: Mapping[str, Float32Array] = field(default_factory=dict[str, Float32Array])


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Everything that makes a run go on as if it had never stopped.

    Attributes:
        optimizer: None where only weights are wanted; loading then starts a fresh optimizer.
        gradients: Accumulated and not yet spent, under the weights' names; None if there are none.
        steps: None if no ``GradientStep`` was ever asked for, or only weights are wanted.
    """

    adapter: AdapterState
    optimizer: OptimizerState | None = None
    gradients: Mapping[str, Float32Array] | None = None
    steps: StepState | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """How a model that sees takes an image.

    Attributes:
        num_positions: Positions of a row that every image takes, whatever its size.
        placeholder: The token that stands at them.
    """

    num_positions: int
    placeholder: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the gateway must know about a base model to judge requests without holding it.

    Attributes:
        context_length: Longest input plus output in tokens.
        num_parameters: Parameters of the base model, a tied head counted once.
        max_rank: Largest LoRA rank this model's host accepts.
        why_not_sampled: A sentence for tenants if the model can only be trained here; else None.
        images: None if the model reads text alone.
        linear_names: Paths of all that adapters may be put on, the head last.
    """

    architecture: str
    vocab_size: int
    context_length: int
    num_parameters: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    max_rank: int
    has_tokenizer: bool
    why_not_sampled: str | None = None
    images: ImageFacts | None = None
    linear_names: tuple[str, ...] = ()
