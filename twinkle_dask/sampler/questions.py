"""The four things a request may want to know about its prompt.

Each question is asked at some *places*: indices of the prompt's tokens, from 1, since nothing comes
before the first one that could say how likely it is. The logits of a place are those of the
position before it. Answers are made when the first of them comes: a request that waits holds none.

Shapes: N tokens of the prompt, P places of a piece, V vocabulary, K tokens at a place, M targets.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.sampler.drawing import PlacedUniforms, draw_many, likeliest
from twinkle_dask.types import (
    Float32Array,
    Image,
    Int32Array,
    Int64Array,
    ScoredTokens,
    TargetLogprobs,
    TargetTokens,
)

Places = NDArray[np.intp]


class Question(Protocol):
    """Something to know about a prompt."""

    def places(self) -> Places:
        """Where, in order."""
        ...

    def score(self, logits_PV: Tensor, total_P1: Tensor, places_P: Places) -> None:
        """Answer for some of the places.

        Args:
            logits_PV: float32.
            total_P1: Their logsumexp.
            places_P: In order, some of the question's own.
        """
        ...


class OwnLogprobs:
    """How likely the prompt's own tokens are, from one place on.

    Where an image stands there is a placeholder, which is no token of the prompt.
    """

    def __init__(self, prompt_N: Int32Array, first: int, images: Sequence[Image] = ()) -> None:
        self._prompt_N = prompt_N
        self._first = first
        self._images = images

    def places(self) -> Places:
        """See ``Question.places``."""
        places = np.arange(self._first, len(self._prompt_N))
        for image in self._images:
            end = image.position + image.num_positions
            places = places[(places < image.position) | (places >= end)]
        return places

    def score(self, logits_PV: Tensor, total_P1: Tensor, places_P: Places) -> None:
        """See ``Question.score``."""
        own_P = torch.as_tensor(self._prompt_N[places_P].astype(np.int64)).to(logits_PV.device)
        found_P1 = logits_PV.gather(-1, own_P.unsqueeze(-1)) - total_P1
        self.answer[places_P] = found_P1.squeeze(-1).cpu().numpy()

    @cached_property
    def answer(self) -> Float32Array:
        """float32 (N,)."""
        return np.full(len(self._prompt_N), np.nan, dtype=np.float32)


class LikeliestTokens:
    """The K likeliest tokens, likeliest first, from one place on."""

    def __init__(self, num_places: int, first: int, width: int) -> None:
        self._num_places = num_places
        self._first = first
        self._width = width

    def places(self) -> Places:
        """See ``Question.places``."""
        return np.arange(self._first, self._num_places)

    def score(self, logits_PV: Tensor, total_P1: Tensor, places_P: Places) -> None:
        """See ``Question.score``."""
        tokens_PK = likeliest(logits_PV, self._width)
        _note(self.answer, places_P, tokens_PK, logits_PV, total_P1)

    @cached_property
    def answer(self) -> ScoredTokens:
        """(N, K)."""
        return _nothing_yet(self._num_places, self._width)


class DrawnAlternatives:
    """K tokens drawn at every place, independently, at a temperature and nothing else."""

    def __init__(
        self, num_places: int, width: int, *, temperature: float, seed: int | None
    ) -> None:
        self._num_places = num_places
        self._width = width
        self._temperature = temperature
        self._uniforms = PlacedUniforms(seed, width)

    def places(self) -> Places:
        """See ``Question.places``."""
        return np.arange(1, self._num_places)

    def score(self, logits_PV: Tensor, total_P1: Tensor, places_P: Places) -> None:
        """See ``Question.score``."""
        # All places are wanted, so those of a piece are neighbours.
        numbers_PK = self._uniforms.at(int(places_P[0]), len(places_P))
        tokens_PK = draw_many(logits_PV, self._temperature, numbers_PK)
        _note(self.answer, places_P - 1, tokens_PK, logits_PV, total_P1)

    @cached_property
    def answer(self) -> ScoredTokens:
        """(N - 1, K)."""
        return _nothing_yet(self._num_places - 1, self._width)


class NamedTokens:
    """How likely some tokens are that the request names."""

    def __init__(self, targets: TargetTokens, num_places: int, vocab_size: int) -> None:
        """Look where there is a token.

        Raises:
            InvalidRequest: The rows are not those of the prompt, or a token is outside of the
                vocabulary, which on a GPU would end the process.
        """
        tokens, layout = targets.tokens, targets.layout
        if layout is None:
            shape = tokens.shape
            row_of_cell = np.repeat(np.arange(len(tokens)), shape[1] if len(shape) == 2 else 0)
        else:
            shape = (len(layout.crow) - 1, layout.num_columns)
            row_of_cell = np.repeat(np.arange(shape[0]), np.diff(layout.crow))
        if len(shape) != 2 or shape[0] != num_places - 1 or len(row_of_cell) != tokens.size:
            raise InvalidRequest("Targets must have a row for each token of the prompt but one.")
        self._targets = targets
        self._cells_M = np.flatnonzero(tokens.reshape(-1) >= 0)
        self._tokens_M: Int64Array = tokens.reshape(-1)[self._cells_M]
        self._places_M: Places = row_of_cell[self._cells_M] + 1
        if self._tokens_M.max(initial=0) >= vocab_size:
            raise InvalidRequest("There are targets outside of the vocabulary.")

    def places(self) -> Places:
        """See ``Question.places``."""
        return np.unique(self._places_M)

    def score(self, logits_PV: Tensor, total_P1: Tensor, places_P: Places) -> None:
        """See ``Question.score``."""
        low, high = np.searchsorted(self._places_M, [places_P[0], places_P[-1] + 1])
        rows = np.searchsorted(places_P, self._places_M[low:high])
        rows_M = torch.as_tensor(rows).to(logits_PV.device)
        tokens_M = torch.as_tensor(self._tokens_M[low:high]).to(logits_PV.device)
        found_M = logits_PV[rows_M, tokens_M] - total_P1.squeeze(-1)[rows_M]
        self.answer.logprobs.reshape(-1)[self._cells_M[low:high]] = found_M.cpu().numpy()

    @cached_property
    def answer(self) -> TargetLogprobs:
        """In the shape and layout of the targets."""
        logprobs = np.zeros(self._targets.tokens.shape, dtype=np.float32)
        return TargetLogprobs(logprobs=logprobs, layout=self._targets.layout)


def _nothing_yet(num_places: int, width: int) -> ScoredTokens:
    return ScoredTokens(
        tokens=np.zeros((num_places, width), dtype=np.int32),
        logprobs=np.full((num_places, width), np.nan, dtype=np.float32),
    )


def _note(
    answer: ScoredTokens, rows: Places, tokens_PK: Tensor, logits_PV: Tensor, total_P1: Tensor
) -> None:
    answer.tokens[rows] = tokens_PK.cpu().numpy()
    answer.logprobs[rows] = (logits_PV.gather(-1, tokens_PK) - total_P1).cpu().numpy()
