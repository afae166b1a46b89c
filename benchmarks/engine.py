"""The training engine in this process, beside a plain PEFT loop and the bare matrix products.

Windows of the compared things take turns; ratios are of neighbouring windows, medians over rounds.
A share is what a step uses of a matrix rate: 4 operations per weight and token, over that rate.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import Options, common_parser, machine, prepared, report
from benchmarks._inprocess import Engine, Rows, Training, num_tokens
from benchmarks._plain import PeftLoop
from benchmarks._products import OPERATIONS_PER_WEIGHT, ModelProducts, SquareProduct
from benchmarks._profile import Shapes, profile_step
from benchmarks._turns import Contender, Rates, in_turns
from tests.blackbox.data import random_tokens
from twinkle_dask.trainer.engine import TrainerConfig
from twinkle_dask.types import LoraSpec

_LEARNING_RATE = 1e-4
_ROWS, _LENGTH = 8, 128
_RANK = 32
_RANKS = (4, 8, 16, 16, 32, 32, 64, 64)  # 29.5 on average
_RAGGED = (20, 500)
_RAGGED_ROWS = 16
# All at once need 1.6 GB for SmolLM2's float32 logits alone, and as much again for each copy.
_PEFT_ROWS_AT_ONCE = 4
_SQUARE = {"float32": 2048, "bfloat16": 4096}


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="only write a profile of a step, as text"
    )
    given = parser.parse_args()
    with prepared(given) as asked:
        bench = Bench(asked)
        if given.profile is not None:
            given.profile.write_text(bench.profile())
            print(f"written to {given.profile}", file=sys.stderr)
            return
        results = [bench.one_tenant(), bench.eight_tenants(), bench.ragged()]
    report("engine", asked, results, [table_row(one) for one in results])


class Bench:
    """What all cases share: engines with their runs, and the limit."""

    def __init__(self, asked: Options) -> None:
        self._asked = asked
        self._rows, self._length = (2, 16) if asked.quick else (_ROWS, _LENGTH)
        self._engine = Engine.load(asked)
        base = self._engine.base
        self._shapes = [
            (target.in_features, target.out_features)
            for target in base.targets(LoraSpec(rank=1, seed=1))
        ]
        self._operations = OPERATIONS_PER_WEIGHT * sum(d * e for d, e in self._shapes)

    def one_tenant(self) -> dict[str, Any]:
        """One run of rank 32, all rows of one length."""
        rows = self._even_rows()
        tokens = num_tokens(rows)
        rates = self._rates(
            {
                "engine": _engine(self._engine, [_RANK], [rows]),
                "deterministic": _engine(self._deterministic(), [_RANK], [rows]),
                "peft": self._peft([_RANK], [rows]),
            },
            tokens,
        )
        return self._result("one tenant", rows, [_RANK], rates)

    def eight_tenants(self) -> dict[str, Any]:
        """The same rows from as many tenants, whose ranks differ."""
        rows = self._even_rows()
        each = [[row] for row in rows]
        ranks = _RANKS[: len(rows)]
        rates = self._rates(
            {
                "engine": _engine(self._engine, ranks, each),
                "one_tenant": _engine(self._engine, [_RANK], [rows]),
                # As many weights as all eight have, for one optimizer: what sharing itself costs.
                "as_many_weights": _engine(self._engine, [min(256, sum(ranks))], [rows]),
                "deterministic": _engine(self._deterministic(), ranks, each),
                "peft": self._peft(ranks, each),
            },
            num_tokens(rows),
        )
        return self._result("eight tenants", rows, ranks, rates)

    def ragged(self) -> dict[str, Any]:
        """One run of rank 32, rows of very different lengths."""
        shortest, longest = (4, 24) if self._asked.quick else _RAGGED
        num = 4 if self._asked.quick else _RAGGED_ROWS
        # From short to long in even steps, in an order that has nothing to do with length.
        lengths = [shortest + (longest - shortest) * (i * 5 % num) // (num - 1) for i in range(num)]
        rows = [random_tokens(length + 1, seed) for seed, length in enumerate(lengths)]
        rates = self._rates(
            {
                "engine": _engine(self._engine, [_RANK], [rows]),
                "peft": self._peft([_RANK], [rows], rows_at_once=_PEFT_ROWS_AT_ONCE),
            },
            num_tokens(rows),
        )
        return self._result("ragged", rows, [_RANK], rates)

    def profile(self) -> str:
        """Where the time goes, for one tenant and for eight."""
        rows = self._even_rows()
        texts = [f"{self._asked.label}; {machine()['cpu']}, torch {torch.__version__}\n"]
        cases: list[tuple[Sequence[int], Sequence[Rows]]] = [
            ([_RANK], [rows]),
            (_RANKS[: len(rows)], [[row] for row in rows]),
        ]
        for ranks, batches in cases:
            training = Training(self._engine, ranks, batches)
            shapes = Shapes(frozenset(self._shapes[:-1]), self._shapes[-1], frozenset(ranks))
            title = f"== {len(rows)} rows of {self._length}, ranks {list(ranks)}"
            texts.append(profile_step(title, shapes, training.forward_backward, training.optim))
        return "\n".join(texts)

    def _even_rows(self) -> Rows:
        return [random_tokens(self._length + 1, seed) for seed in range(self._rows)]

    def _deterministic(self) -> Engine:
        return Engine.load(self._asked, TrainerConfig(deterministic=True))

    def _peft(
        self, ranks: Sequence[int], batches: Sequence[Rows], rows_at_once: int | None = None
    ) -> Contender:
        loop = PeftLoop(self._asked, ranks)

        def step() -> None:
            for adapter, rows in enumerate(batches):
                loop.step(adapter, rows, _LEARNING_RATE, rows_at_once)

        return Contender(step, sum(map(num_tokens, batches)))

    def _rates(self, contenders: Mapping[str, Contender], tokens: int) -> Rates:
        """All in turns, with the limits: both of them in floating-point operations a second."""
        base, quick = self._engine.base, self._asked.quick
        own = ModelProducts(self._shapes, tokens, base.dtype, base.device)
        square = SquareProduct(
            256 if quick else _SQUARE[self._asked.dtype], base.dtype, base.device
        )
        limits = {
            "own_shapes": Contender(own.step, own.operations),
            "square": Contender(square.step, square.operations),
        }
        return in_turns({**contenders, **limits}, quick=quick)

    def _result(self, case: str, rows: Rows, ranks: Sequence[int], rates: Rates) -> dict[str, Any]:
        trainers = [name for name in rates.windows if name not in {"own_shapes", "square"}]
        return {
            "case": case,
            "lengths": [len(row) - 1 for row in rows],
            "ranks": list(ranks),
            "tokens_per_s": {name: rates.of(name) for name in trainers},
            "gemm_gflops": {
                name: round(rates.of(name) / 1e9, 1) for name in ("own_shapes", "square")
            },
            "engine_over": {
                name: rates.ratio("engine", name) for name in trainers if name != "engine"
            },
            "share": {
                name: {
                    limit: rates.ratio(name, limit, self._operations)
                    for limit in ("own_shapes", "square")
                }
                for name in trainers
            },
            "windows": rates.rounded(),
        }


def _engine(engine: Engine, ranks: Sequence[int], batches: Sequence[Rows]) -> Contender:
    training = Training(engine, ranks, batches)
    return Contender(training.step, training.tokens)


def table_row(one: dict[str, Any]) -> tuple[object, ...]:
    """For README.md."""
    speed, over, share = one["tokens_per_s"], one["engine_over"], one["share"]

    def shares(name: str) -> str:
        return f"{share[name]['square']:.0%} / {share[name]['own_shapes']:.0%}"

    return (
        one["case"],
        f"{speed['engine']:.0f}",
        f"{speed['peft']:.0f}",
        f"{over['peft']:.2f}",
        f"{over['one_tenant']:.2f}" if "one_tenant" in over else "",
        f"{over['as_many_weights']:.2f}" if "as_many_weights" in over else "",
        f"{1 / over['deterministic']:.2f}" if "deterministic" in over else "",
        shares("engine"),
        shares("peft"),
    )


if __name__ == "__main__":
    main()
