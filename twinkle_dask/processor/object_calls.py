"""What preprocessors, templates, rewards and input processors can be asked."""

from typing import Any

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.processor import editing, rewards
from twinkle_dask.processor import functions as f
from twinkle_dask.processor.calling import Call
from twinkle_dask.processor.collating import collated
from twinkle_dask.processor.encoding import decode_tokens
from twinkle_dask.processor.naming import checked
from twinkle_dask.processor.preprocessors import preprocessor
from twinkle_dask.processor.rows import cleaned, encodes
from twinkle_dask.processor.states import ObjectState
from twinkle_dask.types import Json


def answer_object(call: Call, state: ObjectState) -> Any:
    """The result of a function."""
    match state.processor_type:
        case "preprocessor":
            return _preprocess(call, state)
        case "processor":
            return collate(call.read(f.Inputs).inputs, state.arguments)
        case "reward":
            given: f.Score = call.read(f.Score)
            truths = given.ground_truths
            return rewards.scores(state.class_type, state.arguments, given.trajectories, truths)
        case _:
            return _apply_template(call, {"template": state.class_type, **state.arguments})


def _preprocess(call: Call, state: ObjectState) -> Any:
    preprocess = preprocessor(state.class_type, state.arguments)
    if call.function == "preprocess":
        return preprocess(call.read(f.PreprocessRow).row)
    given: f.PreprocessRows = call.read(f.PreprocessRows)
    rows = given.rows
    if isinstance(rows, list):
        return [preprocess(row) for row in rows]
    lengths = {len(column) for column in rows.values()}
    if len(lengths) > 1:
        raise InvalidRequest("The columns have different lengths.")
    return editing.columns(preprocess(row) for row in editing.rows_of(rows))


def collate(inputs: Any, arguments: Json) -> Json:
    """Features as one batch, as an ``InputProcessor`` with these arguments makes it."""
    given = checked(f.InputProcessorArguments, "InputProcessor", arguments)
    return collated(inputs, padding_free=given.padding_free, padding_side=given.padding_side)


def _apply_template(call: Call, template: Json) -> Any:
    if call.function == "decode":
        return decode_tokens(template, call.models, call.read(f.DecodeTokens).token_ids)
    encode = call.encode(template)
    if call.function == "batch_encode":
        many: f.EncodeTrajectories = call.read(f.EncodeTrajectories)
        return [
            feature
            for one in many.trajectories
            for feature in encode(template, cleaned(one), many.add_generation_prompt)
        ]
    given: f.EncodeTrajectory = call.read(f.EncodeTrajectory)
    if call.function == "check":
        return given.trajectory if encodes(given.trajectory, template, encode) else None
    features = encode(template, cleaned(given.trajectory), given.add_generation_prompt)
    if len(features) != 1:
        raise InvalidRequest(
            f"The trajectory becomes {len(features)} features; call batch_encode for those."
        )
    return features[0]
