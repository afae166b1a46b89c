"""What is let by, and what is refused by name."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.values import CheckpointAddress
from twinkle_dask.store.records import CheckpointKind
from twinkle_dask.types import RunId
from twinkle_dask_gateway.reading import check
from twinkle_dask_gateway.tinker import wire
from twinkle_dask_gateway.tinker.addresses import format_address, parse_address

Body = dict[str, Any]
SAMPLE: Body = {
    "sampling_session_id": "s:sample:0",
    "prompt": {"chunks": [{"tokens": [1]}]},
    "sampling_params": {},
}
CREATE: Body = {"session_id": "s", "model_seq_id": 0, "base_model": "m", "lora_config": {}}
SAVE: Body = {"model_id": "m", "sampling_session_seq_id": 0}
SAMPLER: Body = {"session_id": "s", "base_model": "m"}
LOAD: Body = {"model_id": "m", "path": "tinker://r/weights/n"}
STEP: Body = {"model_id": "m", "adam_params": {}}


def test_a_newer_clients_idle_fields_are_let_by() -> None:
    idle: Body = {"someday": None, "count": 0, "flag": False, "names": [], "more": {}, "text": ""}
    check(wire.Sample, SAMPLE | idle)
    check(wire.OptimStep, {"model_id": "m", "adam_params": idle, "type": "optim_step"})


def with_datum(**fields: Any) -> Body:
    datum: Body = {"model_input": {"chunks": []}, "loss_fn_inputs": {}, **fields}
    return {"model_id": "m", "forward_backward_input": {"data": [datum], "loss_fn": "ppo"}}


@pytest.mark.parametrize(
    ("model", "body", "field"),
    [
        (wire.Sample, SAMPLE | {"prompt": {"chunks": [1] * 10_000}}, "prompt.chunks.0"),
        (wire.Sample, SAMPLE | {"sampling_params": {"stop": [1.5] * 10_000}}, "stop"),
        (
            wire.ForwardBackward,
            with_datum(loss_fn_inputs=dict.fromkeys(map(str, range(10_000)))),
            "64 fields",
        ),
    ],
)
def test_of_many_wrong_items_few_are_looked_at(
    model: type[BaseModel], body: Body, field: str
) -> None:
    """A report on each would keep the interpreter's lock for seconds."""
    with pytest.raises(ValidationError, match=field) as refusal:
        model.model_validate(body)
    assert refusal.value.error_count() < 10


def test_spans_are_taken_in_protobuf_only() -> None:
    check(wire.ForwardBackward, with_datum(model_input_spans=None))
    with pytest.raises(InvalidRequest, match="model_input_spans"):
        check(wire.ForwardBackward, with_datum(model_input_spans=[{"sequence_id": "a-0"}]))


@pytest.mark.parametrize(
    ("model", "body", "field"),
    [
        (wire.Sample, SAMPLE | {"base_model": "m"}, "sampling session"),
        (wire.Sample, SAMPLE | {"sampling_params": {"min_p": 0.1}}, "min_p"),
        (
            wire.CreateModel,
            CREATE | {"optimizer_config": {"type": "dimuon", "version": 1}},
            "dimuon",
        ),
        (wire.CreateModel, CREATE | {"lora_config": {"rank": 8, "dropout": 0.1}}, "dropout"),
        (wire.OptimStep, {"model_id": "m", "optimizer_params": {"type": "dimuon"}}, "adam_params"),
        (wire.SaveWeightsForSampler, SAVE | {"kind": "copy"}, "kind"),
        (wire.SaveWeightsForSampler, {"model_id": "m", "path": "x", "kind": "inflight"}, "path"),
        (wire.LoadWeights, LOAD | {"optimizer_config": {"type": "muon"}}, "muon"),
    ],
)
def test_what_asks_for_more_than_we_do_is_refused_by_name(
    model: type[BaseModel], body: Body, field: str
) -> None:
    with pytest.raises(InvalidRequest, match=field):
        check(model, body)


def test_a_refusal_never_echoes_the_input() -> None:
    secret = "s3cret" * 1000
    for body in (
        STEP | {"adam_params": {"learning_rate": secret}},
        STEP | {"seq_id": secret},
        STEP | {"model_id": [secret]},
        {"model_id": secret * 2},
    ):
        with pytest.raises(InvalidRequest) as refused:
            check(wire.OptimStep, body)
        assert "s3cret" not in refused.value.message
        assert len(refused.value.message) < 1000


@pytest.mark.parametrize(
    ("model", "body", "bits"), [(wire.OptimStep, STEP, 31), (wire.Sample, SAMPLE, 63)]
)
def test_places_are_numbers_of_so_many_bits(
    model: type[wire.OptimStep | wire.Sample], body: dict[str, Any], bits: int
) -> None:
    for wrong in (-1, 2**bits, 1.5, "x"):
        with pytest.raises(InvalidRequest, match="seq_id"):
            check(model, body | {"seq_id": wrong})
    assert check(model, body | {"seq_id": 2**bits - 1}).seq_id == 2**bits - 1


@pytest.mark.parametrize(
    ("model", "body", "field"),
    [
        (wire.CreateModel, CREATE, "model_seq_id"),
        (wire.LoadWeights, LOAD, "model_seq_id"),
        (wire.SaveWeightsForSampler, SAVE, "sampling_session_seq_id"),
        (wire.CreateSamplingSession, SAMPLER, "sampling_session_seq_id"),
    ],
)
def test_what_a_session_counts_has_31_bits(
    model: type[BaseModel], body: dict[str, Any], field: str
) -> None:
    for wrong in (-1, 2**31):
        with pytest.raises(InvalidRequest, match=field):
            check(model, body | {field: wrong})
    check(model, body | {field: 2**31 - 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_settings_are_finite(value: float) -> None:
    with pytest.raises(InvalidRequest, match="learning_rate"):
        check(wire.OptimStep, STEP | {"adam_params": {"learning_rate": value}})


@pytest.mark.parametrize("kind", list(CheckpointKind))
def test_an_address_reads_back(kind: CheckpointKind) -> None:
    address = CheckpointAddress(run=RunId("session-1:train:0"), kind=kind, name="step-0001.a_b")
    assert parse_address(format_address(address)) == address


@pytest.mark.parametrize(
    "path",
    [
        "",
        "tinker://",
        "tinker://r/weights",
        "tinker://r/weights/a/b",
        "tinker://r/weights/",
        "tinker://r/weights/.",
        "tinker://r/weights/..",
        "tinker://r/weights/a b",
        "tinker://r/weights/a%2Fb",
        "tinker://r/weights/" + "a" * 129,
        "tinker://r/other/a",
        "tinker:///weights/a",
        "tinker://../weights/a",
        "tinker://r\\x/weights/a",
        "tinker://" + "r" * 300 + "/weights/a",
        "Tinker://r/weights/a",
        "/r/weights/a",
    ],
)
def test_what_is_no_address_is_refused(path: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_address(path)
    assert len(refused.value.message) < 400
