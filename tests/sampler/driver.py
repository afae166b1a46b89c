"""Submitting requests and taking what comes out, in a line or two."""

from collections.abc import Sequence
from itertools import count
from typing import Any, TypeVar

import numpy as np

from twinkle_dask.errors import TwinkleDaskError
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.init import init_adapter
from twinkle_dask.sampler.engine import TorchSampler
from twinkle_dask.sampler.interface import SampleWork
from twinkle_dask.types import (
    AdapterState,
    LoraSpec,
    SampledSequence,
    SampleRequest,
    SampleResult,
    SamplingParams,
    Stop,
    TenantId,
)

Outcome = SampleResult | TwinkleDaskError
E = TypeVar("E", bound=TwinkleDaskError)

VOCAB = 512
ON_AND_ON = Stop(end_of_sequence=False)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def request(
    tokens: Sequence[int],
    max_tokens: int | None = 8,
    *,
    temperature: float = 1.0,
    top_k: int = 8,
    top_p: float = 1.0,
    seed: int | None = 0,
    stop: Stop = ON_AND_ON,
    num_samples: int = 1,
    repetition_penalty: float = 1.0,
    **wanted: Any,
) -> SampleRequest:
    """A request that runs to its length; ``wanted`` are further fields of ``SampleRequest``.

    Batches of another shape round differently, by about 1e-7. With all 512 tokens in the draw, one
    random number in 20000 falls so near to a border that it shows in the tokens; hence top_k.
    """
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        repetition_penalty=repetition_penalty,
    )
    return SampleRequest(
        prompt=np.array(tokens, dtype=np.int32),
        params=params,
        num_samples=num_samples,
        **wanted,
    )


def adapter(base: BaseModel, seed: int, *, rank: int = 4, size: float = 0.05) -> AdapterState:
    """An adapter on everything whose B is not zero, so that it changes the model."""
    spec = LoraSpec(rank=rank, seed=seed)
    state = init_adapter(base.targets(spec), spec)
    rng = np.random.default_rng(seed)
    weights = {
        name: (rng.normal(0, size, array.shape) if ".lora_B." in name else array).astype(np.float32)
        for name, array in state.weights.items()
    }
    return AdapterState(spec=spec, weights=weights)


class Driver:
    def __init__(self, sampler: TorchSampler) -> None:
        self.sampler = sampler
        self.outcomes: dict[str, Outcome] = {}
        self.order: list[str] = []
        self._ids = count()

    def submit(self, asked: SampleRequest, key: str | None = None, tenant: str = "tenant") -> str:
        work_id = f"{tenant}:{next(self._ids)}"
        self.sampler.submit(SampleWork(work_id, TenantId(tenant), asked, key))
        return work_id

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            for done in self.sampler.step():
                assert done.id not in self.outcomes
                self.outcomes[done.id] = done.outcome
                self.order.append(done.id)

    def drain(self) -> dict[str, Outcome]:
        """Step until nothing is left to do; everything that ever came out."""
        steps = 0
        while self.sampler.busy:
            self.step()
            steps += 1
            assert steps < 20_000, "no progress"
        return self.outcomes

    def result(self, work_id: str) -> SampleResult:
        outcome = self.drain()[work_id]
        assert isinstance(outcome, SampleResult), outcome
        return outcome

    def sample(
        self, asked: SampleRequest, key: str | None = None, tenant: str = "tenant"
    ) -> SampledSequence:
        """The only sequence of a request that runs by itself."""
        (sequence,) = self.result(self.submit(asked, key, tenant)).sequences
        return sequence

    def failure(self, work_id: str, kind: type[E]) -> E:
        outcome = self.drain()[work_id]
        assert isinstance(outcome, kind), outcome
        return outcome


def same(a: SampledSequence, b: SampledSequence) -> bool:
    """The same tokens with the same logprobs up to the rounding of differently batched sums."""
    return a.tokens.tolist() == b.tokens.tolist() and bool(
        np.abs(a.logprobs - b.logprobs).max() < 1e-4
    )
