"""The frozen base model as the engines see it: hidden states, a head, and what can be adapted.

Shapes: B rows, L padded length, T positions of rows packed one after another, D hidden size,
V vocabulary.
"""

from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from twinkle_dask.errors import StartupError
from twinkle_dask.model import attention
from twinkle_dask.model.experts import AdaptedExperts, can_adapt
from twinkle_dask.model.linears import AdaptedLinear, Siblings
from twinkle_dask.model.lora import BatchPlan, PlanContext, add_adapters
from twinkle_dask.model.mixing import why_padded
from twinkle_dask.model.norms import replace_norms
from twinkle_dask.model.targets import Group, Target, body_targets, chosen
from twinkle_dask.model.transposed import replace_conv1d
from twinkle_dask.types import LoraSpec, ModelFacts


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
    """

    def __init__(self, model: nn.Module, facts: ModelFacts, tokenizer: Any | None) -> None:
        """Freeze ``model``, wrap its linears in place, and try it on two short rows.

        Args:
            model: A ``transformers`` causal language model on its device, in its dtype.
            facts: Told to whoever asks; not checked against the model.
            tokenizer: Kept for others; not used here.

        Raises:
            StartupError: The architecture computes something that adapters or heads here do not.
        """
        self.facts = facts
        self.tokenizer = tokenizer
        self._model = model.eval().requires_grad_(False)
        # Typed Any: transformers gives its models' attributes no types.
        hugging_face = cast("Any", model)
        self._body: Any = hugging_face.base_model
        self.why_padded = why_padded(model, self._body)
        replace_conv1d(model)
        self.head = _head(hugging_face)
        self.device: torch.device = self.head.weight_VD.device
        self.dtype: torch.dtype = self.head.weight_VD.dtype
        self._context = PlanContext(self.device)
        vocab_size, hidden_size = self.head.weight_VD.shape
        self._targets = (
            *body_targets(self._body, f"{hugging_face.base_model_prefix}."),
            Target(
                module_path=self.head.path,
                in_features=hidden_size,
                out_features=vocab_size,
                group=Group.UNEMBED,
            ),
        )
        self._experts: dict[str, AdaptedExperts] = {}
        self._wrapped = self._wrap()
        if self.device.type == "cpu":
            replace_norms(model)
        self._checkpointing = False
        self._layers = self._checkpointing_layers()
        self._try_out()

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
        """
        if self._experts:  # they, and what shares their layer, see tokens without their rows
            plan = plan.flattened(*tokens_BL.shape)
        with self._context.use(plan):
            output = self._body(
                input_ids=tokens_BL,
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

    def hidden_packed(self, tokens_T: Tensor, rows: attention.Rows, plan: BatchPlan) -> Tensor:
        """As ``hidden``, of rows that lie one after another in one sequence.

        Args:
            tokens_T: int64 token ids.
            rows: Where each row begins; rows do not see each other.
            plan: Over positions.

        Returns:
            (T, D).
        """
        positions_T = torch.arange(len(tokens_T), device=self.device)
        lengths = (rows.bounds[1:] - rows.bounds[:-1]).long()
        positions_T -= rows.bounds[:-1].long().repeat_interleave(lengths)
        with attention.packed(rows):
            return self.hidden(tokens_T[None], plan, positions_BL=positions_T[None])[0]

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
            for module in self._model.modules()
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

    def _try_out(self) -> None:
        """Run two rows once and refuse a model that breaks what the engines rely on.

        That is: every wrapped linear is really called, with rows first; attention is causal; and
        the logits are the head's product alone. Takes milliseconds, and catches architectures that
        no list of names would.
        """
        calls: list[tuple[AdaptedLinear, Tensor]] = []
        called: list[nn.Module] = []
        experts = {path: experts.module for path, experts in self._experts.items()}
        adapted: dict[str, nn.Module] = {**self._wrapped, **experts}
        tokens_BL = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=self.device)

        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            shape = tuple(size for size in inputs[0].shape[:-1] if size != 1)
            # Beside experts rows may be flattened, since plans are over positions then.
            if shape == tokens_BL.shape or (experts and shape == (tokens_BL.numel(),)):
                called.append(module)
                if isinstance(module, AdaptedLinear):
                    calls.append((module, inputs[0]))

        hooks = [part.register_forward_pre_hook(note) for part in adapted.values()]
        try:
            with torch.no_grad():
                hidden_BLD = self.hidden(tokens_BL, BatchPlan())
                in_body, called_in_body = list(calls), set(called)
                expected_BLV: Tensor = self._model(input_ids=tokens_BL, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        if silent := [path for path, part in adapted.items() if part not in called_in_body]:
            raise StartupError(
                "This architecture is not supported: it does not call its linear layers on rows of "
                f"tokens ({', '.join(silent[:4])}), so adapters on them would have no effect."
            )
        if not _close(hidden_BLD[0, :-1], hidden_BLD[1, :-1]):
            raise StartupError(
                "This model is not causal: what a token sees depends on the tokens after it."
            )
        if not _close(self.head.logits(hidden_BLD, BatchPlan()), expected_BLV.float()):
            raise StartupError(
                "This architecture is not supported yet: its logits are not the plain product of "
                "the last hidden state and the output head."
            )
        self._join_siblings(in_body)

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


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to bfloat16 noise, measured against the largest value."""
    return bool((a - b).abs().max() <= 0.02 * b.abs().max())


def _head(model: Any) -> HeadProjection:
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), None)
    if path is None or type(head) is not nn.Linear:
        raise StartupError(
            "This architecture is not supported: its output head is no torch.nn.Linear but "
            f"{type(head).__name__}."
        )
    return HeadProjection(weight_VD=head.weight, bias_V=head.bias, path=path)
