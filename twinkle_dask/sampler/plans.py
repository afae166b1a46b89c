"""Batch plans for rows in order: neighbours of one adapter are one segment, a slice.

The base model multiplies decoding rows with all their adapters stacked side by side. The stacks
hold copies of the adapters' weights, so making them takes about as long as a decode step (157 ms
for 8 adapters of rank 16 on SmolLM2-135M, a step being 124 ms). They depend on which adapters there
are, but not on which rows; ``PlanMaker`` therefore keeps them while rows come and go.
"""

from dataclasses import replace

import torch
from torch import Tensor

from twinkle_dask.model.lora import BatchPlan, LoraTensors, Segment, Stack


def segments_of(adapters: list[LoraTensors | None]) -> tuple[Segment, ...]:
    """The segments of rows that wear these adapters; rows of the base model have none."""
    segments: list[Segment] = []
    start = 0
    for row in range(1, len(adapters) + 1):
        if row == len(adapters) or adapters[row] is not adapters[start]:
            if (adapter := adapters[start]) is not None:
                segments.append(Segment(rows=slice(start, row), adapter=adapter))
            start = row
    return tuple(segments)


class PlanMaker:
    """Makes one lane's plans, one after the other."""

    def __init__(self) -> None:
        self._adapters: list[LoraTensors] = []
        self._stacks: dict[str, Stack | None] = {}

    def plan(self, adapters: list[LoraTensors | None]) -> BatchPlan:
        """The plan for rows that wear these adapters."""
        segments = segments_of(adapters)
        worn = [segment.adapter for segment in segments]
        if worn != self._adapters:
            self._adapters, self._stacks = worn, {}
        return _KeepingPlan(segments, self._stacks)


class _KeepingPlan(BatchPlan):
    """A plan that takes stacked weights from the plan before it, and leaves them for the next."""

    def __init__(self, segments: tuple[Segment, ...], stacks: dict[str, Stack | None]) -> None:
        super().__init__(segments)
        self._kept = stacks
        self._mine: dict[str, Stack | None] = {}
        self._columns: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def stack(self, module_path: str, num_rows: int) -> Stack | None:
        """See ``BatchPlan.stack``; ``num_rows`` is the same in every call."""
        if module_path not in self._mine:
            if module_path not in self._kept:
                self._kept[module_path] = super().stack(module_path, num_rows)
            stack = self._kept[module_path]
            if stack is not None:
                scale_BS, others_BS = self._own_columns(module_path, num_rows)
                stack = replace(stack, scale_BS=scale_BS, others_BS=others_BS)
            self._mine[module_path] = stack
        return self._mine[module_path]

    def _own_columns(self, module_path: str, num_rows: int) -> tuple[Tensor, Tensor]:
        """For each row and column of a stack, the scale, and whether it is another adapter's."""
        worn = self.worn(module_path)
        # Most modules have the same, as adapters differ in rank but seldom in what they adapt.
        ranks = tuple(len(item.a_RD) for item in worn)
        key = tuple(id(item.segment) for item in worn)
        if key not in self._columns:
            scale_BS = torch.zeros(num_rows, sum(ranks), device=worn[0].a_RD.device)
            start = 0
            for item, rank in zip(worn, ranks, strict=True):
                scale_BS[item.segment.rows, start : start + rank] = item.segment.adapter.scale
                start += rank
            self._columns[key] = scale_BS, scale_BS == 0
        return self._columns[key]
