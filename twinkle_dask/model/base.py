"""The frozen base model as the engines see it: hidden states, a head, and what can be adapted.

Shapes: B rows, L padded length, D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from twinkle_dask.errors import StartupError
from twinkle_dask.model.lora import AdaptedLinear, BatchPlan, PlanContext, add_adapters
from twinkle_dask.model.targets import Group, Target, body_targets, chosen
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
        self._wrapped = self._wrap()
        self._try_out()

    def targets(self, spec: LoraSpec) -> tuple[Target, ...]:
        """The linears that an adapter of this shape adapts, the head last."""
        return chosen(self._targets, spec)

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

    def _wrap(self) -> dict[str, AdaptedLinear]:
        wrapped: dict[str, AdaptedLinear] = {}
        for target in self._targets:
            if target.group is Group.UNEMBED:
                continue  # engines compute the head themselves, from its weight
            parent_path, _, name = target.module_path.rpartition(".")
            parent = self._model.get_submodule(parent_path)
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
        called: set[str] = set()

        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].dim() == 3 and inputs[0].shape[0] == 2:
                called.update(path for path, linear in self._wrapped.items() if linear is module)

        hooks = [linear.register_forward_pre_hook(note) for linear in self._wrapped.values()]
        tokens_BL = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=self.device)
        try:
            with torch.no_grad():
                hidden_BLD = self.hidden(tokens_BL, BatchPlan())
                expected_BLV: Tensor = self._model(input_ids=tokens_BL, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        if silent := sorted(self._wrapped.keys() - called):
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
