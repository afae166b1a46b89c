"""The two passes through the base model that sampling is made of: prefill and decode.

Shapes: B rows, L padded length, D hidden size, V vocabulary.
"""

from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.lora import BatchPlan
from twinkle_dask.model.vision import Patch
from twinkle_dask.sampler.drawing import DrawRules, draw
from twinkle_dask.sampler.kv_cache import SlotCache
from twinkle_dask.sampler.lanes import Lane
from twinkle_dask.sampler.masks import DecodeMasks
from twinkle_dask.sampler.plans import segments_of
from twinkle_dask.sampler.sequences import Job, Sequence
from twinkle_dask.types import Float32Array, Int32Array

# A request for a thousand samples draws their first tokens from one row of logits, repeated.
_ROWS_PER_DRAW = 64


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token for a sequence; a logprob of NaN says that the logits were not finite.

    ``top`` are the likeliest tokens and their logprobs, for a request that wants them.
    """

    sequence: Sequence
    token: int
    logprob: float
    top: tuple[Int32Array, Float32Array] | None = None


class Passes:
    """Runs passes for one base model. Knows nothing of whose turn it is."""

    def __init__(self, base: BaseModel, masks: DecodeMasks) -> None:
        self._base = base
        self._masks = masks
        # Per lane, for the lane's version: what stays the same from step to step.
        self._kept: dict[Lane, tuple[int, BatchPlan, DrawRules]] = {}

    def prefill(self, jobs: Several[Job], length: int) -> list[Drawn]:
        """Put the next tokens of some prefills into their cache, the jobs' rows being 0, 1, 2...

        All stand at the same place; rows of one adapter are neighbours. Rows with fewer than
        ``length`` tokens to come are padded on the right, which causal attention does not see.

        Returns:
            The next token of each waiting sequence of every job that is complete now.
        """
        base, past, cache = self._base, jobs[0].done, jobs[0].cache
        if cache is None:
            raise ValueError("a prefill needs a cache")
        pieces = [job.tokens[past : past + length] for job in jobs]
        padded = [piece + [0] * (length - len(piece)) for piece in pieces]
        plan = BatchPlan(segments_of([job.request.adapter for job in jobs]))
        patches = _patches(base, jobs, past, length)
        hidden_BLD = chunk_hidden(base, plan, cache, padded, past, patches)
        ends = [len(piece) - 1 for piece in pieces]
        for row, (job, piece) in enumerate(zip(jobs, pieces, strict=True)):
            job.done = past + len(piece)
            if job.scores is not None:
                # What follows the last position is not of the prompt; it is drawn.
                hidden_ND = hidden_BLD[row, : min(len(piece), len(job.tokens) - 1 - past)]
                its_plan = BatchPlan(segments_of([job.request.adapter]))
                job.scores.fill(base.head, hidden_ND, past, its_plan)
        waiting = [
            (row, sequence)
            for row, job in enumerate(jobs)
            if job.done == len(job.tokens)
            for sequence in job.sequences
        ]
        if not waiting:
            return []
        last_B1D = hidden_BLD[torch.arange(len(jobs)), torch.tensor(ends)].unsqueeze(1)
        logits_BV = base.head.logits(last_B1D, plan)[:, 0]
        drawn: list[Drawn] = []
        for start in range(0, len(waiting), _ROWS_PER_DRAW):
            drawn += _first(waiting[start : start + _ROWS_PER_DRAW], logits_BV)
        return drawn

    def decode(self, lane: Lane, rows: slice) -> list[Drawn]:
        """The next token of some neighbouring rows of a lane, which has room for one more each."""
        base, sequences = self._base, lane.rows[rows]
        plan, rules = self._settings(lane, rows)
        hidden_B1D = decode_hidden(
            base,
            plan,
            lane.cache,
            self._masks,
            rows,
            tokens=[sequence.tokens[-1] for sequence in sequences],
            positions=[sequence.num_cached for sequence in sequences],
        )
        logits_BV = base.head.logits(hidden_B1D, plan)[:, 0]
        return _draw(sequences, logits_BV, rules)

    def _settings(self, lane: Lane, rows: slice) -> tuple[BatchPlan, DrawRules]:
        whole = rows == slice(0, len(lane.rows))
        kept = self._kept.get(lane)
        if whole and kept is not None and kept[0] == lane.version:
            return kept[1], kept[2]
        head_VD = self._base.head.weight_VD
        plan = lane.plan(rows)
        rules = _rules(lane.rows[rows], head_VD.shape[0], head_VD.device)
        if whole:
            self._kept[lane] = lane.version, plan, rules
        return plan, rules


def decode_hidden(
    base: BaseModel,
    plan: BatchPlan,
    cache: SlotCache,
    masks: DecodeMasks,
    rows: slice,
    *,
    tokens: list[int],
    positions: list[int],
) -> Tensor:
    """Hidden states (B, 1, D) of one token for each of ``rows``, at its own position."""
    tokens_B1 = torch.tensor(tokens, device=base.device).unsqueeze(1)
    positions_B = torch.tensor(positions, device=base.device)
    num_keys = cache.begin_decode(rows, positions_B, longest=max(positions) + 1)
    # Transformers takes a mask for each type of layer as well; BaseModel hands on what it gets.
    mask = cast("Any", masks.of(positions_B, num_keys))
    return base.hidden(
        tokens_B1, plan, positions_BL=positions_B.unsqueeze(1), attention_mask=mask, cache=cache
    )


def chunk_hidden(
    base: BaseModel,
    plan: BatchPlan,
    cache: SlotCache,
    tokens: list[list[int]],
    past: int,
    patches: Several[Patch] = (),
) -> Tensor:
    """Hidden states (B, L, D) of the next tokens of the cache's first rows, all at ``past``."""
    tokens_BL = torch.tensor(tokens, device=base.device)
    rows, length = tokens_BL.shape
    cache.begin_chunk(rows=rows, past=past, length=length)
    positions_BL = torch.arange(past, past + length, device=base.device).unsqueeze(0)
    return base.hidden(tokens_BL, plan, positions_BL=positions_BL, cache=cache, patches=patches)


