"""Answers about a prompt, in pieces: logits of all positions are never there at once.

Shapes: N positions, P places of a piece, V vocabulary, D hidden size.
"""

import numpy as np
import torch
from torch import Tensor

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.model.base import HeadProjection
from twinkle_dask.model.lora import BatchPlan
from twinkle_dask.sampler.questions import (
    DrawnAlternatives,
    LikeliestTokens,
    NamedTokens,
    OwnLogprobs,
    Places,
    Question,
)
from twinkle_dask.types import SampledSequence, SampleRequest, SampleResult

_LOGITS_PER_PIECE = 8 * 2**20  # 32 MiB of float32
# To look for the likeliest, or to draw, takes up to five times the logits' memory beside them.
_LOGITS_PER_PIECE_OF_MORE = 2 * 2**20


class PromptScores:
    """Everything a request wants to know about its prompt, answered while that is prefilled.

    A prefill that has to begin again answers the same once more.
    """

    def __init__(self, request: SampleRequest, vocab_size: int) -> None:
        """Note the questions.

        Raises:
            InvalidRequest: One of them cannot be answered for this prompt and vocabulary.
        """
        length = len(request.prompt)
        last_n = request.prompt_logprobs_last_n
        first = 1 if last_n is None else max(1, length - last_n)
        top, drawn = request.topk_prompt_logprobs, request.prompt_alt_tokens_k
        if not 0 <= top <= vocab_size or drawn < 0:
            raise InvalidRequest(f"A place has from 0 to {vocab_size} likeliest tokens.")
        self._own = None
        if request.prompt_logprobs:
            self._own = OwnLogprobs(request.prompt, first, request.images)
        self._top = LikeliestTokens(length, first, top) if top else None
        self._named = None
        if request.target_prompt_logprobs is not None:
            self._named = NamedTokens(request.target_prompt_logprobs, length, vocab_size)
        self._drawn = None
        if drawn:
            self._drawn = DrawnAlternatives(
                length, drawn, temperature=request.params.temperature, seed=request.params.seed
            )
        self._more = self._top is not None or self._drawn is not None
        self._asked = [(q, _mask(q.places(), length)) for q in self._questions()]
        self._wanted_N = np.zeros(length, dtype=np.bool_)
        for _, mask_N in self._asked:
            self._wanted_N |= mask_N

    def fill(self, head: HeadProjection, hidden_ND: Tensor, start: int, plan: BatchPlan) -> None:
        """Answer what is asked of the places after some positions.

        Args:
            head: The base model's.
            hidden_ND: Of consecutive positions of one row, the prompt's last not among them.
            start: The first of these positions.
            plan: The adapter of this one row.
        """
        places = np.flatnonzero(self._wanted_N[start + 1 : start + 1 + len(hidden_ND)]) + start + 1
        room = _LOGITS_PER_PIECE_OF_MORE if self._more else _LOGITS_PER_PIECE
        size = max(1, room // head.weight_VD.shape[0])
        for begin in range(0, len(places), size):
            places_P = places[begin : begin + size]
            here_PD = _rows(hidden_ND, places_P - (start + 1))
            logits_PV = head.logits(here_PD.unsqueeze(0), plan)[0]
            self._score(logits_PV, places_P)

    def result(self, sequences: tuple[SampledSequence, ...]) -> SampleResult:
        """The request's result, once the prefill is done."""
        return SampleResult(
            sequences=sequences,
            prompt_logprobs=self._own and self._own.answer,
            topk_prompt_logprobs=self._top and self._top.answer,
            target_prompt_logprobs=self._named and self._named.answer,
            prompt_alt_tokens=self._drawn and self._drawn.answer,
        )

    def _questions(self) -> list[Question]:
        asked: tuple[Question | None, ...] = (self._own, self._top, self._named, self._drawn)
        return [question for question in asked if question is not None]

    def _score(self, logits_PV: Tensor, places_P: Places) -> None:
        total_P1 = logits_PV.logsumexp(dim=-1, keepdim=True)
        for question, mask_N in self._asked:
            rows = np.flatnonzero(mask_N[places_P])
            if len(rows):
                question.score(_rows(logits_PV, rows), _rows(total_P1, rows), places_P[rows])


def wants_scores(request: SampleRequest) -> bool:
    """Whether a request has any question about its prompt."""
    return bool(
        request.prompt_logprobs
        or request.topk_prompt_logprobs
        or request.target_prompt_logprobs is not None
        or request.prompt_alt_tokens_k
    )


def _mask(places: Places, length: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    mask_N = np.zeros(length, dtype=np.bool_)
    mask_N[places] = True
    return mask_N


def _rows(matrix: Tensor, rows: Places) -> Tensor:
    """Some rows, in order; a view where they are neighbours, as they nearly always are."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        return matrix[first : last + 1]
    return matrix[torch.as_tensor(rows).to(matrix.device)]
