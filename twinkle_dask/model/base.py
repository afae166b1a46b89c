"""The frozen base model as the engines see it: hidden states, a head, and what can be adapted.

Shapes: B rows, L padded length, T positions of rows packed one after another, D hidden size,
V vocabulary.
"""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from twinkle_dask.errors import InvalidRequest, StartupError
from twinkle_dask.model import attention
from twinkle_dask.model.experts import AdaptedExperts, can_adapt
from twinkle_dask.model.linears import AdaptedLinear, Siblings
from twinkle_dask.model.lora import BatchPlan, PlanContext, add_adapters
from twinkle_dask.model.mixing import why_padded
from twinkle_dask.model.norms import replace_norms
from twinkle_dask.model.targets import Group, Target, body_targets, chosen
from twinkle_dask.model.transposed import replace_conv1d
from twinkle_dask.model.trial import try_out, try_to_see
from twinkle_dask.model.vision import Patch, Vision
from twinkle_dask.types import Image, LoraSpec, ModelFacts


@dataclass(frozen=True, slots=True, eq=False)
class HeadProjection:
    """The output head: ``logits_V = weight_VD @ hidden_D + bias_V``, and where adapters find it.

    ``weight_VD`` may be the embedding's own tensor (a tied head); it is frozen either way, and an
    adapter under ``path`` changes the logits alone.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    path: str

    def logits(self, hidden_BLD: Tensor, plan: BatchPlan) -> Tensor:
        """Float32 logits (B, L, V) with the plan's adapters, without gradients.

        Computed in the base model's dtype and converted, as Transformers and vLLM do.
        """
        with torch.no_grad():
            logits_BLV = functional.linear(hidden_BLD, self.weight_VD, self.bias_V).contiguous()
            add_adapters(hidden_BLD, logits_BLV, self.path, plan)
            return logits_BLV.float()


class BaseModel:
    """One copy of the weights, shared by all adapters and by trainer and sampler alike.

    Used by one thread. No parameter of it ever changes or requires a gradient.

    Attributes:
        facts: What the gateway knows about the model.
        tokenizer: The Hugging Face tokenizer, or None if the source has none.
        head: The output head, computed by the engines themselves.
        why_padded: Why its rows must stay apart, padded; None if they may be packed into one.
        vision: What looks at images; None for a model that reads text alone.
    """

    def __init__(
        self,
        model: nn.Module,
        facts: ModelFacts,
        tokenizer: Any | None,
        vision: Vision | None = None,
    ) -> None:
        """Freeze ``model``, wrap its linears in place, and try it on two short rows.

        Args:
            model: A ``transformers`` causal language model on its device, in its dtype.
            facts: Told to whoever asks, with the linears' names; not checked against the model.
            tokenizer: Kept for others; not used here.
            vision: Of the model, if it sees; adapters are for its decoder alone.

        Raises:
            StartupError: The architecture computes something that adapters or heads here do not.
        """
        self.tokenizer = tokenizer
        self._model = model.eval().requires_grad_(False)
        # Typed Any: transformers gives its models' attributes no types.
        hugging_face = cast("Any", model)
        self.vision = vision
        if vision is None:
            self._body: Any = hugging_face.base_model
            path = f"{hugging_face.base_model_prefix}."
            self.why_padded = why_padded(model, self._body)
        else:
            self._body, path = vision.decoder, vision.decoder_path
            self.why_padded = why_padded(self._body, self._body)
        replace_conv1d(model)
        self.head = _head(hugging_face)
        self.device: torch.device = self.head.weight_VD.device
        self.dtype: torch.dtype = self.head.weight_VD.dtype
        self._context = PlanContext(self.device)
        vocab_size, hidden_size = self.head.weight_VD.shape
        self._targets = (
            *body_targets(self._body, path),
            Target(
                module_path=self.head.path,
                in_features=hidden_size,
                out_features=vocab_size,
                group=Group.UNEMBED,
            ),
        )
        paths = tuple(target.module_path for target in self._targets)
        self.facts = replace(facts, linear_names=paths)
        self._experts: dict[str, AdaptedExperts] = {}
        self._wrapped = self._wrap()
        if self.device.type == "cpu":
            replace_norms(model)
        self._checkpointing = False
        self._layers = self._checkpointing_layers()
        experts = {path: experts.module for path, experts in self._experts.items()}
        adapted: dict[str, nn.Module] = {**self._wrapped, **experts}
        self._join_siblings(try_out(self, model, adapted, flat=bool(experts)))
        if vision is not None:
            try_to_see(self, model, vision)

    @property
    def mixes_only_by_attention(self) -> bool:
        """Whether tokens of a row meet in softmax attention and nowhere else."""
        return self.why_padded is None

    def parameters(self) -> list[nn.Parameter]:
        """The frozen weights."""
        return list(self._model.parameters())

    def targets(self, spec: LoraSpec) -> tuple[Target, ...]:
        """What an adapter of this shape adapts, the head last.

        Raises:
            InvalidRequest: It wants to adapt what this model does not have.
        """
        return chosen(self._targets, spec)

    def families(self, spec: LoraSpec) -> tuple[tuple[Target, ...], ...]:
        """The same, those together that read one input: their As should be neighbours."""
        families: dict[object, list[Target]] = {}
        for target in self.targets(spec):
            linear = self._wrapped.get(target.module_path)
            key = target.module_path if linear is None else linear.siblings
            families.setdefault(key, []).append(target)
        return tuple(tuple(family) for family in families.values())

    def hidden(
        self,
        tokens_BL: Tensor,
        plan: BatchPlan,
        *,
        positions_BL: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any | None = None,  # a transformers Cache
        patches: Sequence[Patch] = (),
    ) -> Tensor:
        """Hidden states (B, L, D) after the final norm, in the base model's dtype.

        With gradients enabled and a plan that learns, the result takes a ``backward``, which adds
        to the segments' buffers; otherwise nothing is kept. Rows are causal: padding on the right
        changes nothing before it.

        Args:
            tokens_BL: int64 token ids.
            plan: Which rows wear which adapter, in this pass only.
            positions_BL: int64 positions; by default they go on from the cache's length.
            attention_mask: As Transformers takes it; None is causal over everything.
            cache: Read and extended in place if given.
            patches: Images that stand where some of the tokens are.
        """
        if self._experts:  # they, and what shares their layer, see tokens without their rows
            plan = plan.flattened(*tokens_BL.shape)
        embedded_BLD = self._embedded(tokens_BL, patches) if patches else None
        with self._context.use(plan):
            output = self._body(
                input_ids=tokens_BL if embedded_BLD is None else None,
                inputs_embeds=embedded_BLD,
                attention_mask=attention_mask,
                position_ids=positions_BL,
                past_key_values=cache,
                use_cache=cache is not None,
                return_dict=True,
            )
        hidden_BLD: Tensor = output.last_hidden_state
        if plan.learns and torch.is_grad_enabled() and not hidden_BLD.requires_grad:
            # Only the head is adapted: backward through the body is allowed and does nothing.
            hidden_BLD.requires_grad_()
        return hidden_BLD

    def _embedded(self, tokens_BL: Tensor, patches: Sequence[Patch]) -> Tensor:
        with torch.no_grad():
            embedded_BLD: Tensor = self._body.get_input_embeddings()(tokens_BL)
            flat_TD = embedded_BLD.flatten(0, 1)
            for patch in patches:
                flat_TD[patch.place : patch.place + len(patch.embedded_PD)] = patch.embedded_PD
            return embedded_BLD

    def hidden_packed(
        self,
        tokens_T: Tensor,
        rows: attention.Rows,
        plan: BatchPlan,
        patches: Sequence[Patch] = (),
    ) -> Tensor:
        """As ``hidden``, of rows that lie one after another in one sequence.

        Args:
            tokens_T: int64 token ids.
            rows: Where each row begins; rows do not see each other.
            plan: Over positions.
            patches: Images that stand where some of the tokens are.

        Returns:
            (T, D).
        """
        positions_T = torch.arange(len(tokens_T), device=self.device)
        lengths = (rows.bounds[1:] - rows.bounds[:-1]).long()
        positions_T -= rows.bounds[:-1].long().repeat_interleave(lengths)
        with attention.packed(rows):
            return self.hidden(
                tokens_T[None], plan, positions_BL=positions_T[None], patches=patches
            )[0]

    def look(self, rows: Sequence[Sequence[Image]], owner: str = "") -> dict[bytes, Tensor]:
        """What the images of some rows look like to the decoder, by their encoded bytes.

        Args:
            rows: Images of each row.
            owner: The tenant whose rows these are; what is kept for one is not used for another.

        Raises:
            InvalidRequest: An image is damaged, or the model sees none.
        """
        if not any(rows):
            return {}
        if self.vision is None:
            raise InvalidRequest("This model reads text alone, and there are images.")
        return self.vision.of_rows(rows, owner)

    @property
    def can_checkpoint(self) -> bool:
        """Whether ``checkpointing`` has layers to work on."""
        return bool(self._layers)

    @contextmanager
    def checkpointing(self) -> Generator[None]:
        """Passes keep the input of each layer only, and compute the rest again in backward.

        For all threads. Backward may run outside, in any thread.
        """
        self._checkpointing = True
        try:
            yield
        finally:
            self._checkpointing = False

    def _maybe_twice(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """A layer's forward; while ``checkpointing``, so that backward computes it again."""
        if not self._checkpointing:
            return forward(*args, **kwargs)
        # On a GPU, backward has a thread of its own, which must find this thread's plan.
        plan, rows = self._context.plan, attention.current()

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self._again(plan, rows)

        return cast(Any, checkpoint).checkpoint(
            partial(forward, **kwargs),
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is drawn: the model is in eval mode
            context_fn=contexts,
        )

    @contextmanager
    def _again(self, plan: BatchPlan, rows: attention.Rows | None) -> Generator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._context.use(plan))
            if rows is not None:
                stack.enter_context(attention.packed(rows))
            yield

    def _checkpointing_layers(self) -> list[Any]:
        layers: list[Any] = [
            module
            for module in self._body.modules()
            if isinstance(module, GradientCheckpointingLayer)
        ]
        # Not by transformers' own switch, which works in training mode only, where some layers also
        # drop activations out.
        for layer in layers:
            layer.forward = partial(self._maybe_twice, layer.forward)
        return layers

    def _wrap(self) -> dict[str, AdaptedLinear]:
        wrapped: dict[str, AdaptedLinear] = {}
        for target in self._targets:
            if target.group is Group.UNEMBED:
                continue  # engines compute the head themselves, from its weight
            parent_path, _, name = target.module_path.rpartition(".")
            parent = self._model.get_submodule(parent_path)
            if can_adapt(parent):
                if parent_path not in self._experts:
                    self._experts[parent_path] = AdaptedExperts(parent, parent_path, self._context)
                continue
            linear = cast("nn.Linear", parent.get_submodule(name))
            wrapped[target.module_path] = AdaptedLinear(linear, target.module_path, self._context)
            setattr(parent, name, wrapped[target.module_path])
        return wrapped

    def _join_siblings(self, calls: list[tuple[AdaptedLinear, Tensor]]) -> None:
        """Let linears of one group that were called with one and the same tensor be one node."""
        group_of = {target.module_path: target.group for target in self._targets}
        families: dict[tuple[int, Group], list[AdaptedLinear]] = {}
        for linear, x_BLD in calls:  # the tensors are alive, so their ids are their own
            families.setdefault((id(x_BLD), group_of[linear.module_path]), []).append(linear)
        for linears in families.values():
            if len(linears) > 1 and len(set(linears)) == len(linears):
                siblings = Siblings(linears)
                for linear in linears:
                    linear.siblings = siblings


def _head(model: Any) -> HeadProjection:
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), None)
    if path is None or type(head) is not nn.Linear:
        raise StartupError(
            "This architecture is not supported: its output head is no torch.nn.Linear but "
            f"{type(head).__name__}."
        )
    return HeadProjection(weight_VD=head.weight, bias_V=head.bias, path=path)
