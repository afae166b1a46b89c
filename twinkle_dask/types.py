"""The values that everything else passes around. Immutable; numpy but no torch, no wire.

Shapes: N tokens of one datum, K targets per position, R rank, D in, E out.
"""

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
    """The shape of one adapter; the effective weight is ``W + (alpha / rank) * B_ER @ A_RD``.

    Attributes:
        rank: Inner dimension R, at least 1.
        seed: Seeds the initial A; the same seed gives the same adapter on any machine.
        alpha: Numerator of the scale.
        train_attn: Adapt the projections of attention (and linear attention) layers.
        train_mlp: Adapt the projections of feed-forward layers.
        train_unembed: Adapt the output head.
    """

    rank: int
    seed: int
    alpha: float = 32.0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


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
class Datum:
    """One example.

    Attributes:
        tokens: Model input, int32 (N,).
        target_tokens: int64 (N,) or (N, K); ``target_tokens[i]`` is predicted at position i.
        loss_inputs: float32 arrays by name, each of the shape of ``target_tokens``.
    """

    tokens: Int32Array
    target_tokens: Int64Array
    loss_inputs: Mapping[str, Float32Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackward:
    """Add the gradient of a summed loss to a run, or only evaluate it (``backward=False``)."""

    data: tuple[Datum, ...]
    loss: LossSpec
    backward: bool = True

    @property
    def num_tokens(self) -> int:
        """Input tokens over all data."""
        return sum(len(d.tokens) for d in self.data)


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
class ForwardBackwardResult:
    """What a forward or forward_backward gives back.

    Attributes:
        logprobs: Per datum, float32 of the shape of its ``target_tokens``: log softmax of the
            unmodified logits at the targets, at zero-weight positions too.
        metrics: Finite numbers under names of the form ``x:suffix`` (the suffix says how chunks
            combine); ``loss:sum`` is always there. ``docs/losses.md`` lists them.
    """

    logprobs: tuple[Float32Array, ...]
    metrics: Mapping[str, float]


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
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    stop: Stop = Stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """Draw ``num_samples`` continuations of a prompt.

    Attributes:
        prompt: int32 (N,), N at least 1.
        prompt_logprobs: Also score the prompt.
    """

    prompt: Int32Array
    params: SamplingParams
    num_samples: int = 1
    prompt_logprobs: bool = False


class StopReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledSequence:
    """One continuation.

    Attributes:
        tokens: int32 (M,), the stop token included, M at least 1.
        logprobs: float32 (M,), log softmax of the unmodified logits (temperature 1).
    """

    tokens: Int32Array
    logprobs: Float32Array
    stop_reason: StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """The continuations, in sample order.

    Attributes:
        prompt_logprobs: float32 (N,) with NaN at position 0, or None if not asked for.
    """

    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: Float32Array | None = None


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
class RunState:
    """Everything that makes a run go on as if it had never stopped.

    Attributes:
        optimizer: None where only weights are wanted; loading then starts a fresh optimizer.
        gradients: Accumulated and not yet spent, under the weights' names; None if there are none.
    """

    adapter: AdapterState
    optimizer: OptimizerState | None = None
    gradients: Mapping[str, Float32Array] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the gateway must know about a base model to judge requests without holding it.

    Attributes:
        context_length: Longest input plus output in tokens.
        num_parameters: Parameters of the base model, a tied head counted once.
        max_rank: Largest LoRA rank this model's host accepts.
        why_not_sampled: A sentence for tenants if the model can only be trained here; else None.
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
