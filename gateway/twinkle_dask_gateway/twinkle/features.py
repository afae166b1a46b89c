"""What clients send as inputs, made rows of tokens.

An element is an input feature (it has ``input_ids``) or a trajectory (messages, which a template
encodes first); each is looked at for itself. A feature may be one row, flat or in one more list, or
a whole padded batch. What is padding in its attention mask is cut off, and a row in which
``position_ids`` begin anew is several rows. Labels are not shifted: a client's template has done so
(``labels[i]`` is predicted at position i).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.types import Int32Array, Int64Array, Json

IGNORED: Final = -100
#: What a feature may hold besides text: none of it reaches a model through this protocol.
_NOT_TEXT: Final = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "input_features",
    "input_features_mask",
    "feature_attention_mask",
    "grid_thws",
    "images",
    "videos",
    "audios",
)
_MAX_TOKEN: Final = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sequence without its padding.

    Attributes:
        tokens: int32 (N,).
        labels: int64 (N,), -100 where nothing is predicted; None if none were sent.
        start: Positions of padding before it, in the row as it was sent.
        length: Of the row as it was sent, or of its part of a packed row.
        group: For embeddings: the row's one label, if it has just one; see ``InfonceLoss``.
    """

    tokens: Int32Array
    labels: Int64Array | None
    start: int
    length: int
    group: int | None = None


def elements(inputs: Any) -> list[Json]:
    """The elements of ``inputs``, which is one of them or a list.

    Raises:
        InvalidRequest: It is neither, or there are none.
    """
    listed: Any = [inputs] if isinstance(inputs, dict) else inputs
    if not isinstance(listed, list):
        raise InvalidRequest(
            "inputs must be an input feature or a trajectory (an object), or a list of those."
        )
    found = cast(list[Any], listed)
    if not found:
        raise InvalidRequest("inputs are empty; send at least one element.")
    for index, element in enumerate(found):
        if not isinstance(element, dict):
            raise InvalidRequest(f"inputs[{index}] must be an object, not {_kind(element)}.")
    return cast(list[Json], found)


def is_trajectory(element: Json) -> bool:
    """Whether a template must encode the element first."""
    return element.get("input_ids") is None


def rows_of(features: Sequence[Json], *, first: int = 0) -> list[Row]:
    """The rows of input features, in order; messages count the features from ``first``.

    Raises:
        InvalidRequest: A feature is not what its fields say.
        NotSupported: It holds images, weights of tokens, or a mask that is no padding.
    """
    rows: list[Row] = []
    for index, feature in enumerate(features, first):
        rows += _rows(feature, f"inputs[{index}]")
    if not rows:
        raise InvalidRequest("inputs hold no tokens.")
    return rows