def _patches(base: BaseModel, jobs: Several[Job], past: int, length: int) -> list[Patch]:
    """What lies within ``length`` positions from ``past`` of the jobs' images."""
    patches: list[Patch] = []
    for row, job in enumerate(jobs):
        owner = job.request.work.tenant
        for image in job.request.work.request.images:
            start = max(image.position, past)
            stop = min(image.position + image.num_positions, past + length)
            if start < stop:
                look_PD = base.look([[image]], owner)[image.data]
                part_PD = look_PD[start - image.position : stop - image.position]
                patches.append(Patch(row * length + start - past, part_PD))
    return patches


def _first(some: Several[tuple[int, Sequence]], logits_BV: Tensor) -> list[Drawn]:
    rows_N = torch.tensor([row for row, _ in some], device=logits_BV.device)
    sequences = [sequence for _, sequence in some]
    rules = _rules(sequences, logits_BV.shape[-1], logits_BV.device)
    return _draw(sequences, logits_BV[rows_N], rules)


def _rules(sequences: Several[Sequence], vocab_size: int, device: torch.device) -> DrawRules:
    params = [sequence.params for sequence in sequences]
    num_top = [sequence.request.work.request.topk_sample_logprobs for sequence in sequences]
    return DrawRules.of(params, vocab_size, device, num_top)


def _draw(sequences: Several[Sequence], logits_BV: Tensor, rules: DrawRules) -> list[Drawn]:
    numbers = [sequences[row].uniforms.at(len(sequences[row].tokens)) for row in rules.random_rows]
    seen_PV = _seen([sequences[row] for row in rules.penalised_rows], logits_BV)
    tokens, logprobs, top = draw(logits_BV, rules, numbers, seen_PV)
    return [
        Drawn(sequence, token, logprob, top.get(row))
        for row, (sequence, token, logprob) in enumerate(
            zip(sequences, tokens, logprobs, strict=True)
        )
    ]


def _seen(sequences: Several[Sequence], logits_BV: Tensor) -> Tensor | None:
    """Which tokens occurred in each of these sequences, their prompts included (P, V)."""
    if not sequences:
        return None
    vocab_size, device = logits_BV.shape[-1], logits_BV.device
    masks = [sequence.request.prompt_mask_V(vocab_size, device) for sequence in sequences]
    prompts_PV = torch.stack(masks)
    rows = [row for row, sequence in enumerate(sequences) for _ in sequence.tokens]
    drawn = [token for sequence in sequences for token in sequence.tokens]
    prompts_PV[rows, drawn] = True
    return prompts_PV
