"""From a client's graph to a program: everything that can be known without numbers is checked."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from twinkle_dask.custom_losses.operators import (
    ATTRIBUTES,
    INERT,
    WORDS,
    function_name,
    method_name,
    operator_of,
)
from twinkle_dask.custom_losses.program import Program, Step
from twinkle_dask.errors import InvalidRequest

MAX_NODES: Final = 512
MAX_INPUTS: Final = 16
MAX_METRICS: Final = 64
MAX_ARGUMENTS: Final = 4096
MAX_DEPTH: Final = 8
MAX_BYTES: Final = 256 * 1024

_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC_NAME = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_FLOATS = ("float64", "double", "float32", "float", "float16", "half", "bfloat16")
_DTYPES = frozenset({*_FLOATS, "int64", "long", "int32", "int", "bool"})
_INSTEAD = (
    "A loss that needs more than this server computes can be given to forward_backward_custom as "
    "a plain function, which your client then evaluates."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node as torch.fx records it and clients send it."""

    op: str
    name: str
    target: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


def checked_graph(ranks: Sequence[tuple[str, int]], nodes: Sequence[Node]) -> str:
    """Check a loss and give its program.

    Args:
        ranks: Name and rank of each input, ``logprobs`` first.
        nodes: In order of execution.

    Raises:
        InvalidRequest: Something is not allowed, contradicts itself, or is too much; the message
            names the node.
    """
    _check_inputs(ranks)
    if len(nodes) > MAX_NODES:
        raise InvalidRequest(
            f"A custom loss may have {MAX_NODES} nodes, not {len(nodes)}. {_INSTEAD}"
        )
    text = _Reader([name for name, _ in ranks]).program(nodes).text()
    if len(text) > MAX_BYTES:
        raise InvalidRequest(f"A custom loss may have {MAX_BYTES // 1024} KiB as JSON. {_INSTEAD}")
    return text


def _check_inputs(ranks: Sequence[tuple[str, int]]) -> None:
    names = [name for name, _ in ranks]
    if not names or names[0] != "logprobs":
        raise InvalidRequest("The first input of a custom loss must be 'logprobs'.")
    if len(names) > MAX_INPUTS:
        raise InvalidRequest(f"A custom loss takes at most {MAX_INPUTS} inputs, not {len(names)}.")
    if len(set(names)) < len(names):
        raise InvalidRequest("The inputs of a custom loss must have different names.")
    for name, rank in ranks:
        if not _INPUT_NAME.fullmatch(name):
            raise InvalidRequest(
                f"{name[:60]!r} is no name of an input: lower-case letters, digits and '_', at "
                "most 64 of them."
            )
        if not (1 if name == "logprobs" else 0) <= rank <= 2:
            raise InvalidRequest(f"Input {name!r} cannot have rank {rank}; logprobs have 1 or 2.")


