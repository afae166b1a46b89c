"""Drawing samples from a base model, or from what was trained on it."""

from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any

from twinkle_dask_client.calls.sampling import SamplerCalls
from twinkle_dask_client.door import AsyncDoor, Door
from twinkle_dask_client.errors import ServiceFault
from twinkle_dask_client.inputs import Example, SamplingParams
from twinkle_dask_client.results import Delta, Sample

_USUAL = SamplingParams()


class Sampler:
    """Made by ``Service.sampler``."""

    def __init__(self, door: Door, base_model: str, checkpoint: str | None) -> None:
        self._door = door
        self._calls = SamplerCalls(base_model, checkpoint)

    def set_template(self, name: str = "Template", **settings: Any) -> None:
        """How conversations become tokens, in this session."""
        self._door.ask_in_session(self._calls.set_template(name, settings))

    def sample(
        self,
        prompts: Sequence[Example],
        params: SamplingParams = _USUAL,
        *,
        num_samples: int = 1,
    ) -> tuple[Sample, ...]:
        """Continuations of each prompt, in their order."""
        call = self._calls.sample(prompts, params, num_samples)
        return self._door.ask_in_session(call).samples

    def stream(self, prompt: Example, params: SamplingParams = _USUAL) -> Generator[str]:
        """One continuation's text, piece by piece as it is drawn."""
        with self._door.lines(self._calls.stream(prompt, params)) as lines:
            for line in lines:
                yield _text(line)


class AsyncSampler:
    """``Sampler`` with ``await``; the arguments mean the same."""

    def __init__(self, door: AsyncDoor, base_model: str, checkpoint: str | None) -> None:
        self._door = door
        self._calls = SamplerCalls(base_model, checkpoint)

    async def set_template(self, name: str = "Template", **settings: Any) -> None:
        """See ``Sampler.set_template``."""
        await self._door.ask_in_session(self._calls.set_template(name, settings))

    async def sample(
        self,
        prompts: Sequence[Example],
        params: SamplingParams = _USUAL,
        *,
        num_samples: int = 1,
    ) -> tuple[Sample, ...]:
        """See ``Sampler.sample``."""
        call = self._calls.sample(prompts, params, num_samples)
        return (await self._door.ask_in_session(call)).samples

    async def stream(self, prompt: Example, params: SamplingParams = _USUAL) -> AsyncGenerator[str]:
        """See ``Sampler.stream``."""
        async with self._door.lines(self._calls.stream(prompt, params)) as lines:
            async for line in lines:
                yield _text(line)


def _text(line: str) -> str:
    delta = Delta.model_validate_json(line)
    if delta.error is not None:
        raise ServiceFault(delta.error)
    return delta.delta
