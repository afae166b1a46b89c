"""A run in training. Each method is one request; its twin awaits the same one."""

from collections.abc import Sequence
from typing import Any

from twinkle_dask_client.calls.training import RunCalls
from twinkle_dask_client.door import AsyncDoor, Door
from twinkle_dask_client.inputs import Example, Lora
from twinkle_dask_client.results import Forwarded, Saved


class Run:
    """One adapter with its optimizer state, made by ``Service.create_run``.

    Attributes:
        id: The service's name for it; the same in every list.
        name: Its name in this session.
    """

    def __init__(self, door: Door, base_model: str, name: str) -> None:
        self._ask = door.ask_in_session
        self._calls = RunCalls(base_model, name)
        self.name = name
        self.base_model = base_model
        self.id = ""

    def create(self, lora: Lora, **settings: Any) -> "Run":
        """Make it on the service; ``Service.create_run`` does this."""
        self.id = self._ask(self._calls.add(lora, settings)).adapter_name
        return self

    def set_template(self, name: str = "Template", **settings: Any) -> None:
        """How conversations become tokens: ``max_length``, ``truncation_strategy`` and others."""
        self._ask(self._calls.set("template", "template_cls", name, settings))

    def set_loss(self, name: str = "CrossEntropyLoss", **settings: Any) -> None:
        """What is minimised, by class name."""
        self._ask(self._calls.set("loss", "loss_cls", name, settings))

    def set_optimizer(self, name: str = "AdamW", **settings: Any) -> None:
        """What ``step`` uses, by its class name in ``torch.optim``, with its arguments."""
        self._ask(self._calls.set("optimizer", "optimizer_cls", name, settings))

    def set_lr_scheduler(self, name: str, **settings: Any) -> None:
        """What the learning rate follows, by class name, with its arguments."""
        self._ask(self._calls.set("lr_scheduler", "scheduler_cls", name, settings))

    def add_metric(self, name: str, *, training: bool | None = None) -> None:
        """Have something measured besides loss, accuracy and speed; None for both modes."""
        self._ask(self._calls.add_metric(name, training))

    def forward(self, examples: Sequence[Example], **arguments: Any) -> Forwarded:
        """Logprobs of the labels; nothing is learned.

        ``disable_lora=True`` asks the base model, ``temperature`` divides the logits.
        """
        return self._ask(self._calls.forward(examples, arguments)).result

    def forward_backward(self, examples: Sequence[Example], **arguments: Any) -> Forwarded:
        """Add a batch's gradient. What the loss needs besides (``advantages``) goes along.

        Never sent twice: after a broken connection nobody knows whether it was counted.
        """
        return self._ask(self._calls.forward_backward(examples, arguments)).result

    def step(self, *, max_grad_norm: float = 1.0) -> None:
        """Clip the gradient, take an optimizer step, forget the gradient, move the schedule on."""
        self._ask(self._calls.step(max_grad_norm))

    def metrics(self, *, training: bool = True) -> dict[str, Any]:
        """What was measured since this was asked last."""
        return self._ask(self._calls.metrics(training)).result

    def configuration(self) -> str:
        """Everything that was set, for a person to read."""
        return self._ask(self._calls.configuration()).result

    def save(self, name: str | None = None, *, optimizer: bool = True) -> Saved:
        """Save to go on from, under a name; an earlier checkpoint of that name is replaced."""
        return self._ask(self._calls.save(name, optimizer=optimizer, sampler=False))

    def save_for_sampler(self, name: str | None = None) -> Saved:
        """Save to be sampled; ``Service.sampler(checkpoint=...)`` takes the address."""
        return self._ask(self._calls.save(name, optimizer=False, sampler=True))

    def load(self, address: str, *, optimizer: bool = True) -> None:
        """Go on where a checkpoint stands."""
        self._ask(self._calls.load(address, optimizer=optimizer))

    def __repr__(self) -> str:
        return f"Run({self.name!r}, base_model={self.base_model!r})"


class AsyncRun:
    """``Run`` with ``await``; the arguments mean the same."""

    def __init__(self, door: AsyncDoor, base_model: str, name: str) -> None:
        self._ask = door.ask_in_session
        self._calls = RunCalls(base_model, name)
        self.name = name
        self.base_model = base_model
        self.id = ""

    async def create(self, lora: Lora, **settings: Any) -> "AsyncRun":
        """See ``Run.create``."""
        self.id = (await self._ask(self._calls.add(lora, settings))).adapter_name
        return self

    async def set_template(self, name: str = "Template", **settings: Any) -> None:
        """See ``Run.set_template``."""
        await self._ask(self._calls.set("template", "template_cls", name, settings))

    async def set_loss(self, name: str = "CrossEntropyLoss", **settings: Any) -> None:
        """See ``Run.set_loss``."""
        await self._ask(self._calls.set("loss", "loss_cls", name, settings))

    async def set_optimizer(self, name: str = "AdamW", **settings: Any) -> None:
        """See ``Run.set_optimizer``."""
        await self._ask(self._calls.set("optimizer", "optimizer_cls", name, settings))

    async def set_lr_scheduler(self, name: str, **settings: Any) -> None:
        """See ``Run.set_lr_scheduler``."""
        await self._ask(self._calls.set("lr_scheduler", "scheduler_cls", name, settings))

    async def add_metric(self, name: str, *, training: bool | None = None) -> None:
        """See ``Run.add_metric``."""
        await self._ask(self._calls.add_metric(name, training))

    async def forward(self, examples: Sequence[Example], **arguments: Any) -> Forwarded:
        """See ``Run.forward``."""
        return (await self._ask(self._calls.forward(examples, arguments))).result

    async def forward_backward(self, examples: Sequence[Example], **arguments: Any) -> Forwarded:
        """See ``Run.forward_backward``."""
        return (await self._ask(self._calls.forward_backward(examples, arguments))).result

    async def step(self, *, max_grad_norm: float = 1.0) -> None:
        """See ``Run.step``."""
        await self._ask(self._calls.step(max_grad_norm))

    async def metrics(self, *, training: bool = True) -> dict[str, Any]:
        """See ``Run.metrics``."""
        return (await self._ask(self._calls.metrics(training))).result

    async def configuration(self) -> str:
        """See ``Run.configuration``."""
        return (await self._ask(self._calls.configuration())).result

    async def save(self, name: str | None = None, *, optimizer: bool = True) -> Saved:
        """See ``Run.save``."""
        return await self._ask(self._calls.save(name, optimizer=optimizer, sampler=False))

    async def save_for_sampler(self, name: str | None = None) -> Saved:
        """See ``Run.save_for_sampler``."""
        return await self._ask(self._calls.save(name, optimizer=False, sampler=True))

    async def load(self, address: str, *, optimizer: bool = True) -> None:
        """See ``Run.load``."""
        await self._ask(self._calls.load(address, optimizer=optimizer))

    def __repr__(self) -> str:
        return f"AsyncRun({self.name!r}, base_model={self.base_model!r})"
