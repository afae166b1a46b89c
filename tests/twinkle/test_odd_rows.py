"""Odd numbers in rows and arguments: a refusal that names what is wrong, or a finite result.

Never a fault of the server, and nothing of them stays: the adapter then trains on as its twin.
"""

import itertools
import json
import math
from typing import Any

import pytest
import requests
from adapters import feature, lora, step
from twinkle_client.http.http_utils import _build_headers
from twinkle_client.manager import TwinkleClient
from twinkle_client.model import MultiLoraTransformersModel

X = -100
NAN, INF = float("nan"), float("inf")
NO_JSON = "The body is no JSON"
PAIR = [feature(3, 4, 5, 6), feature(7, 8, 9)]
_names = itertools.count()
#: What a loss needs besides rows, right for ``PAIR``.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "CrossEntropyLoss": {},
    "ChunkedCrossEntropyLoss": {},
    "MSELoss": {"targets": [1.0, 2.0]},
    "DPOLoss": {"ref_logps": [[-1.0] * 3, [-1.0] * 2]},
    "SimPOLoss": {},
    "CPOLoss": {},
    "ORPOLoss": {},
    **{
        name: {
            "advantages": [1.0, -1.0],
            "old_logps": [[-5.0] * 3, [-5.0] * 2],
            "ref_logps": [[-5.0] * 3, [-5.0] * 2],
        }
        for name in (
            "GRPOLoss",
            "PPOLoss",
            "GSPOLoss",
            "SAPOLoss",
            "CISPOLoss",
            "BNPOLoss",
            "DRGRPOLoss",
        )
    },
    "GKDLoss": {
        "teacher_topk_logprobs": [[[-1.0, -2.0]] * 3, [[-1.0, -2.0]] * 2],
        "teacher_topk_indices": [[[3, 4]] * 3, [[5, 6]] * 2],
    },
}
SETTINGS: dict[str, dict[str, Any]] = {
    "ChunkedCrossEntropyLoss": {"chunk_size": 2},
    **{name: {"beta": 0.1} for name, needs in ARGUMENTS.items() if "advantages" in needs},
}


def first_row(**changed: Any) -> list[dict[str, Any]]:
    return [PAIR[0] | changed, PAIR[1]]


#: What is wrong, and the words that a refusal must have.
REFUSED: list[tuple[list[dict[str, Any]], str]] = [
    (first_row(input_ids=[3, 4, 5, 2**40]), "token"),
    (first_row(input_ids=[3, 4, 5, 100_000]), "token"),
    (first_row(input_ids=[3, 4, 5, -1]), "token"),
    (first_row(input_ids=[3, 4, 5, X]), "token"),
    (first_row(input_ids=[3, 4, 5, 6.5]), "input_ids"),
    (first_row(input_ids=[3, 4, 5, 2**70]), "input_ids"),
    (first_row(input_ids=[3, 4, 5, True]), "input_ids"),
    (first_row(input_ids=[True] * 4), "input_ids"),
    (first_row(input_ids=[3, 4, 5, None]), "input_ids"),
    (first_row(input_ids=[3, 4, 5, NAN]), "input_ids"),
    (first_row(input_ids=[3, 4, 5, "6"]), "input_ids"),
    (first_row(input_ids=[]), "empty"),
    (first_row(input_ids=[[]]), "empty"),
    (first_row(labels=[4, 5, 100_000, X]), "label"),
    (first_row(labels=[4, 5, 2**40, X]), "label"),
    (first_row(labels=[2**63, 2**64 - 100, 2**63, 2**63]), "label"),
    (first_row(labels=[4, 5, -1, X]), "label"),
    (first_row(labels=[4, 5, -99, X]), "label"),
    (first_row(labels=[4, 5, 6.5, X]), "label"),
    (first_row(labels=[4, 5, False, X]), "label"),
    (first_row(labels=[4, 5, INF, X]), "label"),
    (first_row(labels=[4, 5, 6]), "label"),
    (first_row(attention_mask=[1, 1, 1, NAN]), "attention_mask"),
    (first_row(attention_mask=[0, 0, 0, 0]), "padding"),
    (first_row(position_ids=[0, 1, 2, 2**63]), "position_ids"),
]
#: Of an argument's first number.
NO_NUMBERS: list[Any] = [NAN, INF, -INF, None, "1", 10**400]
ODD_NUMBERS: list[Any] = [*NO_NUMBERS, True, 1e308, -1e308, 1e30, -1e16]


