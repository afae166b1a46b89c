"""One step of any of torch's optimizers on a run's flat buffers, and what it remembers.

Most optimizers treat every number by itself: they see all weights as one flat parameter, a few
operations however many layers there are. Those that look at matrices see each weight. Either way
what they remember lies flat, like the weights, so that it moves and is saved as they are. The torch
object is made for each step (13 us): settings may differ every time, and nothing else has a state.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, optim

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.trainer import pages
from twinkle_dask.trainer.layout import Layout
from twinkle_dask.types import Float32Array

CLASSES: Final[Mapping[str, type[Any]]] = {
    "Adam": optim.Adam,
    "AdamW": optim.AdamW,
    "SGD": optim.SGD,
    "RMSprop": optim.RMSprop,
    "Adagrad": optim.Adagrad,
    "Adadelta": optim.Adadelta,
    "Adamax": optim.Adamax,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "ASGD": optim.ASGD,
    "Rprop": optim.Rprop,
    "Muon": optim.Muon,
    "Adafactor": optim.Adafactor,
}

_BY_MATRIX: Final = frozenset({"Muon", "Adafactor"})

# One pass over memory in place of nine. The others keep torch's plain loop, since the foreach
# kernels are for many tensors and there is one here; Muon has nothing else.
_FUSED: Final = {"fused": True}
_HOW: Final = {"Adam": _FUSED, "AdamW": _FUSED, "SGD": _FUSED, "Muon": dict[str, bool]()}


def _words(name: str, settings: Mapping[str, Any]) -> frozenset[str]:
    """Torch's words for what is remembered of each weight."""
    match name:
        case "Adam" | "AdamW":
            more = {"max_exp_avg_sq"} if settings["amsgrad"] else set[str]()
            return frozenset({"exp_avg", "exp_avg_sq"} | more)
        case "NAdam" | "RAdam":
            return frozenset({"exp_avg", "exp_avg_sq"})
        case "Adamax":
            return frozenset({"exp_avg", "exp_inf"})
        case "SGD":
            return frozenset({"momentum_buffer"} if settings["momentum"] else ())
        case "RMSprop":
            more = {"momentum_buffer"} if settings["momentum"] else set[str]()
            more |= {"grad_avg"} if settings["centered"] else set[str]()
            return frozenset({"square_avg"} | more)
        case "Adagrad":
            return frozenset({"sum"})
        case "Adadelta":
            return frozenset({"square_avg", "acc_delta"})
        case "ASGD":
            return frozenset({"ax"})
        case "Rprop":
            return frozenset({"prev", "step_size"})
        case "Muon":
            return frozenset({"momentum_buffer"})
        case "Adafactor":
            return frozenset({"row_var", "col_var"})
        case _:
            raise ValueError(name)


def _shape(word: str, weight: tuple[int, ...]) -> tuple[int, ...]:
    """Of what is remembered of a weight under a word."""
    match word:
        case "row_var":
            return (*weight[:-1], 1)
        case "col_var":
            return (*weight[:-2], 1, weight[-1])
        case _:
            return weight


@dataclass(slots=True, eq=False)
class Memory:
    """What an optimizer remembers of a run.

    Attributes:
        optimizer: Its class.
        numbers: One for all weights, by torch's word; float32 values.
        tensors: Float32 and flat, by torch's word: what belongs to each weight, in their order.
    """

    optimizer: str
    numbers: dict[str, float]
    tensors: dict[str, Tensor]

    @classmethod
    def of_arrays(
        cls,
        optimizer: str,
        arrays: Mapping[str, Float32Array],
        layout: Layout,
        device: torch.device,
    ) -> "Memory":
        """Read back what ``arrays`` gave.

        Raises:
            InvalidRequest: It is not a memory of these weights.
        """
        numbers: dict[str, float] = {}
        found: dict[str, dict[str, Float32Array]] = {}
        for name, array in arrays.items():
            weight, _, word = name.rpartition(".")
            if weight:
                found.setdefault(word, {})[weight] = array
            else:
                numbers[word] = float(array)
        tensors: dict[str, Tensor] = {}
        for word, of_word in sorted(found.items()):
            shapes = {name: _shape(word, shape) for name, shape in layout.shapes.items()}
            tensors[word] = layout.gather(of_word, device, shapes)
        if optimizer not in CLASSES:
            raise InvalidRequest(f"The saved optimizer {optimizer[:60]!r} is unknown here.")
        return cls(optimizer, numbers, tensors)

    def arrays(self, layout: Layout) -> dict[str, Float32Array]:
        """Copy everything to the host, as ``StepState.tensors`` names it."""
        arrays: dict[str, Float32Array] = {}
        for word, flat in self.tensors.items():
            views = _views(layout, word, flat.to("cpu", copy=True))
            arrays |= {f"{name}.{word}": view.numpy() for name, view in views.items()}
        for word, number in self.numbers.items():
            arrays[word] = torch.tensor(number).numpy()
        return arrays


