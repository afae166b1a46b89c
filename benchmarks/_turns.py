"""Things that are compared take turns, so that each meets the same machine as its neighbours."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks._common import median


@dataclass(frozen=True, slots=True)
class Contender:
    """One thing that is measured.

    Attributes:
        step: Done over and over for as long as a window lasts, at least once.
        amount: How much one step achieves: tokens, or floating-point operations.
    """

    step: Callable[[], object]
    amount: float


@dataclass(frozen=True, slots=True)
class Rates:
    """Amount per second of each contender in each round."""

    windows: Mapping[str, list[float]]

    def of(self, name: str) -> float:
        """Median over the rounds."""
        return median(self.windows[name])

    def ratio(self, name: str, other: str, factor: float = 1.0) -> float:
        """Median over the rounds of ``factor * name / other``, both from one round."""
        pairs = zip(self.windows[name], self.windows[other], strict=True)
        return round(statistics.median(factor * a / b for a, b in pairs), 3)

    def rounded(self) -> dict[str, list[float]]:
        """All windows, for the record."""
        return {name: [float(f"{v:.4g}") for v in values] for name, values in self.windows.items()}


def in_turns(contenders: Mapping[str, Contender], *, quick: bool) -> Rates:
    """Warm each up with a step, then give each a window in each round."""
    window_s, rounds = (0.0, 1) if quick else (3.0, 5)
    for contender in contenders.values():
        contender.step()
    windows: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            windows[name].append(_window(contender, window_s))
    return Rates(windows)


def _window(contender: Contender, window_s: float) -> float:
    start_s = time.perf_counter()
    steps = 0
    while not steps or time.perf_counter() - start_s < window_s:
        contender.step()
        steps += 1
    return steps * contender.amount / (time.perf_counter() - start_s)