def send(model: MultiLoraTransformersModel, rows: Any, arguments: dict[str, Any]) -> Any:
    """The real client's call; what its JSON refuses (NaN, infinity) is sent as Python writes it."""
    try:
        answer = model.forward_backward(inputs=rows, **arguments)
        return answer.result
    except requests.exceptions.InvalidJSONError:
        body = {"inputs": rows, "adapter_name": model.adapter_name, **arguments}
        headers = _build_headers() | {"Content-Type": "application/json"}
        url = f"{model.server_url}/forward_backward"
        told = requests.post(url, data=json.dumps(body), headers=headers)
        told.raise_for_status()
        return told.json()["result"]


def refusal(model: MultiLoraTransformersModel, rows: Any, arguments: dict[str, Any]) -> str | None:
    """What a refusal says; None after a finite result, whose gradient is thrown away."""
    refused: requests.Response | None = None
    result: Any = None
    try:
        result = send(model, rows, arguments)
    except requests.HTTPError as error:
        refused = error.response
    if refused is not None:
        assert refused.status_code == 400, (refused.status_code, refused.text)
        return str(refused.text)
    assert math.isfinite(result["loss"]), result["loss"]
    norm = model.clip_grad_norm(max_grad_norm=1.0).result
    assert math.isfinite(float(norm)), norm
    model.zero_grad()
    return None


@pytest.fixture(scope="module")
def started(service: Any) -> tuple[str, list[float]]:
    """A saved adapter, and the losses of a twin that goes on from it."""
    from conftest import KEY, MODEL
    from twinkle_client import init_twinkle_client

    client: TwinkleClient = init_twinkle_client(base_url=service.url, api_key=KEY)
    twin = MultiLoraTransformersModel(MODEL)
    prepared(twin, "odd-start")
    step(twin, 1)
    saved = twin.save("odd", save_optimizer=True).twinkle_path
    losses = step(twin, 2)
    client.close()
    return saved, losses


def prepared(model: MultiLoraTransformersModel, name: str) -> None:
    model.add_adapter_to_model(name, lora())
    model.set_loss("CrossEntropyLoss")
    model.set_optimizer("AdamW", lr=1e-2)


def goes_on_as_its_twin(
    model: MultiLoraTransformersModel, started: tuple[str, list[float]]
) -> None:
    model.set_loss("CrossEntropyLoss")
    assert step(model, 2) == started[1]


@pytest.fixture
def odd(
    model: MultiLoraTransformersModel, started: tuple[str, list[float]]
) -> MultiLoraTransformersModel:
    prepared(model, f"odd-{next(_names)}")
    model.load(started[0], load_optimizer=True)
    return model


def changed_first(values: Any, number: Any) -> Any:
    """The same lists with another first number."""
    if isinstance(values, list):
        return [changed_first(values[0], number), *values[1:]]
    return number


@pytest.mark.parametrize("loss", ARGUMENTS)
def test_odd_arguments(
    odd: MultiLoraTransformersModel, started: tuple[str, list[float]], loss: str
) -> None:
    odd.set_loss(loss, **SETTINGS.get(loss, {}))
    right = ARGUMENTS[loss]
    assert refusal(odd, PAIR, right) is None
    for name in right:
        for number in ODD_NUMBERS:
            wrong = right | {name: changed_first(right[name], number)}
            told = refusal(odd, PAIR, wrong)
            if any(number is one for one in NO_NUMBERS):
                assert told is not None, (name, number)
                assert name in told or NO_JSON in told, told
    ignored = [row | {"labels": [X] * len(row["input_ids"])} for row in PAIR]
    single = [{"input_ids": [3], "labels": [4]}, {"input_ids": [5], "labels": [6]}]
    for rows in (ignored, single, [PAIR[0], ignored[1]]):
        needs = {
            name: [
                part[: sum(label != X for label in row["labels"])]
                if isinstance(part, list)
                else part
                for part, row in zip(values, rows, strict=True)
            ]
            for name, values in right.items()
        }
        refusal(odd, rows, needs)
    goes_on_as_its_twin(odd, started)


def test_odd_rows(odd: MultiLoraTransformersModel, started: tuple[str, list[float]]) -> None:
    for rows, word in REFUSED:
        told = refusal(odd, rows, {})
        assert told is not None, rows
        assert word in told or NO_JSON in told, (rows, told)
    goes_on_as_its_twin(odd, started)
