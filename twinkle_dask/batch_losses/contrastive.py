"""Losses of embeddings: who belongs together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from twinkle_dask.batch_losses.batch import Float64Array
from twinkle_dask.batch_losses.numbers import log_softmax
from twinkle_dask.batch_losses.specs import BatchLossSpec
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import Int64Array

MAX_COMPARISONS: Final = 2**23
"""Anchors times documents of a batch."""


@dataclass(frozen=True, slots=True)
class _Groups:
    """Rows by their part, G groups: ``documents_M`` holds positives and negatives of all groups.

    Attributes:
        first_G: Place of each group's positive among the documents.
        group_M: The group of each document.
    """

    anchors_G: Int64Array
    documents_M: Int64Array
    first_G: Int64Array
    group_M: Int64Array


def contrast(
    spec: BatchLossSpec, labels: Sequence[int], embeddings_SD: NDArray[np.floating]
) -> tuple[float, Float64Array]:
    """InfoNCE, and its derivative by the embeddings (S, D).

    For each group the cross entropy of its positive among candidates, whose logits are dot
    products over ``temperature``; the mean over groups. Candidates are the documents (positives
    and negatives) of the group, or with ``use_batch`` of all groups; with ``include_qq`` also the
    other anchors, and with ``include_dd`` also the documents as seen from the group's positive.
    ``mask_fake_negative`` leaves out what is nearer to the anchor than its positive by more than
    ``fake_neg_margin``, not among the last. Sources: https://arxiv.org/abs/1807.03748, equation 4;
    https://arxiv.org/abs/2506.05176, section 3 (the masks and further candidates).

    ``hard_negatives`` fixes the number of negatives: more are cut off, fewer are repeated in
    order. (Twinkle draws the repeated ones, and may draw the positive as a negative.)

    Args:
        spec: Of InfonceLoss.
        labels: Of each row, 1 where a group begins: anchor, positive, then its negatives.
        embeddings_SD: Of the rows.

    Raises:
        InvalidRequest: The labels make no groups or too many candidates, or an embedding, the loss
            or a slope is not a number.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # found at the end
        value, slopes_SD = _contrast(spec, labels, embeddings_SD)
    if not (np.isfinite(value) and np.isfinite(slopes_SD).all()):
        raise InvalidRequest(
            "The loss of this batch or its derivative is NaN or infinite; its temperature of "
            f"{spec.settings['temperature']:g} may be too low."
        )
    return value, slopes_SD


def _contrast(
    spec: BatchLossSpec, labels: Sequence[int], embeddings_SD: NDArray[np.floating]
) -> tuple[float, Float64Array]:
    settings = spec.settings
    groups = _groups(labels, settings["hard_negatives"])
    x_SD = embeddings_SD.astype(np.float64)
    if not (finite_S := np.isfinite(x_SD).all(axis=1)).all():
        raise InvalidRequest(
            f"Row {int(np.argmin(finite_S))}: its embedding is not finite (nor the weights, "
            "perhaps); load a checkpoint."
        )
    queries_GD, documents_MD = x_SD[groups.anchors_G], x_SD[groups.documents_M]
    num_groups = len(groups.anchors_G)
    every_G = np.arange(num_groups)
    near_GM = queries_GD @ documents_MD.T
    blocks = [near_GM]
    if not settings["use_batch"]:
        blocks[0] = np.where(groups.group_M == every_G[:, None], near_GM, -np.inf)
    elif settings["include_qq"]:
        between_GG = queries_GD @ queries_GD.T
        np.fill_diagonal(between_GG, -np.inf)
        blocks.append(between_GG)
    if settings["use_batch"] and settings["mask_fake_negative"]:
        bound_G1 = near_GM[every_G, groups.first_G, None] + settings["fake_neg_margin"]
        blocks = [np.where(block > bound_G1, -np.inf, block) for block in blocks]
    positives_GD = documents_MD[groups.first_G]
    if with_documents := settings["use_batch"] and settings["include_dd"]:
        beside_GM = positives_GD @ documents_MD.T
        beside_GM[every_G, groups.first_G] = -np.inf
        blocks.append(beside_GM)
    logits_GC = np.concatenate(blocks, axis=1) / settings["temperature"]
    log_p_GC = log_softmax(logits_GC)
    value = -float(log_p_GC[every_G, groups.first_G].mean())

    slope_GC = np.exp(log_p_GC)
    slope_GC[every_G, groups.first_G] -= 1.0
    slope_GC /= num_groups * settings["temperature"]
    parts = np.split(slope_GC, np.cumsum([block.shape[1] for block in blocks])[:-1], axis=1)
    by_query_GD = parts[0] @ documents_MD
    by_document_MD = parts[0].T @ queries_GD
    if settings["use_batch"] and settings["include_qq"]:
        by_query_GD += parts[1] @ queries_GD + parts[1].T @ queries_GD
    if with_documents:
        by_document_MD += parts[-1].T @ positives_GD
        np.add.at(by_document_MD, groups.first_G, parts[-1] @ documents_MD)
    slopes_SD = np.zeros_like(x_SD)
    np.add.at(slopes_SD, groups.anchors_G, by_query_GD)
    np.add.at(slopes_SD, groups.documents_M, by_document_MD)
    return value, slopes_SD


def _groups(labels: Sequence[int], hard_negatives: int | None) -> _Groups:
    starts = [index for index, label in enumerate(labels) if label]
    if not starts or starts[0] != 0:
        raise InvalidRequest(
            "The rows must be groups of an anchor (label 1), its positive and its negatives (label "
            "0 each); the first row begins none."
        )
    _bound(starts, labels, hard_negatives)
    documents: list[int] = []
    first: list[int] = []
    group_of: list[int] = []
    for group, (start, end) in enumerate(zip(starts, [*starts[1:], len(labels)], strict=True)):
        if end - start < 2:
            raise InvalidRequest(
                f"Row {start} is an anchor (label 1) and has no positive after it."
            )
        negatives = list(range(start + 2, end))
        if hard_negatives is not None:
            if not negatives:
                raise InvalidRequest(
                    f"Row {start}: hard_negatives is {hard_negatives}, but the group has none."
                )
            negatives = [negatives[i % len(negatives)] for i in range(hard_negatives)]
        first.append(len(documents))
        documents += [start + 1, *negatives]
        group_of += [group] * (1 + len(negatives))
    return _Groups(np.array(starts), np.array(documents), np.array(first), np.array(group_of))


def _bound(starts: list[int], labels: Sequence[int], hard_negatives: int | None) -> None:
    """Before anything is made: each group is compared with all documents."""
    num_groups = len(starts)
    documents = len(labels) - num_groups
    if hard_negatives is not None:
        documents = num_groups * (hard_negatives + 1)
    if num_groups * documents > MAX_COMPARISONS:
        raise InvalidRequest(
            f"{num_groups} groups with {documents} documents make {num_groups * documents} "
            f"comparisons; send at most {MAX_COMPARISONS}: fewer groups, or fewer hard_negatives."
        )
