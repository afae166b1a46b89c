"""The life of a request: its samples as sequences, and prefills that they wait for."""

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from twinkle_dask.model.lora import LoraTensors
from twinkle_dask.sampler.drawing import Uniforms
from twinkle_dask.sampler.fairness import Account
from twinkle_dask.sampler.interface import SampleWork
from twinkle_dask.sampler.kv_cache import SlotCache
from twinkle_dask.sampler.scoring import PromptScores
from twinkle_dask.sampler.stopping import StopRule
from twinkle_dask.types import (
    Float32Array,
    Int32Array,
    SampledSequence,
    SampleResult,
    SamplingParams,
    ScoredTokens,
    StopReason,
)


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request.

    Attributes:
        index: Its place among the request's samples.
        tokens: Generated so far. The last one is in no cache yet.
        top: The likeliest tokens at each place; empty if not asked for.
    """

    request: "Request"
    index: int
    uniforms: Uniforms
    stop: StopRule
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    top: list[tuple[Int32Array, Float32Array]] = field(
        default_factory=list[tuple[Int32Array, Float32Array]]
    )
    stop_reason: StopReason | None = None

    @property
    def params(self) -> SamplingParams:
        """How to draw."""
        return self.request.work.request.params

    @property
    def adapter(self) -> LoraTensors | None:
        """What it wears."""
        return self.request.adapter

    @property
    def age(self) -> tuple[int, int]:
        """Larger is younger."""
        return self.request.age, self.index

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values a running sequence keeps: all but the last."""
        return len(self.request.prompt) + len(self.tokens) - 1

    def add(
        self, token: int, logprob: float, top: tuple[Int32Array, Float32Array] | None = None
    ) -> bool:
        """Append a token; whether the sequence goes on."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if top is not None:
            self.top.append(top)
        self.stop_reason = self.stop.after(token)
        return self.stop_reason is None

    def sampled(self) -> SampledSequence:
        """The finished sequence as a value."""
        if self.stop_reason is None:
            raise ValueError("the sequence has not ended")
        return SampledSequence(
            tokens=np.array(self.tokens, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            stop_reason=self.stop_reason,
            topk_logprobs=self._top() if self.top else None,
        )

    def _top(self) -> ScoredTokens:
        return ScoredTokens(
            tokens=np.stack([tokens for tokens, _ in self.top]),
            logprobs=np.stack([logprobs for _, logprobs in self.top]),
        )


@dataclass(slots=True, eq=False)
class Request:
    """A submitted request.

    Attributes:
        age: Larger is younger.
        scores: Filled in by the prefill; None if nothing about the prompt is asked for.
        unfinished: How many of the sequences go on.
    """

    work: SampleWork
    age: int
    account: "JobAccount"
    adapter: LoraTensors | None
    prompt: list[int]
    scores: PromptScores | None
    sequences: list[Sequence] = field(default_factory=list[Sequence])
    unfinished: int = 0
    _prompt_mask_V: Tensor | None = field(default=None, init=False)

    def prompt_mask_V(self, vocab_size: int, device: torch.device) -> Tensor:
        """Which tokens occur in the prompt; made when it is first asked for."""
        if self._prompt_mask_V is None:
            self._prompt_mask_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._prompt_mask_V[self.prompt] = True
        return self._prompt_mask_V

    def result(self) -> SampleResult:
        """The finished request as a value."""
        sequences = tuple(sequence.sampled() for sequence in self.sequences)
        if self.scores is None:
            return SampleResult(sequences=sequences)
        return self.scores.result(sequences)


@dataclass(slots=True, eq=False)
class Job:
    """A prefill: tokens whose keys and values some sequences of one request need to go on.

    For a fresh request that is its prompt, shared by all samples; for a sequence that lost its
    slot it is the prompt and what it has generated, so it goes on where it was.

    Attributes:
        sequences: Those that have no slot yet.
        cache: Where the prefill stands, with its row; None before it has begun.
        done: How many of the tokens are in the cache.
        scores: The request's, where these are its prompt's first tokens to be read; else None.
        alone: It failed in company, so it must run by itself to show whose fault that was.
    """

    request: Request
    tokens: list[int]
    sequences: list[Sequence]
    cache: SlotCache | None = None
    row: int = 0
    done: int = 0
    scores: PromptScores | None = None
    alone: bool = False

    @property
    def needs_row(self) -> bool:
        """Whether any sequence goes on after the token that the prefill gives."""
        return any(sequence.stop.tokens_left > 1 for sequence in self.sequences)


JobAccount: TypeAlias = Account[Job]
