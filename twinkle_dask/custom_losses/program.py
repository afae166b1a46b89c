"""A checked graph as it is stored and travels: JSON of our own form, and reading it back.

::

    {"inputs": [name, ...], "steps": [[label, operator, args, kwargs], ...],
     "loss": value, "metrics": {name: value, ...}}

A value is a number: inputs first, then the result of each step. Arguments are plain JSON, or
objects of one key: ``{"value": n}``, ``{"tuple": [...]}``, ``{"slice": [a, b, c]}``,
``{"ellipsis": true}``, ``{"float": "inf"}``, ``{"dtype": "float32"}``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One operator and what it is given.

    Attributes:
        label: The node's name in the client's graph and what it calls, for messages.
        operator: Our name for it: a key of ``operators.FUNCTIONS`` or ``METHODS``, or
            ``getattr``.
        args: As in JSON; ``{"value": n}`` is an earlier value.
    """

    label: str
    operator: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The steps of a loss, in order, and which values come out."""

    inputs: Sequence[str]
    steps: Sequence[Step]
    loss: int
    metrics: Mapping[str, int]

    def text(self) -> str:
        """What ``program_of`` reads."""
        return orjson.dumps(
            {
                "inputs": self.inputs,
                "steps": [[s.label, s.operator, s.args, s.kwargs] for s in self.steps],
                "loss": self.loss,
                "metrics": self.metrics,
            }
        ).decode()


@lru_cache(maxsize=64)
def program_of(text: str) -> Program:
    """Read a program that ``checked_graph`` wrote; it is not checked a second time."""
    tree = orjson.loads(text)
    return Program(
        inputs=tuple(tree["inputs"]),
        steps=tuple(
            Step(label=label, operator=operator, args=args, kwargs=kwargs)
            for label, operator, args, kwargs in tree["steps"]
        ),
        loss=tree["loss"],
        metrics=tree["metrics"],
    )
