"""Bodies of samplers."""

from typing import Annotated, Any

from pydantic import Field, StrictInt

from twinkle_dask_gateway.twinkle.wire.base import Body, OpenBody

#: Empty, or left out by clients that name no adapter.
MaybeAdapter = Annotated[str, Field(max_length=256)] | None


class OpenSampler(Body):
    """Ask whether a base model can be sampled; whatever else is sent is no one's concern."""


class DrawSamples(OpenBody):
    """Draw continuations of every element of ``inputs``."""

    inputs: Any
    sampling_params: dict[str, Any] | None = None
    adapter_name: MaybeAdapter = None
    adapter_uri: Annotated[str, Field(max_length=4096)] | None = None
    num_samples: StrictInt | None = None


class SamplerTemplate(OpenBody):
    """Say how trajectories become tokens; more settings may stand beside."""

    template_cls: Annotated[str, Field(min_length=1, max_length=256)]
    adapter_name: MaybeAdapter = None


class SamplerAdapter(OpenBody):
    """Let a name stand for weights."""

    adapter_name: Annotated[str, Field(min_length=1, max_length=256)]
    config: dict[str, Any] | str | None = None
    adapter_uri: Annotated[str, Field(max_length=4096)] | None = None


class SamplerPatch(OpenBody):
    """Change the sampler's code, which is not done."""

    patch_cls: Any = None
