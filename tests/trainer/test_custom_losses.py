"""Custom losses on the server against the SDK's own evaluation, and whatever else may be sent."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tests.trainer.custom_losses import (
    CASES,
    Case,
    LossFunction,
    Returned,
    clipped,
    custom,
    handle_of,
    inputs_for,
    nodes_of,
    weighted,
)
from twinkle_dask.custom_losses import Node, checked_graph
from twinkle_dask.custom_losses.operators import FUNCTIONS as ALLOWED
from twinkle_dask.custom_losses.operators import METHODS, operator_of
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.trainer.custom_loss import CustomLossFailed, Evaluated, evaluate, work_allowed
from twinkle_dask.trainer.custom_operators import FUNCTIONS, WORK
from twinkle_dask.types import CustomLoss


def run(loss: CustomLoss, values: list[torch.Tensor], *, backward: bool = True) -> Evaluated:
    return evaluate(
        loss, values[0], dict(zip(loss.inputs, values[1:], strict=True)), backward=backward
    )


def test_the_tables_agree() -> None:
    """What the gateway lets by is what the trainer has, and nothing else."""
    assert {*ALLOWED, *METHODS, "getattr"} == set(FUNCTIONS)
    assert WORK.keys() <= FUNCTIONS.keys()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
@pytest.mark.parametrize("length", [1, 2, 37])
def test_value_slope_and_metrics_are_the_clients(case: Case, length: int) -> None:
    function, ranks = case
    values = inputs_for(ranks, length, seed=length)
    handle = handle_of(function, ranks)
    leaf = values[0].clone().requires_grad_()
    expected, metrics = handle.graph(leaf, *values[1:])
    (slope,) = torch.autograd.grad(expected, leaf)
    loss = custom(function, ranks)
    found = run(loss, values)
    # The same functions on the same numbers.
    assert found.value == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(found.slope, slope, rtol=1e-6, atol=1e-7)
    assert found.metrics == pytest.approx({k: float(v.detach()) for k, v in metrics.items()})
    forward = run(loss, values, backward=False)
    assert (forward.value, forward.metrics) == (found.value, found.metrics)
    assert not forward.slope.any()


# ---- what is refused before it is stored


def traced(function: LossFunction, **ranks: int) -> str:
    return checked_graph(list(ranks.items()), nodes_of(handle_of(function, ranks)))


def refuses(expression: str) -> str:
    """Why ``logprobs`` in an expression is refused."""
    scope: dict[str, Any] = {"torch": torch, "math": math, "F": torch.nn.functional}
    exec(f"def loss(logprobs):\n    return ({expression}), {{}}", scope)
    with pytest.raises(InvalidRequest) as refused:
        traced(scope["loss"], logprobs=1)
    return refused.value.message


@pytest.mark.parametrize(
    ("expression", "named"),
    [
        ("torch.rand_like(logprobs).sum() * logprobs.sum()", "'torch.rand_like'"),
        ("F.dropout(logprobs).sum()", "'torch.nn.functional.dropout'"),
        ("logprobs.add_(1).sum()", "'add_'"),
        ("logprobs.requires_grad_().sum()", "'requires_grad_'"),
        ("logprobs.register_hook(None).sum()", "'register_hook'"),
        ("torch.linalg.svdvals(logprobs[None]).sum()", "svdvals"),
        ("torch.save(logprobs, '/dev/null')", "torch.serialization.save"),
        ("logprobs.data.sum()", "'data'"),
        ("logprobs.__class__", "'__class__'"),
        ("logprobs.to('cuda').sum()", "'cuda'"),
        ("F.relu(logprobs, inplace=True).sum()", "'inplace'"),
        ("torch.sum(logprobs, out=logprobs)", "'out'"),
        ("logprobs.sum() * 10**30", "64 bits"),
        ("logprobs.to(torch.complex64).sum()", "'complex64'"),
        ("torch.einsum('i,i->', logprobs, logprobs)", "einsum"),
        ("torch.ones_like(logprobs).sum() * logprobs.shape[0] + logprobs.device", ""),
    ],
)
def test_what_is_not_allowed_is_named(expression: str, named: str) -> None:
    try:
        message = refuses(expression)
    except ValueError:  # the SDK itself would not send it
        return
    except pytest.fail.Exception:
        if named:
            raise
        return
    assert named in message


def test_a_loss_must_depend_on_the_logprobs() -> None:
    def constant(logprobs: torch.Tensor, weights: torch.Tensor) -> Returned:
        return weights.sum(), {"custom/lp:sum": logprobs.sum()}

    with pytest.raises(InvalidRequest, match="does not depend on logprobs"):
        traced(constant, logprobs=1, weights=1)


def nodes() -> list[Node]:
    return nodes_of(handle_of(weighted, {"logprobs": 1, "weights": 1}))


def change(at: int, **fields: Any) -> list[Node]:
    changed = nodes()
    old = changed[at]
    parts: dict[str, Any] = {k: getattr(old, k) for k in ("op", "name", "target", "args", "kwargs")}
    changed[at] = Node(**(parts | fields))
    return changed


RANKS = [("logprobs", 1), ("weights", 1)]


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ([], "must be its output"),
        (nodes()[:-1], "must be its output"),
        (nodes()[1:], "out of place"),
        (nodes()[:1] + nodes()[2:], "placeholder for each|no node before"),
        (change(2, op="get_attr"), "'get_attr' is not allowed"),
        (change(2, op="call_module"), "'call_module' is not allowed"),
        (change(2, target="os.system"), "function 'os.system' is not allowed"),
        (change(2, target="torch.Tensor.mul"), "is not allowed"),
        (change(2, target="torch._C._nn.__dict__"), "is not allowed"),
        (change(2, op="call_method", target="__reduce__"), "method '__reduce__' is not"),
        (change(2, name="logprobs"), "a name of its own"),
        (change(2, name="a b"), "a name of its own"),
        (change(2, args=[{"ref": "later"}, 1]), "no node before"),
        (change(2, args=[{"ref": "mul"}, 1]), "no node before"),
        (change(2, args=[{"ref": "logprobs"}, "x" * 1000]), "the text 'x"),
        (change(2, args=[{"pickle": "x"}, 1]), "'pickle'"),
        (change(2, args=[{"ref": "logprobs"}, 2**63]), "64 bits"),
        (change(2, args=[{"ref": "logprobs"}] * 3), "arguments by position"),
        (change(2, args=[{"ref": "logprobs"}]), "needs a, b"),
        (change(2, args=[]), "arguments by position"),
        (change(2, kwargs={"alpha": 1}), "takes no 'alpha'"),
        (change(2, args=[[[[[[[[[[[[1]]]]]]]]]]], 1]), "nested too deeply"),
        (change(2, args=[[0] * 5000, 1]), "4096 arguments"),
        (change(2, args=[{"ref": "logprobs", "tuple": []}, 1]), "no known form"),
        (change(-1, args=[{"ref": "logprobs"}]), r"\(loss, metrics\)"),
        (change(-1, args=[{"tuple": [1.0, {"dict": {}}]}]), "must be a tensor"),
        (
            change(-1, args=[{"tuple": [{"ref": "neg"}, {"dict": {"loss:sum": 1}}]}]),
            "custom/<name>",
        ),
        (change(-1, args=[{"tuple": [{"ref": "neg"}, []]}]), "as a dict"),
    ],
)
def test_a_broken_graph_is_refused(broken: list[Node], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        checked_graph(RANKS, broken)


@pytest.mark.parametrize(
    ("ranks", "problem"),
    [
        ([("weights", 1)], "must be 'logprobs'"),
        ([("logprobs", 0)], "rank 0"),
        ([("logprobs", 3)], "rank 3"),
        ([("logprobs", 1), ("logprobs", 1)], "different names"),
        ([("logprobs", 1), ("Weights", 1)], "no name of an input"),
        ([("logprobs", 1), *((f"x{i}", 1) for i in range(16))], "at most 16"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(ranks: list[tuple[str, int]], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        checked_graph(ranks, nodes())


def test_a_graph_has_its_size() -> None:
    long = nodes()
    for i in range(600):
        before = {"ref": long[-2].name}
        node = Node(op="call_method", name=f"n{i}", target="exp", args=[before], kwargs={})
        long.insert(-1, node)
    with pytest.raises(InvalidRequest, match="512 nodes"):
        checked_graph(RANKS, long)


# ---- what is refused when it is evaluated


def fails(expression: str, values: list[torch.Tensor] | None = None) -> str:
    """Why a loss of ``logprobs`` and ``x`` fails."""
    scope: dict[str, Any] = {"torch": torch, "math": math, "F": torch.nn.functional}
    exec(f"def loss(logprobs, x):\n    return ({expression}), {{}}", scope)
    loss = custom(scope["loss"], {"logprobs": 1, "x": 1})
    with pytest.raises(CustomLossFailed) as failed:
        run(loss, values or [torch.full((10,), -2.0), torch.ones(10)])
    return str(failed.value)


BIG = "is more work than is allowed"


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("logprobs.repeat(10**9).sum()", BIG),
        ("logprobs.repeat(10**6, 10**6).sum()", BIG),
        ("logprobs[None].expand(10**9, -1).sum()", BIG),
        ("torch.broadcast_to(logprobs, (10**9, 10)).sum()", BIG),
        ("torch.repeat_interleave(logprobs, 10**9).sum()", BIG),
        ("logprobs.sum() * torch.arange(logprobs.shape[0] * 10**9).sum()", BIG),
        ("logprobs.sum() * logprobs.new_zeros(10**6, 10**6).sum()", BIG),
        ("logprobs.sum() * logprobs.new_full((10**12,), 1.0).sum()", BIG),
        ("logprobs.sum() * torch.zeros(logprobs.shape[0] * 10**12).sum()", BIG),
        ("F.pad(logprobs, (0, 10**10)).sum()", BIG),
        ("logprobs.index_select(0, x.long().repeat(1000)).repeat(1000).sum()", BIG),
        ("logprobs[x.long().repeat(10**3)][x.long().repeat(10**6)].sum()", BIG),
        ("(logprobs[:, None, None, None, None, None, None] * logprobs).sum().exp()", "value is|"),
        (
            "(logprobs[:, None, None, None, None, None] + logprobs[None, :, None, None, None, None]"
            " + logprobs[:, None, None, None] + logprobs[:, None, None] + logprobs[:, None]"
            " + logprobs).sum()",
            BIG,
        ),
        ("torch.outer(logprobs.repeat(1000), logprobs.repeat(1000)).sum()", BIG),
        ("(logprobs.repeat(60, 10) @ logprobs.repeat(10, 60)[:, :].t().t()).sum()", "shapes|work"),
        ("logprobs.sum() * (logprobs.shape[0] ** 10 ** 3)", "too large|64 bits"),
        ("logprobs.sum() * (9.0 ** logprobs.shape[0] ** 10)", "Result too large|Numerical"),
        ("logprobs.sum() * math.floor(1e300 * logprobs.shape[0])", "64 bits"),
        ("logprobs.sum() * math.sqrt(logprobs.sum())", "use torch's function"),
        ("logprobs.sum() / 0 * 0", "value is nan"),
        ("(logprobs * 0).sum() / (x - 1).sum()", "value is nan|gradient"),
        ("torch.sqrt(logprobs * 0).sum()", r"gradient by logprobs\[0\] is NaN or infinite"),
        ("logprobs.detach().sum()", "has no gradient"),
        ("logprobs * 2", "a tensor of one float"),
        ("logprobs.argmax()", "a tensor of one float"),
        ("logprobs[20]", "node getitem.*out of bounds"),
        ("logprobs[x.long() * 99].sum()", "out of"),
        ("logprobs.view(3, 4).sum()", r"node view \(tensor method 'view'\): shape|invalid"),
        ("logprobs.reshape(-5).sum()", "must not be negative"),
        ("logprobs.split(0)[0].sum()", "cut into 1024"),
        ("(logprobs.shape + logprobs).sum()", "tensors and numbers"),
        ("logprobs[[1, 2]].sum()", "an index must be"),
        ("logprobs.sum() * torch.div(torch.full_like(x.long(), -(2**63)), -1,"
         " rounding_mode='trunc').sum()", "too small to be divided"),
        ("logprobs.sum() * (torch.full_like(x.long(), -(2**63)) // -1).sum()", "too small"),
        # Cut to 32 bits, what has no dimension becomes the smallest integer there is.
        ("logprobs.sum() * torch.div(torch.full_like(x.long().sum(), -(2**31) - 2**32),"
         " -x.to(torch.int32), rounding_mode='trunc').sum()", "too small"),
        ("logprobs.sum() * ((-(2**31) - 2**32) // -x.to(torch.int32)).sum()", "too small"),
        # Empty, and yet of any size.
        ("logprobs.sum() * logprobs.new_zeros(0, 10**12).sum(0).numel()", BIG),
        ("logprobs[:0].reshape(0, 10**12).sum(0).numel() * logprobs.sum()", "too large a shape"),
        ("logprobs.sum() * logprobs.new_zeros(10**6, 0).any(1).sum()", BIG),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_fails_with_a_reason(expression: str, problem: str) -> None:
    why = fails(expression)
    assert re.search(problem, why), why


def test_too_many_nodes_are_too_much_for_a_single_token() -> None:
    def deep(logprobs: torch.Tensor) -> Returned:
        value = logprobs
        for _ in range(400):
            value = value * 1.0
        return value.sum(), {}

    loss = custom(deep, {"logprobs": 1})
    assert run(loss, [torch.full((30,), -1.0)]).value == pytest.approx(-30.0)
    with pytest.raises(CustomLossFailed, match=BIG):
        run(loss, [torch.full((1,), -1.0)])


def test_work_grows_with_the_datum_up_to_a_bound() -> None:
    allowed = [work_allowed(size, 2 * size) for size in (1, 100, 2048, 10**5, 10**6, 10**8)]
    assert allowed == sorted(allowed)
    assert allowed[0] < 10**5
    assert allowed[2] >= 7 * 2048 * 2048  # a few matrices of all pairs
    assert allowed[3] == 2**25
    assert allowed[4] == 2 * 64 * 10**6
    assert allowed[5] == 2**27
    # What one brings oneself buys little.
    assert work_allowed(1, 10**6) < 2**26


def test_what_takes_longer_counts_more() -> None:
    def loss(function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def of(logprobs: torch.Tensor) -> Returned:
            return function(logprobs.repeat(400_000)).sum(), {}

        return custom(of, {"logprobs": 1})

    lp = [torch.full((80,), -1.0)]
    with pytest.raises(CustomLossFailed, match=BIG):
        run(loss(torch.sqrt), lp)

    def some(function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def of(logprobs: torch.Tensor) -> Returned:
            return function(logprobs.repeat(4000)).sum(), {}

        return custom(of, {"logprobs": 1})

    run(some(torch.exp), lp)
    with pytest.raises(CustomLossFailed, match=r"argsort.*more work"):
        run(some(lambda x: x[x.argsort()]), lp)


def test_metrics_may_be_anything_that_is_a_number() -> None:
    def loss(logprobs: torch.Tensor) -> Returned:
        return logprobs.sum(), {"custom/none:mean": (logprobs * 0).sum() / 0, "custom/n:sum": (
            logprobs > -3
        ).any()}  # fmt: skip

    found = run(custom(loss, {"logprobs": 1}), [torch.full((3,), -2.0)])
    assert math.isnan(found.metrics["custom/none:mean"])
    assert found.metrics["custom/n:sum"] == 1.0

    def many(logprobs: torch.Tensor) -> Returned:
        return logprobs.sum(), {"custom/all:sum": logprobs}

    with pytest.raises(CustomLossFailed, match="single number"):
        run(custom(many, {"logprobs": 1}), [torch.full((3,), -2.0)])


# ---- anything at all

SIZES = [0, 1, -1, 2, 3, 7, -(2**63), 2**63 - 1, 10**6, 10**9, 2**31, -5]
CONSTANTS: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(SIZES),
    st.sampled_from([None, True, False, 0.5, -1.5, 1e30, 1e-30, 0.0]),
    st.sampled_from(["floor", "trunc", "mean", "sum", "none", "fro", "constant", "cpu"]),
    st.sampled_from([{"float": "inf"}, {"float": "nan"}, {"ellipsis": True}]),
    st.sampled_from([{"dtype": name} for name in ("float32", "float64", "int64", "int32", "bool")]),
)


@st.composite
def graphs(draw: st.DrawFn) -> list[Node]:
    """Graphs that use what is allowed with whatever arguments."""
    names = ["logprobs", "x", "labels"]
    made = [Node(op="placeholder", name=n, target=n, args=[], kwargs={}) for n in names]

    def argument(depth: int = 0) -> Any:
        kind = draw(st.integers(0, 9))
        if kind <= 5:
            return {"ref": draw(st.sampled_from(names[-6:]))}
        if kind <= 7 or depth > 1:
            return draw(CONSTANTS)
        if kind == 8:
            items = [argument(depth + 1) for _ in range(draw(st.integers(0, 3)))]
            return items if draw(st.booleans()) else {"tuple": items}
        return {"slice": [draw(st.sampled_from([None, *SIZES])) for _ in range(3)]}

    for i in range(draw(st.integers(1, 12))):
        method = draw(st.booleans())
        name = draw(st.sampled_from(sorted(METHODS if method else ALLOWED)))
        operator = operator_of(name)
        most = operator.num_by_position
        least = max(1, operator.num_required) if most is None or most else 1
        count = draw(st.integers(min(least, most or 4), most or 4))
        args = [{"ref": draw(st.sampled_from(names[-6:]))}]
        args += [argument() for _ in range(count - 1)]
        left = operator.names[count:]
        keys = draw(st.lists(st.sampled_from(left), unique=True)) if left else []
        target = name.removeprefix("Tensor.")
        if not method and "." not in name:
            target = f"torch.{name}"
        made.append(
            Node(
                op="call_method" if method else "call_function",
                name=f"n{i}",
                target=target,
                args=args,
                kwargs={key: argument() for key in keys},
            )
        )
        names.append(f"n{i}")
    made.append(
        Node(op="call_method", name="total", target="sum", args=[{"ref": names[-1]}], kwargs={})
    )
    out = {"tuple": [{"ref": "total"}, {"dict": {"custom/m:mean": {"ref": names[-1]}}}]}
    made.append(Node(op="output", name="output", target="output", args=[out], kwargs={}))
    return made


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, deadline=None)
@given(graph=graphs(), length=st.sampled_from([1, 3, 40]))
def test_whatever_a_graph_says_there_is_a_result_or_an_error(
    graph: list[Node], length: int
) -> None:
    ranks: Mapping[str, int] = {"logprobs": 1, "x": 2, "labels": 1}
    try:
        text = checked_graph(list(ranks.items()), graph)
    except InvalidRequest:
        return
    loss = CustomLoss(id="x", name="x", ranks=ranks, graph=text)
    try:
        found = run(loss, inputs_for(ranks, length, seed=length))
    except CustomLossFailed:
        return
    assert math.isfinite(found.value)
    assert torch.isfinite(found.slope).all()


def test_ppo_by_hand_is_ppo() -> None:
    """The case of the documentation, against the loss that is built in."""
    from twinkle_dask.losses import loss_spec
    from twinkle_dask.trainer.losses import token_loss

    lp, old, advantages, mask = inputs_for(CASES[1][1], 50, seed=3)
    found = run(custom(clipped, CASES[1][1]), [lp, old, advantages, mask])
    inputs = {"logprobs": old, "advantages": advantages, "weights": mask}
    value, slope = token_loss(loss_spec("ppo", {}), lp, inputs)
    assert found.value == pytest.approx(float(value.sum()), rel=1e-5)
    torch.testing.assert_close(found.slope, slope, rtol=1e-5, atol=1e-6)
