"""Where the time of a training step goes: torch's profile, and its sum by kind of work.

What an operation is for is read from its name, the shapes of its operands and what called it.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig  # pyright: ignore[reportPrivateUsage]

# Partly typed, used through Any.
_profiler: Any = torch.profiler

_STEPS = 3
_TOP = 30
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mkldnn_linear", "_grouped_mm")
_OPTIMIZER = "benchmark: optimizer"
_PYTHON = "Python, autograd, waiting"


@dataclass(frozen=True, slots=True)
class Shapes:
    """What tells one matrix product from another.

    Attributes:
        weights: (D, E) of the body's linears.
        head: (D, V) of the output head.
        ranks: Of the adapters; those of linears with one input may be taken together.
    """

    weights: frozenset[tuple[int, int]]
    head: tuple[int, int]
    ranks: frozenset[int]

    @property
    def adapter_widths(self) -> frozenset[int]:
        """Sizes that only adapters' matrices have."""
        return self._thin - self.ambiguous

    @property
    def ambiguous(self) -> frozenset[int]:
        """Sizes that matrices of the model have as well: such products count as the model's."""
        return self._thin & {size for shape in (*self.weights, self.head) for size in shape}

    @property
    def _thin(self) -> frozenset[int]:
        return frozenset(rank * together for rank in self.ranks for together in (1, 2, 3))


def profile_step(
    title: str, shapes: Shapes, forward_backward: Callable[[], object], optim: Callable[[], object]
) -> str:
    """Profile a few training steps and say, as text, where the time of one went.

    Args:
        title: What is profiled.
        shapes: Of the model and its adapters.
        forward_backward: The first part of a step.
        optim: The second part.
    """

    def steps() -> float:
        start_s = time.perf_counter()
        for _ in range(_STEPS):
            forward_backward()
            with _profiler.record_function(_OPTIMIZER):
                optim()
        return (time.perf_counter() - start_s) / _STEPS * 1000

    steps()
    plain_ms = steps()
    with _profiler.profile(
        activities=[_profiler.ProfilerActivity.CPU],
        record_shapes=True,
        # The engine may compute parts of a pass on threads of its own.
        experimental_config=_ExperimentalConfig(profile_all_threads=True),
    ) as profile:
        profiled_ms = steps()
    kinds, num_threads = _by_kind(profile.events(), shapes)
    lines = [title, f"one step: {plain_ms:.1f} ms, under the profiler {profiled_ms:.1f} ms"]
    if shapes.ambiguous:
        both = ", ".join(map(str, sorted(shapes.ambiguous)))
        lines.append(f"Products of width {both} may be an adapter's and count as the model's.")
    lines += ["", *_table(kinds, profiled_ms, num_threads), ""]
    averages = profile.key_averages()
    top = averages.table(sort_by="self_cpu_time_total", row_limit=_TOP, max_name_column_width=60)
    text = "\n".join(
        [*lines, f"{_STEPS} steps, the {_TOP} operations with most time of their own:"]
    )
    return text + "\n" + "\n".join(line.rstrip() for line in top.splitlines()) + "\n"


def _table(kinds: Mapping[str, float], wall_ms: float, num_threads: int) -> Iterator[str]:
    whole_ms = wall_ms * num_threads
    rest = {_PYTHON: max(0.0, whole_ms - sum(kinds.values()))}
    threads = "1 thread" if num_threads == 1 else f"{num_threads} threads"
    yield f"{'kind':52} {'ms a step':>10} {'of ' + threads:>14}"
    for kind, value in [*sorted(kinds.items(), key=lambda item: -item[1]), *rest.items()]:
        yield f"{kind:52} {value:10.2f} {value / whole_ms:14.1%}"


def _by_kind(events: Sequence[Any], shapes: Shapes) -> tuple[dict[str, float], int]:
    """Milliseconds of one step in each kind, and the number of threads that computed."""
    kinds: defaultdict[str, float] = defaultdict(float)
    threads: defaultdict[int, float] = defaultdict(float)
    for event in events:
        space = event.name.rpartition("::")[0]
        if not space or space.startswith("autograd"):
            continue  # an autograd node or a range of ours: what is its own is overhead
        own_ms = event.self_cpu_time_total / 1000 / _STEPS
        threads[event.thread] += own_ms
        kinds[_kind(event, shapes)] += own_ms
    # torch's own helpers appear with an operation or two; a thread of the engine has its share.
    return dict(kinds), sum(ms > 0.05 * max(threads.values()) for ms in threads.values())


def _kind(event: Any, shapes: Shapes) -> str:
    names = [event.name.lower()]
    parent = event.cpu_parent
    while parent is not None:
        names.append(parent.name.lower())
        parent = parent.cpu_parent
    sizes = [tuple(shape) for shape in event.input_shapes or () if shape]
    vocab_size = shapes.head[1]
    if _OPTIMIZER in names:
        return "optimizer"
    if any("attention" in name or "sdp" in name or "sdpa" in name for name in names):
        return "attention"
    if names[0].rpartition("::")[2].rstrip("_") in _PRODUCTS:
        return _product(sizes, shapes)
    if any(vocab_size in size or vocab_size * size[0] in size for size in sizes):
        return "loss: element by element over the vocabulary"
    if any("norm" in name for name in names):
        return "norms"
    return "other: activations, rotary positions, sums, copies"


def _product(sizes: Sequence[tuple[int, ...]], shapes: Shapes) -> str:
    known = shapes.weights | {shapes.head}
    matrices = [size[-2:] for size in sizes if len(size) >= 2]
    of_model = [s for m in matrices for s in (m, m[::-1]) if s in known]
    # A matrix of tokens may by chance have the shape of a weight, but then the other one is thin.
    if not of_model or any(dim in shapes.adapter_widths for matrix in matrices for dim in matrix):
        return "LoRA products"
    return "base products: head" if shapes.head in of_model else "base products: body"
