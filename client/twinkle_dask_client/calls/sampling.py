"""About a base model's sampler."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twinkle_dask_client.calls.base import Call
from twinkle_dask_client.inputs import Example, SamplingParams, plain
from twinkle_dask_client.models import Nothing
from twinkle_dask_client.results import Samples


@dataclass(frozen=True, slots=True)
class SamplerCalls:
    """The calls of one base model's sampler; ``checkpoint`` names the adapter, if any."""

    base_model: str
    checkpoint: str | None = None

    def set_template(self, name: str, settings: Mapping[str, Any]) -> Call[Nothing]:
        """How conversations become tokens in this session."""
        return Call(
            method="POST",
            path=f"sampler/{self.base_model}/twinkle/set_template",
            reply=Nothing,
            body=plain({**settings, "template_cls": name}),
            repeatable=True,
        )

    def sample(
        self, prompts: Sequence[Example], params: SamplingParams, num_samples: int
    ) -> Call[Samples]:
        """Draw; without a seed a repeat draws something else, which is as good."""
        return Call(
            method="POST",
            path=f"sampler/{self.base_model}/twinkle/sample",
            reply=Samples,
            body=self.body(prompts, params) | {"num_samples": num_samples},
            repeatable=True,
            doing="sampling",
        )

    def stream(self, prompt: Example, params: SamplingParams) -> Call[Nothing]:
        """The same for one prompt, piece by piece; each line of the answer is a ``Delta``."""
        return Call(
            method="POST",
            path=f"sampler/{self.base_model}/twinkle/sample_stream",
            reply=Nothing,
            body=self.body([prompt], params),
        )

    def body(self, prompts: Sequence[Example], params: SamplingParams) -> dict[str, Any]:
        """What both have in common."""
        body: dict[str, Any] = {"inputs": plain(list(prompts)), "sampling_params": params.wire()}
        if self.checkpoint is not None:
            body["adapter_uri"] = self.checkpoint
        return body
