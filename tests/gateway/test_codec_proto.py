"""Our protobuf against the SDK's own encoder and decoder."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from hypothesis import given
from hypothesis import strategies as st
from tinker import types
from tinker.proto import tinker_public_pb2 as sdk_pb
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import (
    deserialize_forward_backward_output,
)
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from tests.gateway.arrays import csr_of, matrices
from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.types import (
    CustomLoss,
    ForwardBackward,
    ForwardBackwardResult,
    LossName,
    LossSpec,
)
from twinkle_dask_gateway.tinker import tinker_pb2 as pb
from twinkle_dask_gateway.tinker.codec_proto import (
    batch_of,
    forward_backward_bytes,
    loss_id_of,
    parse_forward_backward,
)
from twinkle_dask_gateway.tinker.tensors import Array, Growth


def parse(body: bytes) -> pb.ForwardBackwardRequest:
    return parse_forward_backward(body, max_data=100)


def decode(body: bytes) -> ForwardBackward:
    return batch_of(parse(body), Growth(2**20))


def sdk_body(
    *data: types.Datum, run: str = "s", loss_fn: types.LossFnType = "cross_entropy", **config: float
) -> bytes:
    request = ForwardBackwardRequest(
        model_id=run,
        seq_id=3,
        forward_backward_input=ForwardBackwardInput(
            data=list(data), loss_fn=loss_fn, loss_fn_config=config or None
        ),
    )
    return forward_backward_request_to_proto(request).SerializeToString()


def one_datum(**inputs: types.TensorData) -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints([1, 2]), loss_fn_inputs=inputs)


TARGETS = types.TensorData(data=[2, 3], dtype="int64", shape=[2])


def fields_of(file: FileDescriptor) -> dict[tuple[str, int], tuple[int, int]]:
    """Number, type and label of every field; names do not travel."""
    proto = FileDescriptorProto()
    file.CopyToProto(proto)
    return {
        (message.name, field.number): (field.type, field.label)
        for message in proto.message_type
        for field in message.field
    }


def test_the_schema_is_the_sdks() -> None:
    ours, theirs = fields_of(pb.DESCRIPTOR), fields_of(sdk_pb.DESCRIPTOR)
    assert ours.items() <= theirs.items()
    unused = {"SamplingParams", "StopStrings", "StopTokens"}  # on no wire
    assert {name for name, _ in theirs.keys() - ours.keys()} == unused
    assert dict(pb.DType.items()) == dict(sdk_pb.DType.items())
    assert dict(pb.StopReason.items()) == dict(sdk_pb.StopReason.items())


def test_the_committed_module_is_the_schemas(tmp_path: Path) -> None:
    gateway = Path(__file__).parents[2] / "gateway"
    name = "twinkle_dask_gateway/tinker/tinker.proto"
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"-I{gateway}",
        f"--python_out={tmp_path}",
    ]
    subprocess.run([*command, str(gateway / name)], check=True, timeout=30)
    made = (tmp_path / name).with_name("tinker_pb2.py").read_text()
    assert made == Path(pb.__file__).read_text(), "run `make proto`"


@given(st.lists(matrices(), min_size=1, max_size=4), st.booleans())
def test_what_the_sdk_encodes_is_what_we_decode(weights: list[Array], as_csr: bool) -> None:
    data = [
        one_datum(
            target_tokens=TARGETS,
            weights=_tensor_data(array, as_csr=as_csr),
        )
        for array in weights
    ]
    batch = decode(sdk_body(*data))
    assert batch.backward
    assert len(batch.data) == len(weights)
    for datum, array in zip(batch.data, weights, strict=True):
        assert datum.tokens.tolist() == [1, 2]
        assert datum.target_tokens.tolist() == [2, 3]
        np.testing.assert_array_equal(datum.loss_inputs["weights"], array.astype(np.float32))


def _tensor_data(array: Array, *, as_csr: bool) -> types.TensorData:
    dtype = "int64" if array.dtype == np.int64 else "float32"
    shape = list(array.shape)
    if not as_csr:
        return types.TensorData(data=array, dtype=dtype, shape=shape)
    values, crow, col = csr_of(array)
    return types.TensorData(
        data=values,
        dtype=dtype,
        shape=shape,
        sparse_crow_indices=crow.tolist(),
        sparse_col_indices=col.tolist(),
    )


def test_several_text_chunks_are_one_input() -> None:
    message = pb.ForwardBackwardRequest(model_id="m", loss_fn="cross_entropy", forward_only=True)
    datum = message.data.add()
    for tokens in ([1, 2], [], [3]):
        datum.model_input.add().encoded_text.tokens = np.array(tokens, "<i4").tobytes()
    targets = datum.loss_fn_inputs["target_tokens"]
    targets.dense, targets.dtype = np.array([2, 3, 4], "<i4").tobytes(), pb.DTYPE_INT32
    batch = decode(message.SerializeToString())
    assert batch.data[0].tokens.tolist() == [1, 2, 3]
    assert batch.data[0].target_tokens.dtype == np.int64
    assert not batch.backward


def test_bfloat16_is_widened_exactly() -> None:
    message = parse(sdk_body(one_datum(target_tokens=TARGETS)))
    weights = message.data[0].loss_fn_inputs["weights"]
    weights.dense, weights.dtype = np.array([0x3F80, 0xC040], "<u2").tobytes(), pb.DTYPE_BFLOAT16
    assert batch_of(message, Growth(0)).data[0].loss_inputs["weights"].tolist() == [1.0, -3.0]


def test_loss_settings_come_from_the_newer_map() -> None:
    message = parse(
        sdk_body(one_datum(target_tokens=TARGETS), loss_fn="ppo", clip_low_threshold=0.5)
    )
    message.loss_fn_config["clip_low_threshold"] = 0.1
    config = {"clip_low_threshold": 0.5, "clip_high_threshold": 1.2}
    assert batch_of(message, Growth(0)).loss == LossSpec(name=LossName.PPO, config=config)
    message.loss_fn_config_v2.clear()
    config["clip_low_threshold"] = 0.1
    assert batch_of(message, Growth(0)).loss == LossSpec(name=LossName.PPO, config=config)


def test_a_custom_loss_reads_its_inputs_as_they_were_sent() -> None:
    """What it does not read is dropped; a scalar has no shape on the wire."""
    inputs = {"a": np.array([5]), "b": np.ones(7, np.float32), "weights": np.ones(3, np.float32)}
    tensors = {name: _tensor_data(array, as_csr=False) for name, array in inputs.items()}
    message = parse(sdk_body(one_datum(target_tokens=TARGETS, **tensors), loss_fn="cross_entropy"))
    message.loss_fn = "custom"
    message.loss_fn_config_v2["loss_id"].text = "loss-1"
    assert loss_id_of(message) == "loss-1"
    loss = CustomLoss(id="loss-1", name="x", ranks={"logprobs": 1, "a": 0, "b": 1}, graph="{}")
    batch = batch_of(message, Growth(0), loss)
    assert batch.loss is loss
    (datum,) = batch.data
    assert datum.loss_inputs == {}
    assert datum.custom_inputs.keys() == {"a", "b"}
    assert datum.custom_inputs["a"].shape == ()
    assert datum.custom_inputs["a"].dtype == np.int64
    assert datum.custom_inputs["b"].shape == (7,)
    for wrong in ("other", "loss_id"):
        message.loss_fn_config_v2[wrong].number = 1.0
        with pytest.raises(InvalidRequest, match="'loss_id' alone"):
            loss_id_of(message)


@given(st.data())
def test_truncated_or_garbled_protobuf_is_a_clear_error(data: st.DataObject) -> None:
    body = sdk_body(
        one_datum(
            target_tokens=TARGETS, weights=_tensor_data(np.ones((2, 1), np.float32), as_csr=True)
        )
    )
    cut = data.draw(st.integers(0, len(body) - 1))
    garbage = data.draw(st.binary(max_size=4))
    try:
        decode(body[:cut] + garbage)
    except (InvalidRequest, NotSupported):
        return  # by far most cuts; some leave a smaller request that is whole


def test_a_message_cut_short_is_called_so() -> None:
    body = sdk_body(one_datum(target_tokens=TARGETS))
    with pytest.raises(InvalidRequest, match="not a complete protobuf"):
        decode(body[:-3])


def _broken(change: str) -> bytes:
    message = parse(sdk_body(one_datum(target_tokens=TARGETS)))
    datum = message.data[0]
    targets = datum.loss_fn_inputs["target_tokens"]
    match change:
        case "dtype":
            targets.dtype = pb.DTYPE_UNSPECIFIED
        case "future dtype":
            targets.dtype = 77  # pyright: ignore[reportAttributeAccessIssue] - open enum
        case "odd bytes":
            targets.dense = b"1234567"
        case "shape":
            targets.shape[:] = [3]
        case "no content":
            targets.ClearField("dense")
        case "odd tokens":
            datum.model_input[0].encoded_text.tokens = b"12345"
        case "empty chunk":
            datum.model_input.add()
        case "no targets":
            datum.ClearField("loss_fn_inputs")
        case "image":
            datum.model_input.add().image.format = "gif"
        case "image of other dimensions":
            datum.model_input.add().image.override_dimensions.width = 5
        case "audio":
            datum.model_input.add().dmel.dmel = b"x"
        case "text setting":
            message.loss_fn_config_v2["loss_id"].text = "x"
        case "loss":
            message.loss_fn = "nope"
        case _:
            raise AssertionError(change)
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("dtype", "Datum 0: loss input 'target_tokens': .*dtype"),
        ("future dtype", "dtype"),
        ("odd bytes", "7 bytes"),
        ("shape", "does not fit"),
        ("no content", "no content"),
        ("odd tokens", "5 bytes"),
        ("empty chunk", "empty"),
        ("no targets", "no 'target_tokens'"),
        ("image", "Datum 0: an image's format must be 'png' or 'jpeg', not 'gif'"),
        ("image of other dimensions", "Datum 0: 'override_dimensions' of an image"),
        ("audio", "Datum 0: chunks of kind 'dmel' are not supported: no model here hears"),
        ("text setting", "'loss_id' of the loss must be a number"),
        ("loss", "Unknown loss 'nope'"),
    ],
)
def test_what_is_wrong_is_named(change: str, says: str) -> None:
    with pytest.raises((InvalidRequest, NotSupported), match=says):
        decode(_broken(change))


# ---- results


@given(st.lists(matrices(), max_size=5))
def test_the_sdk_reads_our_logprobs(arrays: list[Array]) -> None:
    # An array without columns or rows has no shape of its own on this wire.
    logprobs = tuple(a.astype(np.float32) for a in arrays if a.size)
    result = ForwardBackwardResult(logprobs=logprobs, metrics={"loss:sum": 1.5})
    read = deserialize_forward_backward_output(forward_backward_bytes(result))
    assert read.metrics == {"loss:sum": 1.5}
    assert len(read.loss_fn_outputs) == len(logprobs)
    for output, array in zip(read.loss_fn_outputs, logprobs, strict=True):
        np.testing.assert_array_equal(output["logprobs"].to_numpy(), array)
