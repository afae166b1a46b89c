"""Chat templates for tenants: messages to tokens and labels and back, on CPU workers."""

from collections.abc import Mapping, Sequence
from typing import Any

from twinkle_dask.cluster.supervisor import Supervisor
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.values import Tenant
from twinkle_dask.processor.messages import listed
from twinkle_dask.processor.templates import TemplateSpec, template_spec
from twinkle_dask.types import Json


class Templates:
    """Encodes and decodes with the tokenizer of a served model.

    Args:
        supervisor: Has the CPU workers.
        catalogue: Of the served models.
    """

    def __init__(self, supervisor: Supervisor, catalogue: Catalogue) -> None:
        self._supervisor = supervisor
        self._catalogue = catalogue

    def spec(self, base_model: str, cls: str, arguments: Mapping[str, Any]) -> TemplateSpec:
        """The template that a client has named; see ``processor.templates.template_spec``.

        Raises:
            InvalidRequest: An unknown model, class or argument; names it.
            NotSupported: Known, and not here.
        """
        return template_spec(cls, arguments, base_model=self._catalogue.get(base_model).name)

    async def encode(
        self,
        tenant: Tenant,
        base_model: str,
        spec: TemplateSpec,
        trajectories: Sequence[Json],
        *,
        add_generation_prompt: bool = False,
    ) -> list[Json]:
        """Features of trajectories, in their order, as ``processor.templates.encode`` says.

        Raises:
            InvalidRequest: What is wrong with which trajectory.
            NotSupported: The model has no tokenizer, no chat template, or one without tools.
            CapacityError: No CPU worker was free in time.
        """
        if not trajectories:
            return []
        value = {
            "source": self._catalogue.get(base_model).source,
            "spec": spec,
            "trajectories": trajectories,
            "add_generation_prompt": add_generation_prompt,
        }
        return listed(await self._call("templates.encode", tenant, value))

    async def continued(
        self,
        tenant: Tenant,
        base_model: str,
        features: Sequence[Json],
        tokens: Sequence[Sequence[int]],
    ) -> list[tuple[str, Json]]:
        """Prompts with what was sampled after them, ready to be trained on.

        Args:
            tenant: Who asks.
            base_model: Whose tokenizer is used.
            features: Of the prompts; one with messages gets the answer as another message.
            tokens: Sampled after each.

        Returns:
            The sampled text with special tokens, and the new feature, of each.

        Raises:
            InvalidRequest: A feature whose labels are not as many as its tokens.
            NotSupported: The model has no tokenizer.
        """
        if len(features) != len(tokens):
            raise InvalidRequest(f"{len(features)} features for {len(tokens)} rows of tokens.")
        if not features:
            return []
        value = {
            "source": self._catalogue.get(base_model).source,
            "features": features,
            "tokens": [list(map(int, row)) for row in tokens],
        }
        pairs = await self._call("templates.continued", tenant, value)
        return [(text, listed(feature)) for text, feature in pairs]

    async def decode(
        self,
        tenant: Tenant,
        base_model: str,
        tokens: Sequence[Sequence[int]],
        *,
        skip_special_tokens: bool = False,
    ) -> list[str]:
        """Rows of tokens as texts.

        Raises:
            InvalidRequest: A number that is no token.
            NotSupported: The model has no tokenizer.
        """
        value = {
            "source": self._catalogue.get(base_model).source,
            "tokens": [list(map(int, row)) for row in tokens],
            "skip_special_tokens": skip_special_tokens,
        }
        return list(await self._call("templates.decode", tenant, value))

    async def _call(self, function: str, tenant: Tenant, value: Json) -> Any:
        return await self._supervisor.processing.call(function, value, tenant=tenant.id)
