"""About one run: settings, gradients, steps, checkpoints."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twinkle_dask_client.calls.base import Call
from twinkle_dask_client.inputs import Example, Lora, plain
from twinkle_dask_client.models import Nothing
from twinkle_dask_client.results import AdapterMade, Forwarded, Result, Saved


@dataclass(frozen=True, slots=True)
class RunCalls:
    """The calls of the run ``adapter`` of a base model."""

    base_model: str
    adapter: str

    def _call(
        self,
        operation: str,
        reply: Any,
        body: Mapping[str, Any],
        *,
        repeatable: bool = False,
        doing: str = "",
    ) -> Call[Any]:
        return Call(
            method="POST",
            path=f"model/{self.base_model}/twinkle/{operation}",
            reply=reply,
            body=plain({"adapter_name": self.adapter, **body}),
            repeatable=repeatable,
            doing=doing,
        )

    def add(self, lora: Lora, settings: Mapping[str, Any]) -> Call[AdapterMade]:
        """Make the run."""
        body = {"config": json.dumps(lora.peft()), **settings}
        return self._call("add_adapter_to_model", AdapterMade, body, doing="making the run")

    def set(self, what: str, field: str, name: str, settings: Mapping[str, Any]) -> Call[Nothing]:
        """Choose a template, loss, optimizer or schedule by its name."""
        body = {**settings, field: name}
        return self._call(f"set_{what}", Nothing, body, repeatable=True)

    def add_metric(self, name: str, training: bool | None) -> Call[Nothing]:
        """Have something measured."""
        body = {"metric_cls": name, "is_training": training}
        return self._call("add_metric", Nothing, body)

    def forward(
        self, examples: Sequence[Example], arguments: Mapping[str, Any]
    ) -> Call[Result[Forwarded]]:
        """Logprobs; nothing is learned."""
        body = {**arguments, "inputs": list(examples)}
        return self._call(
            "forward_only", Result[Forwarded], body, repeatable=True, doing="forward pass"
        )

    def forward_backward(
        self, examples: Sequence[Example], arguments: Mapping[str, Any]
    ) -> Call[Result[Forwarded]]:
        """Add a gradient."""
        body = {**arguments, "inputs": list(examples)}
        return self._call("forward_backward", Result[Forwarded], body, doing="training pass")

    def step(self, max_grad_norm: float) -> Call[Nothing]:
        """Clip, step, forget the gradient, move the schedule."""
        return self._call("clip_grad_and_step", Nothing, {"max_grad_norm": max_grad_norm})

    def metrics(self, training: bool) -> Call[Result[dict[str, Any]]]:
        """What was measured since it was asked last."""
        return self._call("calculate_metric", Result[dict[str, Any]], {"is_training": training})

    def configuration(self) -> Call[Result[str]]:
        """Everything that was set, in words."""
        return self._call("get_train_configs", Result[str], {}, repeatable=True)

    def save(self, name: str | None, *, optimizer: bool, sampler: bool) -> Call[Saved]:
        """Save under a name, which replaces what had it; without one the service finds one."""
        body = {"name": name, "save_optimizer": optimizer, "is_sampler": sampler}
        return self._call(
            "save", Saved, body, repeatable=name is not None and not sampler, doing="saving"
        )

    def load(self, address: str, *, optimizer: bool) -> Call[Nothing]:
        """Go on where a checkpoint stands."""
        body = {"name": address, "load_optimizer": optimizer}
        return self._call("load", Nothing, body, repeatable=True, doing="loading")