class _Reader:
    """Reads one graph."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self._inputs = list(inputs)
        self._values: dict[str, int] = {}
        self._steps: list[Step] = []
        # Whether a value depends on logprobs.
        self._depends: list[bool] = []
        self._num_arguments = 0

    def program(self, nodes: Sequence[Node]) -> Program:
        if not nodes or nodes[-1].op != "output":
            raise InvalidRequest("The last node of a custom loss must be its output.")
        for node in nodes[:-1]:
            if not _NODE_NAME.fullmatch(node.name) or node.name in self._values:
                raise InvalidRequest(
                    f"Node {node.name[:60]!r} of the loss needs a name of its own, of letters, "
                    "digits and '_'."
                )
            if node.op == "placeholder":
                self._placeholder(node)
            else:
                self._steps.append(self._step(node))
                self._depends.append(self._any_depends(self._steps[-1]))
            self._values[node.name] = len(self._values)
        if len(self._values) - len(self._steps) != len(self._inputs):
            raise InvalidRequest("A custom loss must have a placeholder for each of its inputs.")
        return self._output(nodes[-1])

    def _placeholder(self, node: Node) -> None:
        place = len(self._values)
        if self._steps or place >= len(self._inputs) or node.target != self._inputs[place]:
            raise InvalidRequest(
                f"Placeholder {node.target[:60]!r} is out of place: they come first, one for each "
                "input, in the order of the inputs."
            )
        if node.args or node.kwargs:
            raise InvalidRequest(f"Placeholder {node.target!r} must have no default.")
        self._depends.append(place == 0)

    def _step(self, node: Node) -> Step:
        target = node.target[:80]
        match node.op:
            case "call_function" if node.target == "getattr":
                return self._attribute(node)
            case "call_function":
                name, what = function_name(node.target), f"function {target!r}"
            case "call_method":
                name, what = method_name(node.target), f"tensor method {target!r}"
            case _:
                raise InvalidRequest(f"Node {node.name!r}: {node.op[:40]!r} is not allowed here.")
        if name is None:
            raise InvalidRequest(
                f"Node {node.name!r}: {what} is not allowed in a custom loss. docs/losses.md lists "
                f"what is. {_INSTEAD}"
            )
        operator = operator_of(name)
        given = {
            key: value
            for key, value in node.kwargs.items()
            if not (key in INERT and value == INERT[key] and type(value) is type(INERT[key]))
        }
        most = operator.num_by_position
        if not node.args or (most is not None and len(node.args) > most):
            bounds = "at least 1" if most is None else f"1 to {most}"
            raise InvalidRequest(
                f"Node {node.name!r}: {what} takes {bounds} arguments by position in a custom "
                f"loss, not {len(node.args)}."
            )
        if unknown := sorted(given.keys() - set(operator.names[1:])):
            known = ", ".join(operator.names[1:]) or "none"
            raise InvalidRequest(
                f"Node {node.name!r}: {what} takes no {unknown[0][:40]!r} in a custom loss; by "
                f"name it takes: {known}."
            )
        if len(node.args) + len(given) < operator.num_required:
            raise InvalidRequest(f"Node {node.name!r}: {what} needs {', '.join(operator.names)}.")
        return Step(
            label=f"{node.name} ({target})",
            operator=name,
            args=[self._argument(node, arg) for arg in node.args],
            kwargs={key: self._argument(node, value) for key, value in given.items()},
        )

    def _attribute(self, node: Node) -> Step:
        name = node.args[1] if len(node.args) == 2 and not node.kwargs else None
        if not isinstance(name, str) or name not in ATTRIBUTES:
            what = repr(name[:40]) if isinstance(name, str) else "like this"
            raise InvalidRequest(
                f"Node {node.name!r}: attribute {what} of a tensor is not allowed in a custom "
                f"loss; allowed are: {', '.join(sorted(ATTRIBUTES))}."
            )
        tensor = self._argument(node, node.args[0])
        return Step(
            label=f"{node.name} (.{name})",
            operator="getattr",
            args=[tensor, name],
            kwargs={},
        )

    def _argument(self, node: Node, value: Any, depth: int = 0) -> Any:
        """An argument in our form."""
        self._num_arguments += 1
        if self._num_arguments > MAX_ARGUMENTS:
            raise InvalidRequest(
                f"A custom loss may have {MAX_ARGUMENTS} arguments over all of its nodes."
            )
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"Node {node.name!r}: an argument is nested too deeply.")
        match value:
            case None | bool():
                return value
            case int():
                if not -(2**63) <= value < 2**63:
                    raise InvalidRequest(f"Node {node.name!r}: an integer is not within 64 bits.")
                return value
            case float():
                return value
            case str():
                if value not in WORDS:
                    raise InvalidRequest(
                        f"Node {node.name!r}: the text {value[:40]!r} is not allowed as an "
                        "argument in a custom loss."
                    )
                return value
            case list():
                items = cast(list[Any], value)
                return [self._argument(node, item, depth + 1) for item in items]
            case dict() if len(cast(dict[Any, Any], value)) == 1:
                return self._special(node, *next(iter(cast(dict[str, Any], value).items())), depth)
            case _:
                raise InvalidRequest(f"Node {node.name!r} has an argument of no known form.")

    def _special(self, node: Node, kind: str, content: Any, depth: int) -> Any:
        match kind, content:
            case "ref", str():
                if content not in self._values:
                    raise InvalidRequest(
                        f"Node {node.name!r} refers to {content[:60]!r}, which is no node before "
                        "it."
                    )
                return {"value": self._values[content]}
            case "tuple", list():
                items = cast(list[Any], content)
                return {"tuple": [self._argument(node, item, depth + 1) for item in items]}
            case "slice", [_, _, _]:
                items = cast(list[Any], content)
                return {"slice": [self._argument(node, item, depth + 1) for item in items]}
            case "ellipsis", True:
                return {"ellipsis": True}
            case "float", "inf" | "-inf" | "nan":
                return {"float": content}
            case "dtype", str() if content in _DTYPES:
                return {"dtype": content}
            case "device", "cpu":
                return "cpu"
            case _:
                what = content if isinstance(content, str) else ""
                raise InvalidRequest(
                    f"Node {node.name!r}: {kind[:20]!r} {what[:40]!r} is not allowed as an "
                    "argument in a custom loss."
                )

    def _any_depends(self, step: Step) -> bool:
        return any(
            self._depends[value] for value in _values_in([*step.args, *step.kwargs.values()])
        )

    def _output(self, node: Node) -> Program:
        match list(node.args):
            case [{"tuple": [loss, metrics]}] | [[loss, metrics]] if not node.kwargs:
                pass
            case _:
                raise InvalidRequest("A custom loss must return (loss, metrics).")
        match metrics:
            case {"dict": dict()}:
                named = cast(dict[str, Any], metrics["dict"])
            case _:
                raise InvalidRequest("A custom loss must return its metrics as a dict.")
        if len(named) > MAX_METRICS:
            raise InvalidRequest(f"A custom loss may have {MAX_METRICS} metrics, not {len(named)}.")
        for name in named:
            if not _METRIC_NAME.fullmatch(name):
                raise InvalidRequest(
                    f"Metric {name[:60]!r} must be called custom/<name>:sum or custom/<name>:mean, "
                    "in lower-case letters, digits and any of _./-"
                )
        out = self._value(node, loss, "loss")
        if not self._depends[out]:
            raise InvalidRequest("The loss does not depend on logprobs, so it has no gradient.")
        return Program(
            inputs=self._inputs,
            steps=self._steps,
            loss=out,
            metrics={name: self._value(node, value, name) for name, value in named.items()},
        )

    def _value(self, node: Node, content: Any, what: str) -> int:
        value = self._argument(node, content)
        if not isinstance(value, dict) or "value" not in value:
            raise InvalidRequest(f"What a custom loss returns as {what!r} must be a tensor.")
        return cast(dict[str, int], value)["value"]


def _values_in(content: Any) -> list[int]:
    """The values that arguments refer to."""
    if isinstance(content, list):
        return [value for item in cast(list[Any], content) for value in _values_in(item)]
    if isinstance(content, dict):
        fields = cast(dict[str, Any], content)
        if isinstance(fields.get("value"), int) and len(fields) == 1:
            return [fields["value"]]
        return [value for item in fields.values() for value in _values_in(item)]
    return []