def padded(rows: Sequence[Row], values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Values of rows' tokens, (N, ...) each, where clients look for them: (B, T, ...), 0 elsewhere.

    T is the length of the longest row as it was sent.
    """
    longest = max(row.length for row in rows)
    out = np.zeros((len(rows), longest, *values[0].shape[1:]), values[0].dtype)
    for place, row, value in zip(out, rows, values, strict=True):
        place[row.start : row.start + len(value)] = value
    return out


def _rows(feature: Json, where: str) -> list[Row]:
    _refuse_what_is_no_text(feature, where)
    ids_BT = _matrix(feature["input_ids"], f"{where}.input_ids", integers=True)
    if ids_BT.size == 0:
        raise InvalidRequest(f"{where}.input_ids is empty.")
    if ids_BT.min() < 0 or ids_BT.max() > _MAX_TOKEN:
        raise InvalidRequest(f"{where}.input_ids must be token ids, from 0.")
    shape = ids_BT.shape
    mask_BT = _like(feature, "attention_mask", shape, where)
    places_BT = _positions(feature, shape, where)
    labels_BT, groups = _labels(feature, shape, where)
    counted = _like(feature, "completion_mask", shape, where)
    both = counted is not None and labels_BT is not None
    if both and ((labels_BT != IGNORED) & (counted == 0)).any():
        # The protocol's mask is a metric's affair; whoever sends it means more by it than that.
        raise NotSupported(
            f"{where}.completion_mask leaves out tokens that have labels; set their labels to "
            f"{IGNORED} instead."
        )
    rows: list[Row] = []
    for index in range(shape[0]):
        at = where if shape[0] == 1 else f"{where} row {index}"
        start, end = _unpadded(None if mask_BT is None else mask_BT[index], shape[1], at)
        labels = None if labels_BT is None else labels_BT[index]
        if mask_BT is None and places_BT is not None:
            # Padding without a mask, as packing leaves it, is at places of -1.
            start, end = _unpadded(places_BT[index] >= 0, shape[1], at)
        parts = [(start, end)]
        if places_BT is not None:
            parts = _parts(places_BT[index], start, end, at)
        for first, last in parts:
            whole = len(parts) == 1
            rows.append(
                Row(
                    tokens=ids_BT[index, first:last].astype(np.int32),
                    labels=None if labels is None else labels[first:last].astype(np.int64),
                    start=first if whole else 0,
                    length=shape[1] if whole else last - first,
                    group=None if groups is None else groups[index],
                )
            )
    return rows


def _labels(
    feature: Json, shape: tuple[int, int], where: str
) -> tuple[NDArray[Any] | None, list[int] | None]:
    """Labels of tokens, or one for each row."""
    sent = feature.get("labels")
    if sent is None:
        return None, None
    if isinstance(sent, int) and not isinstance(sent, bool):
        sent = [sent]
    labels = _matrix(sent, f"{where}.labels", integers=True)
    if labels.shape == shape and shape[1] > 1:
        return labels, None
    if labels.size == shape[0]:
        return (labels if labels.shape == shape else None), [int(one) for one in labels.flat]
    raise InvalidRequest(
        f"{where}: labels have shape {_told(labels.shape)} and input_ids {_told(shape)}; there is "
        "one label for each token, already shifted: labels[i] is predicted at position i."
    )


def _positions(feature: Json, shape: tuple[int, int], where: str) -> NDArray[Any] | None:
    """Places of tokens (B, T); those of several axes must all be the same, as text's are."""
    sent = feature.get("position_ids")
    if sent is None:
        return None
    places = _array(sent, f"{where}.position_ids", integers=True)
    if places.ndim == 3:
        if (places != places[:1]).any():
            raise NotSupported(
                f"{where}.position_ids have several axes that differ; this model reads text alone."
            )
        places = places[0]
    if places.ndim == 1:
        places = places[None]
    if places.shape != shape:
        raise InvalidRequest(
            f"{where}: position_ids have shape {_told(places.shape)} and input_ids {_told(shape)}."
        )
    return places


def _parts(places: NDArray[Any], start: int, end: int, where: str) -> list[tuple[int, int]]:
    """Where the sequences of a row begin and end: each counts from 0 or goes on by one."""
    own = places[start:end]
    begins = [0, *(np.flatnonzero(np.diff(own) != 1) + 1).tolist()]
    for begin in begins[1:]:
        if own[begin] != 0:
            raise NotSupported(
                f"{where}.position_ids jump from {own[begin - 1]} to {own[begin]}; they must count "
                "by one, and from 0 where a packed row begins its next sequence."
            )
    ends = [*begins[1:], len(own)]
    return [(start + first, start + last) for first, last in zip(begins, ends, strict=True)]


def _unpadded(mask: NDArray[Any] | None, length: int, where: str) -> tuple[int, int]:
    """Where the tokens of a row begin and end."""
    if mask is None:
        return 0, length
    there = np.flatnonzero(mask)
    if len(there) == 0:
        raise InvalidRequest(f"{where} is nothing but padding.")
    start, end = int(there[0]), int(there[-1]) + 1
    if len(there) != end - start:
        raise NotSupported(
            f"{where}.attention_mask has zeros between tokens; only padding at the beginning or "
            "the end may be masked."
        )
    return start, end


def _refuse_what_is_no_text(feature: Json, where: str) -> None:
    for name in _NOT_TEXT:
        if not _is_empty(feature.get(name)):
            raise NotSupported(
                f"{where} has {name!r}: only text can be trained through this protocol. Images "
                "can be trained through the Tinker protocol, where the base model reads them."
            )
    if not _is_empty(feature.get("inputs_embeds")):
        raise NotSupported(f"{where} has 'inputs_embeds'; send input_ids alone.")
    if not _is_empty(feature.get("routed_experts")):
        raise NotSupported(f"{where} has 'routed_experts'; experts are chosen anew here.")
    _refuse_unless(feature, "mm_token_type_ids", 0, where, "only text can be trained here")
    _refuse_unless(feature, "loss_scale", 1, where, "set labels to -100 where nothing is learnt")


def _refuse_unless(feature: Json, name: str, value: int, where: str, why: str) -> None:
    sent = feature.get(name)
    if not _is_empty(sent) and (_array(sent, f"{where}.{name}", integers=False) != value).any():
        raise NotSupported(f"{where}.{name} is not {value} everywhere; {why}.")


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, list) and not value)


def _like(feature: Json, name: str, shape: tuple[int, int], where: str) -> NDArray[Any] | None:
    sent = feature.get(name)
    if sent is None:
        return None
    values = _matrix(sent, f"{where}.{name}", integers=False)
    if values.shape != shape:
        raise InvalidRequest(
            f"{where}: {name} has shape {_told(values.shape)} and input_ids {_told(shape)}; they "
            "must agree."
        )
    return values


def _matrix(value: Any, where: str, *, integers: bool) -> NDArray[Any]:
    values = _array(value, where, integers=integers)
    if values.ndim == 1:
        values = values[None]
    if values.ndim != 2:
        raise InvalidRequest(f"{where} must be a list of numbers, or a list of such lists.")
    return values


def _array(value: Any, where: str, *, integers: bool) -> NDArray[Any]:
    try:
        values: NDArray[Any] = np.asarray(value)
    except (ValueError, OverflowError):
        raise InvalidRequest(f"{where} has rows of different lengths.") from None
    if values.dtype.kind == "b" and not integers:
        values = values.astype(np.int64)
    wrong = values.dtype.kind not in ("iu" if integers else "iuf")
    # Beside integers a boolean becomes one of them; and what only fits unsigned would become
    # another number, -100 for example, once it is signed.
    wrong = wrong or (integers and (values.dtype.kind == "u" or _has_boolean(value)))
    if wrong and values.size:
        what = "integers" if integers else "numbers"
        raise InvalidRequest(f"{where} must hold {what} alone.")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InvalidRequest(f"{where} has NaN or infinity.")
    return values


def _has_boolean(value: Any) -> bool:
    """Whether a list of lists has one anywhere."""
    if not isinstance(value, list):
        return isinstance(value, bool)
    listed = cast(list[Any], value)
    kinds = set(map(type, listed))
    return bool in kinds or (list in kinds and any(_has_boolean(one) for one in listed))


def _told(shape: Sequence[int]) -> str:
    several = shape[1:] if len(shape) > 1 and shape[0] == 1 else shape
    return "x".join(str(size) for size in several) or "of a single number"


def _kind(value: Any) -> str:
    kinds: dict[type, str] = {str: "a text", list: "a list", bool: "a boolean", type(None): "null"}
    return kinds.get(type(cast(object, value)), "a number")
