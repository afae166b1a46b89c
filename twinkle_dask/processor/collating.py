"""Features of several rows as one batch: padded, or end to end without padding."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, cast

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.processor.plain import plain
from twinkle_dask.types import Json

#: What fills the place of a token that is not there, by key; the keys that a batch keeps.
PADDING: Final[Mapping[str, float]] = {
    "input_ids": 0,
    "attention_mask": 0,
    "position_ids": -1,
    "labels": -100,
    "completion_mask": 0,
    "loss_scale": 0.0,
    "mm_token_type_ids": 0,
}
#: Numbers of a padded batch: a short request can ask for very many.
MAX_CELLS: Final = 2**25
_IMAGES: Final = frozenset({"pixel_values", "pixel_values_videos", "images", "videos"})


def collated(
    inputs: Sequence[Json] | Json,
    *,
    padding_free: bool = False,
    padding_side: Literal["left", "right"] = "right",
) -> Json:
    """One feature whose values have a row for each input, all of the length of the longest.

    Columns that are no token columns are left out, and a token column that only some rows have is
    filled for the others. With ``padding_free``, or if a row is packed already (its positions
    begin again), the rows become one, without an attention mask.

    Raises:
        InvalidRequest: No rows, a row without ``input_ids``, or columns of different lengths.
        NotSupported: There are images.
    """
    rows = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    rows = [cast(Json, plain(row)) for row in rows]
    if not rows:
        raise InvalidRequest("There are no inputs.")
    for number, row in enumerate(rows):
        _check(number, row)
    keys = [key for key in PADDING if any(row.get(key) is not None for row in rows)]
    columns = {key: [_tokens(row, key) for row in rows] for key in keys}
    if padding_free or any(_is_packed(row) for row in rows):
        return {
            key: [[token for tokens in values for token in tokens]]
            for key, values in columns.items()
            if key != "attention_mask"
        }
    longest = max(len(tokens) for tokens in columns["input_ids"])
    if (cells := longest * len(rows) * len(keys)) > MAX_CELLS:
        raise InvalidRequest(
            f"{len(rows)} inputs padded to {longest} tokens make {cells} numbers; {MAX_CELLS} is "
            "the most. Send inputs of similar length together, or use padding_free."
        )
    return {
        key: [_padded(tokens, longest, PADDING[key], padding_side) for tokens in values]
        for key, values in columns.items()
    }


def _check(number: int, row: Json) -> None:
    if any(row.get(key) for key in _IMAGES):
        raise NotSupported("Batches of images are not made here; send text alone.")
    if not isinstance(row.get("input_ids"), list):
        raise InvalidRequest(f"Input {number} has no input_ids; encode the rows first.")
    length = len(row["input_ids"])
    for key in PADDING:
        value = row.get(key)
        if value is None:
            continue
        if not isinstance(value, list) or len(cast(list[Any], value)) != length:
            raise InvalidRequest(f"Input {number}: {key} needs a number for each of the input_ids.")


def _tokens(row: Json, key: str) -> list[Any]:
    value: list[Any] | None = row.get(key)
    return [PADDING[key]] * len(row["input_ids"]) if value is None else value


def _is_packed(row: Json) -> bool:
    positions: list[Any] = row.get("position_ids") or []
    return positions.count(0) > 1


def _padded(tokens: list[Any], length: int, value: float, side: str) -> list[Any]:
    padding = [value] * (length - len(tokens))
    return padding + tokens if side == "left" else tokens + padding