def _views(layout: Layout, word: str, flat: Tensor) -> dict[str, Tensor]:
    """What of a flat buffer belongs to each weight."""
    views: dict[str, Tensor] = {}
    start = 0
    for name, weight in layout.shapes.items():
        shape = _shape(word, weight)
        views[name] = flat[start : start + prod(shape)].view(shape)
        start += prod(shape)
    return views


def step_with(
    name: str,
    settings: Mapping[str, Any],
    memory: Memory | None,
    weights: Tensor,
    gradient: Tensor,
    layout: Layout,
) -> Memory:
    """Take one step in place.

    Args:
        name: One of ``CLASSES``.
        settings: Of this step alone, every one that the class takes.
        memory: Of the steps before; one of another class, or for settings that remember something
            else, is not looked at.
        weights: Flat, float32.
        gradient: So too; it stays as it is.
        layout: Of both.

    Returns:
        What to hand in with the next step; holds the tensors of ``memory``, brought up to date.
    """
    by_matrix = name in _BY_MATRIX
    # Under their own names, since nobody may see a gradient on the run's buffer afterwards.
    parameters = list(layout.views(weights.detach()).values()) if by_matrix else [weights.detach()]
    gradients = list(layout.views(gradient).values()) if by_matrix else [gradient]
    given: dict[str, Any] = dict(settings) | _HOW.get(name, {"foreach": False})
    optimizer: Any = CLASSES[name](parameters, **given)
    words = _words(name, settings)
    if memory is not None and (memory.optimizer != name or memory.tensors.keys() != words):
        memory = None
    if memory is not None:
        kept: list[dict[str, Any]] = [{} for _ in parameters]
        for word, flat in memory.tensors.items():
            parts = _views(layout, word, flat).values() if by_matrix else [flat]
            for one, part in zip(kept, parts, strict=True):
                one[word] = part
        fused = _HOW.get(name) == _FUSED
        device = weights.device if fused else torch.device("cpu")  # where torch would make them
        for parameter, one in zip(parameters, kept, strict=True):
            numbers = {w: torch.tensor(n, device=device) for w, n in memory.numbers.items()}
            optimizer.state[parameter] = one | numbers
    for parameter, part in zip(parameters, gradients, strict=True):
        parameter.grad = part
    optimizer.step()
    states = [optimizer.state[parameter] for parameter in parameters]
    return _remembered(name, words, states, memory, weights.device)


def _remembered(
    name: str,
    words: frozenset[str],
    states: list[dict[str, Any]],
    memory: Memory | None,
    device: torch.device,
) -> Memory:
    """A torch optimizer's state after a step, in buffers that stay."""
    tensors: dict[str, Tensor] = {}
    for word in sorted(words):
        parts: list[Tensor] = [state[word].reshape(-1) for state in states]
        if memory is not None:
            flat = memory.tensors[word]
        else:
            flat = pages.zeros(sum(len(part) for part in parts), device)
        start = 0
        for part in parts:
            place = flat[start : start + len(part)]
            if place.data_ptr() != part.data_ptr():  # the first time; else torch wrote it there
                place.copy_(part)
            start += len(part)
        tensors[word] = flat
    # Every weight has made the same steps, so the first one's numbers are everybody's.
    numbers = {word: float(value) for word, value in states[0].items() if word not in words}
    return Memory(name, numbers, tensors)
