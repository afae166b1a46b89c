"""Whatever is wrong in a request is refused at once, in words that help, and leaves no trace.

A refused request of the SDK is a ``BadRequestError`` or ``NotFoundError``; where the SDK would not
send such a thing, it is written by hand. After every test here, the run that was misused and a run
of another tenant still do exactly what they did before.
"""

import json
from collections.abc import Callable, Generator, Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, cast

import httpx
import numpy as np
import pytest
import tinker
import zstandard
from tinker import types

from tests.blackbox.conftest import ALIAS, KEY, MODEL, OTHER_KEY
from tests.blackbox.data import batch, datum, random_tokens, train_one_step
from tests.blackbox.wire import PROTOBUF, Wire, forward_backward_bytes
from tests.models import tiny_llama, tiny_qwen3
from twinkle_dask import LocalService, local_service

VOCABULARY = 4096
CONTEXT_LENGTH = 2048
MAX_RANK = 256
TOKENS = random_tokens(6, seed=1)
BATCH = batch(num=1)
# A place in the order of a run that the SDK, which counts from 1, does not reach here.
UNUSED_SEQ = 1_000_000
NAN, INFINITY = float("nan"), float("inf")


STILL = types.AdamParams(learning_rate=0)  # a step that counts and changes nothing


class Runs:
    """A run that is misused and one of another tenant, and what they say when they are well."""

    def __init__(self, mine: tinker.TrainingClient, other: tinker.TrainingClient) -> None:
        self.mine = mine
        self.other = other
        self._well = [train_one_step(run, BATCH, lr=0) for run in (mine, other)]

    def check(self) -> None:
        """Nothing was added to either of them, and both still work."""
        runs = (self.mine, self.other)
        left = [run.optim_step(STILL) for run in runs]
        trained = [run.forward_backward(BATCH, "cross_entropy") for run in runs]
        stepped = [run.optim_step(STILL) for run in runs]
        assert [step.result().metrics for step in left] == [{"grad_norm:mean": 0.0}] * 2
        losses = [output.result().metrics["loss:sum"] for output in trained]
        assert losses == pytest.approx(self._well, rel=1e-6)
        for step in stepped:
            assert (step.result().metrics or {})["grad_norm:mean"] > 0


@pytest.fixture(scope="module")
def clients(
    service: LocalService,
) -> Generator[tuple[tinker.ServiceClient, tinker.ServiceClient]]:
    """One session of each tenant for the module."""
    with (
        tinker.ServiceClient(base_url=service.url, api_key=KEY) as mine,
        tinker.ServiceClient(base_url=service.url, api_key=OTHER_KEY) as other,
    ):
        yield mine, other


@pytest.fixture(scope="module")
def both(clients: tuple[tinker.ServiceClient, tinker.ServiceClient]) -> Runs:
    mine, other = (c.create_lora_training_client(MODEL, rank=4).result() for c in clients)
    for run in (mine, other):
        train_one_step(run, batch(seed=1))
    return Runs(mine, other)


@pytest.fixture(autouse=True)
def nothing_else_changes(both: Runs) -> Generator[None]:
    yield
    both.check()


@pytest.fixture(scope="module")
def mine(clients: tuple[tinker.ServiceClient, tinker.ServiceClient]) -> tinker.ServiceClient:
    return clients[0]


@pytest.fixture
def run(both: Runs) -> tinker.TrainingClient:
    return both.mine


@pytest.fixture(scope="module")
def sampler(mine: tinker.ServiceClient) -> tinker.SamplingClient:
    return mine.create_sampling_client(base_model=MODEL).result()


# ---- batches


def of(
    tokens: list[int] | None = None,
    targets: list[int] | None = None,
    chunks: list[types.ModelInputChunk] | None = None,
    **inputs: Any,
) -> types.Datum:
    """A datum that is right but for what is given."""
    right = datum(TOKENS, **({"weights": None} | inputs))
    loss_inputs = dict(right.loss_fn_inputs)
    if targets is not None:
        array = np.asarray(targets, np.int64)
        loss_inputs["target_tokens"] = types.TensorData.from_numpy(array)
    model_input = right.model_input
    if tokens is not None:
        model_input = types.ModelInput.from_ints(tokens)
    if chunks is not None:
        model_input = types.ModelInput(chunks=chunks)
    return types.Datum(model_input=model_input, loss_fn_inputs=loss_inputs)


def without_targets() -> types.Datum:
    inputs = dict(of(weights=[1.0] * 5).loss_fn_inputs)
    del inputs["target_tokens"]
    return replace(of(), loss_fn_inputs=inputs)


def policy(**inputs: Any) -> types.Datum:
    right: dict[str, Any] = {"logprobs": [-1.0] * 5, "advantages": [1.0] * 5}
    return of(**(right | inputs))


VOCABULARY_ENDS = f"0 to {VOCABULARY - 1}"
IMAGE = types.ImageChunk(data=b"png", format="png")
BAD_DATA: dict[str, tuple[types.Datum, str, str]] = {
    "token above the vocabulary": (of(tokens=[1, 2, 3, 4, VOCABULARY]), str(VOCABULARY), "0 to"),
    "negative token": (of(tokens=[1, 2, 3, 4, -1]), "-1", VOCABULARY_ENDS),
    "target above the vocabulary": (of(targets=[VOCABULARY] * 5), "target_tokens", VOCABULARY_ENDS),
    "negative target": (of(targets=[1, -100, 1, 1, 1]), "-100", VOCABULARY_ENDS),
    "target of 64 bits": (of(targets=[1, 1, 1, 1, 2**40]), str(2**40), VOCABULARY_ENDS),
    "empty datum": (of(tokens=[], targets=[]), "Datum 0", "no tokens"),
    "no chunks": (of(chunks=[]), "Datum 0", "no tokens"),
    "too long": (
        of(tokens=[5] * (CONTEXT_LENGTH + 1), targets=[5] * (CONTEXT_LENGTH + 1)),
        str(CONTEXT_LENGTH + 1),
        str(CONTEXT_LENGTH),
    ),
    "fewer targets than tokens": (of(targets=[1, 2, 3]), "target_tokens", "5 tokens"),
    "more targets than tokens": (of(targets=[1] * 6), "target_tokens", "5 tokens"),
    "fewer weights than targets": (of(weights=[1.0] * 3), "weights", "(5,)"),
    "weights of two dimensions": (of(weights=np.ones((5, 1))), "weights", "(5, 1)"),
    "weight NaN": (of(weights=[1, NAN, 1, 1, 1]), "weights", "NaN"),
    "weight infinite": (of(weights=[1, 1, 1, 1, -INFINITY]), "weights", "infinite"),
    "unknown loss input": (of(mask=[1.0] * 5), "mask", "takes: target_tokens, weights"),
    "no targets": (without_targets(), "Datum 0", "target_tokens"),
    "an image": (of(chunks=[IMAGE, types.EncodedTextChunk(tokens=[1])]), "image", "text alone"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_a_batch_with_a_bad_datum_is_refused(run: tinker.TrainingClient, case: str) -> None:
    bad, problem, allowed = BAD_DATA[case]
    with pytest.raises(tinker.BadRequestError) as refused:
        run.forward_backward([bad], "cross_entropy").result()
    assert problem in str(refused.value)
    assert allowed in str(refused.value)


def test_the_message_names_the_datum_and_all_of_the_batch_is_refused(
    run: tinker.TrainingClient,
) -> None:
    with pytest.raises(tinker.BadRequestError, match="Datum 2 has token 5000"):
        run.forward_backward([of(), of(), of(tokens=[5000] * 5)], "cross_entropy").result()


BAD_LOSSES: dict[str, tuple[types.Datum, str, dict[str, Any] | None, str, str]] = {
    "unknown": (of(), "hinge", None, "'hinge'", "cispo, cross_entropy, dro, gspo, importance_"),
    "unknown setting": (
        policy(),
        "ppo",
        {"clip": 1.0},
        "'ppo' has no setting 'clip'",
        "clip_high_threshold, clip_low_threshold",
    ),
    "setting NaN": (policy(), "ppo", {"clip_low_threshold": NAN}, "clip_low_threshold", "finite"),
    "setting a text": (policy(), "ppo", {"clip_low_threshold": "a"}, "clip_low_", "a number"),
    "input missing": (of(logprobs=[-1.0] * 5), "ppo", None, "'ppo' needs 'advantages'", ""),
    "input of another": (policy(), "cross_entropy", None, "no input 'advantages'", "weights"),
    "input infinite": (policy(advantages=[INFINITY] * 5), "ppo", None, "advantages", "infinite"),
    "two targets": (
        datum(
            TOKENS,
            weights=None,
            target_tokens=np.ones((5, 2), np.int64),
            logprobs=np.zeros((5, 2)),
            advantages=np.zeros((5, 2)),
        ),
        "importance_sampling",
        None,
        "one target",
        "'importance_sampling'",
    ),
}


@pytest.mark.parametrize("case", BAD_LOSSES)
def test_a_loss_that_does_not_exist_so_is_refused(run: tinker.TrainingClient, case: str) -> None:
    data, loss, config, problem, allowed = BAD_LOSSES[case]
    name: Any = loss
    with pytest.raises(tinker.BadRequestError) as refused:
        run.forward_backward([data], name, config).result()
    assert problem in str(refused.value)
    assert allowed in str(refused.value)


def test_a_loss_without_a_value_fails_and_adds_nothing(run: tinker.TrainingClient) -> None:
    """Only computing shows it, so here the future fails, and by the tenant's own fault."""
    bad = policy(logprobs=[-1e30] * 5)
    with pytest.raises(tinker.RequestFailedError, match="loss of datum 1 is") as failed:
        run.forward_backward([policy(), bad], "importance_sampling").result()
    assert failed.value.category == types.RequestErrorCategory.User


def test_an_empty_batch_is_refused(run: tinker.TrainingClient, wire: Wire) -> None:
    with pytest.raises(ValueError, match="No data"):
        run.forward_backward([], "cross_entropy")
    content = forward_backward_bytes(run.model_id, UNUSED_SEQ, [])
    answer = wire.send("forward_backward", content, {"content-type": PROTOBUF})
    refused(answer, 400, "The batch is empty", "at least one")


# ---- runs and steps


@pytest.mark.parametrize("rank", [0, -1, MAX_RANK + 1, 10**9])
def test_a_rank_out_of_range_is_refused(mine: tinker.ServiceClient, rank: int) -> None:
    with pytest.raises(tinker.BadRequestError, match=rf"from 1 to {MAX_RANK}, not {rank}"):
        mine.create_lora_training_client(MODEL, rank=rank).result()


@pytest.mark.parametrize("name", ["tiny/qwen", "", "../tiny/qwen3", "x" * 10_000])
def test_an_unknown_model_is_refused_with_the_known_ones(
    mine: tinker.ServiceClient, name: str
) -> None:
    for create in (
        lambda: mine.create_lora_training_client(name),
        lambda: mine.create_sampling_client(base_model=name),
    ):
        with pytest.raises(tinker.BadRequestError) as refused:
            create().result()
        assert f"Served: {MODEL}, {ALIAS}" in str(refused.value)
        assert len(str(refused.value)) < 500


@pytest.mark.parametrize("lora", [{}, {"lora_config": None}, {"lora_config": {"rank": None}}])
def test_training_of_all_parameters_is_refused(wire: Wire, lora: dict[str, Any]) -> None:
    body = {"session_id": session_of(wire), "model_seq_id": 0, "base_model": MODEL, **lora}
    refused(wire.post("create_model", body), 400, "all parameters is not supported", "LoRA")


def test_nothing_to_train_is_refused(wire: Wire) -> None:
    parts = dict.fromkeys(("train_attn", "train_mlp", "train_unembed"), False)
    body = {
        "session_id": session_of(wire),
        "model_seq_id": 0,
        "base_model": MODEL,
        "lora_config": {"rank": 4, **parts},
    }
    refused(wire.post("create_model", body), 400, "at least one", "train_mlp")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", NAN),
        ("learning_rate", INFINITY),
        ("learning_rate", -1e-4),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", -1e-8),
        ("eps", NAN),
        ("weight_decay", -0.1),
        ("weight_decay", NAN),
        ("grad_clip_norm", INFINITY),
        ("grad_clip_norm", NAN),
    ],
)
def test_a_step_with_impossible_settings_is_refused(
    run: tinker.TrainingClient, name: str, value: float
) -> None:
    adam = types.AdamParams.model_validate({name: value})
    with pytest.raises(tinker.BadRequestError, match=name):
        run.optim_step(adam).result()


# ---- names


BAD_NAMES = ["a/b", "..", "a/../b", "", "x" * 129, "a b", ".hidden", "-x", "a\n", "caf\xe9", "a\0"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_checkpoint_name_is_refused(run: tinker.TrainingClient, name: str) -> None:
    for save in (run.save_state, run.save_weights_for_sampler):
        with pytest.raises(tinker.BadRequestError, match=r"heckpoint name|U\+0000"):
            save(name).result()


def test_the_longest_name_is_not(run: tinker.TrainingClient) -> None:
    name = "x" * 128
    assert run.save_state(name).result().path.endswith(name)


@pytest.mark.parametrize("path", ["a/b/c", "..", "%2e%2e", "", "x" * 129, "ck/..", "ck%00"])
def test_a_bad_address_is_refused(run: tinker.TrainingClient, wire: Wire, path: str) -> None:
    address = f"tinker://{run.model_id}/weights/{path}"
    answer = wire.post("weights_info", {"tinker_path": address})
    assert answer.status_code == 400, answer.text
    under = f"training_runs/{run.model_id}/checkpoints/weights/"
    for answer in (
        wire.request("DELETE", under + path),
        wire.request("PUT", f"{under}{path}/ttl", json={"ttl_seconds": None}),
    ):
        assert answer.status_code in {400, 404, 405}, answer.text


@pytest.mark.parametrize("address", ["nonsense", "tinker://a/b", "tinker://a/what/b", "file:///x"])
def test_what_is_no_address_is_refused(mine: tinker.ServiceClient, address: str) -> None:
    with pytest.raises(tinker.BadRequestError, match=r"must be 'weights'|weights/<name>"):
        mine.create_training_client_from_state(address).result()


# ---- things that are not there


def test_a_missing_checkpoint_is_not_found(
    mine: tinker.ServiceClient, run: tinker.TrainingClient, wire: Wire
) -> None:
    for owner in (run.model_id, "session-0:train:0"):
        for kind in ("weights", "sampler_weights"):
            path = f"tinker://{owner}/{kind}/none"
            for create in (
                lambda path=path: mine.create_training_client_from_state(path),
                lambda path=path: mine.create_training_client_from_state_with_optimizer(path),
                lambda path=path: mine.create_sampling_client(model_path=path),
            ):
                with pytest.raises(tinker.NotFoundError, match=f"There is no .*{kind}/none"):
                    create().result()
            load = {"model_id": run.model_id, "seq_id": UNUSED_SEQ, "path": path}
            refused(wire.post("load_weights", load), 404, "There is no", "none")


def test_missing_objects_are_not_found(wire: Wire) -> None:
    session = session_of(wire)
    for answer in (
        wire.post("get_info", {"model_id": f"{session}:train:0"}),
        wire.post("optim_step", {"model_id": "none", "seq_id": 1, "adam_params": {}}),
        wire.post("create_model", new_run_in("x", 0)),
        wire.post("asample", sample_of(f"{session}:sample:0")),
        wire.post("retrieve_future", {"request_id": "none"}),
        wire.post("cancel_future", {"request_id": "none"}),
        wire.post("session_heartbeat", {"session_id": "none"}),
        wire.get("samplers/none"),
        wire.get("training_runs/none"),
        wire.get("sessions/none"),
    ):
        refused(answer, 404, "There is no", "")


@pytest.mark.timeout(150)  # a service of its own, with two models
def test_a_checkpoint_of_another_base_model_is_not_found(tmp_path: Path) -> None:
    models = {
        "one": str(tiny_qwen3(tmp_path / "one", vocab_size=512, hidden=32, layers=1)),
        "two": str(tiny_llama(tmp_path / "two")),
    }
    with (
        local_service(models, dtype="float32", data_dir=tmp_path / "data") as service,
        tinker.ServiceClient(base_url=service.url, api_key=service.api_key) as client,
        Wire(service.url, service.api_key) as wire,
    ):
        run, other = (client.create_lora_training_client(m, rank=4).result() for m in models)
        small = [datum(random_tokens(6, seed=1, vocab_size=500))]
        train_one_step(run, small)
        loss = other.forward(small, "cross_entropy").result().metrics["loss:sum"]
        path = run.save_state("ck").result().path
        for create in (
            client.create_training_client_from_state,
            client.create_training_client_from_state_with_optimizer,
        ):
            with pytest.raises(tinker.NotFoundError, match="another base model"):
                create(path, base_model="two").result()
        load = {"model_id": other.model_id, "seq_id": UNUSED_SEQ, "path": path}
        refused(wire.post("load_weights", load), 404, "another base model", "two")
        # Without a wish, or with the right one, it is found; and the other run is as it was.
        assert (
            client.create_training_client_from_state(path).result().get_info().model_name == "one"
        )
        assert client.create_training_client_from_state(path, base_model="one").result()
        assert train_one_step(other, small) == pytest.approx(loss, rel=1e-6)


def test_another_tenants_objects_are_not_found(
    clients: tuple[tinker.ServiceClient, tinker.ServiceClient],
    run: tinker.TrainingClient,
    wire: Wire,
    service: LocalService,
) -> None:
    """To the other tenant everything is as if it did not exist, the answer's words included."""
    session = run.model_id.split(":")[0]
    state = run.save_state("private").result().path
    weights = run.save_weights_for_sampler("private").result().path
    sampler = wire.post(
        "create_sampling_session",
        {"session_id": session, "sampling_session_seq_id": 90, "base_model": MODEL},
    ).json()["sampling_session_id"]
    ticket = wire.promise("asample", sample_of(sampler, max_tokens=400))
    checkpoints = f"training_runs/{run.model_id}/checkpoints"
    requests: list[tuple[str, str, dict[str, Any] | None]] = [
        ("POST", "get_info", {"model_id": run.model_id}),
        ("POST", "optim_step", {"model_id": run.model_id, "adam_params": {"learning_rate": 1.0}}),
        ("POST", "save_weights", {"model_id": run.model_id, "path": "stolen"}),
        ("POST", "save_weights_for_sampler", {"model_id": run.model_id, "path": "stolen"}),
        ("POST", "load_weights", {"model_id": run.model_id, "path": state}),
        ("POST", "weights_info", {"tinker_path": state}),
        ("POST", "weights_info", {"tinker_path": weights}),
        ("POST", "create_model", new_run_in(session, 9)),
        (
            "POST",
            "create_sampling_session",
            {"session_id": session, "sampling_session_seq_id": 91, "base_model": MODEL},
        ),
        ("POST", "asample", sample_of(sampler)),
        ("POST", "retrieve_future", {"request_id": ticket}),
        ("POST", "cancel_future", {"request_id": ticket}),
        ("POST", "session_heartbeat", {"session_id": session}),
        ("POST", f"sessions/{session}/finish", {"reason": {"type": "success"}}),
        ("GET", f"samplers/{sampler}", None),
        ("GET", f"sessions/{session}", None),
        ("GET", f"training_runs/{run.model_id}", None),
        ("DELETE", f"{checkpoints}/weights/private", None),
        ("PUT", f"{checkpoints}/sampler_weights/private/ttl", {"ttl_seconds": 3600}),
    ]
    with Wire(service.url, OTHER_KEY) as other:
        for method, path, body in requests:
            refused(other.request(method, path, json=body), 404, "There is no", "")
        content = forward_backward_bytes(run.model_id, UNUSED_SEQ, BATCH)
        answer = other.send("forward_backward", content, {"content-type": PROTOBUF})
        refused(answer, 404, "There is no run", "")
        assert run.model_id not in other.get("training_runs?limit=1000").text
        assert run.model_id not in other.get("checkpoints?limit=1000").text
        assert session not in other.get("sessions?limit=1000").text
    for path in (state, weights):
        with pytest.raises(tinker.NotFoundError, match="There is no"):
            clients[1].create_training_client_from_state(path).result()
        with pytest.raises(tinker.NotFoundError, match="There is no"):
            clients[1].create_sampling_client(model_path=path).result()
    # All of it is still there.
    assert wire.wait(ticket).headers["content-type"] == PROTOBUF
    assert wire.request("DELETE", f"{checkpoints}/weights/private").status_code == 200


# ---- samples


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "at most 1, not 1.5"),
        ({"top_k": 0}, "top_k must be -1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": -1}, "max_tokens must be at least 1"),
        ({"stop": ""}, "stop string must not be empty"),
        ({"stop": ["a", ""]}, "stop string must not be empty"),
        ({"stop": [VOCABULARY]}, VOCABULARY_ENDS),
        ({"stop": [-1]}, VOCABULARY_ENDS),
    ],
)
def test_a_sample_with_impossible_settings_is_refused(
    sampler: tinker.SamplingClient, params: dict[str, Any], problem: str
) -> None:
    settings = types.SamplingParams.model_validate({"max_tokens": 1, **params})
    with pytest.raises(tinker.BadRequestError, match=problem):
        sampler.sample(types.ModelInput.from_ints(TOKENS), 1, settings).result()


@pytest.mark.parametrize(
    ("prompt", "num_samples", "problem"),
    [
        ([], 1, "prompt has no tokens"),
        ([VOCABULARY], 1, VOCABULARY_ENDS),
        ([-1], 1, VOCABULARY_ENDS),
        ([2**40], 1, "32 bits"),
        ([5] * (CONTEXT_LENGTH + 1), 1, str(CONTEXT_LENGTH)),
        (TOKENS, 0, "num_samples must be from 1 to"),
        (TOKENS, -1, "num_samples must be from 1 to"),
        (TOKENS, 10**9, "num_samples must be from 1 to"),
    ],
)
def test_an_impossible_prompt_is_refused(
    sampler: tinker.SamplingClient, prompt: list[int], num_samples: int, problem: str
) -> None:
    settings = types.SamplingParams(max_tokens=1)
    with pytest.raises(tinker.BadRequestError, match=problem):
        sampler.sample(types.ModelInput.from_ints(prompt), num_samples, settings).result()


# ---- what is not here yet


def test_missing_features_are_refused_by_name(
    mine: tinker.ServiceClient,
    run: tinker.TrainingClient,
    wire: Wire,
) -> None:
    attempts: dict[str, Callable[[], Any]] = {
        "dimuon": lambda: mine.create_lora_training_client(
            MODEL, optimizer=types.DimuonOptimizerConfig()
        ).result(),
        "optimizer_params": lambda: run.optim_step(types.DimuonParams(learning_rate=1e-3)).result(),
    }
    for name, attempt in attempts.items():
        with pytest.raises(tinker.BadRequestError, match=name) as refusal:
            attempt()
        assert "not supported" in str(refusal.value)
    other_kind = {
        "model_id": run.model_id,
        "seq_id": UNUSED_SEQ,
        "sampling_session_seq_id": 95,
        "kind": "copy",
    }
    refused(wire.post("save_weights_for_sampler", other_kind), 400, "'snapshot'", "kind")


# ---- keys


def test_a_missing_key_is_refused(service: LocalService, run: tinker.TrainingClient) -> None:
    with httpx.Client(base_url=f"{service.url}/api/v1/") as client:
        for path in ("client/config", "create_session", "optim_step", "nowhere"):
            answer = client.post(path, json={"model_id": run.model_id, "adam_params": {}})
            expected = 404 if path == "nowhere" else 401
            assert answer.status_code == expected, path
            assert KEY not in answer.text
        # Twinkle's clients show their key so; a wrong one is refused in either place.
        bearer = client.post("create_session", headers={"authorization": f"Bearer {KEY}x"}, json={})
        refused(bearer, 401, "API key", "not known")


# ---- bodies


def test_a_truncated_batch_is_refused(run: tinker.TrainingClient, wire: Wire) -> None:
    content = forward_backward_bytes(run.model_id, UNUSED_SEQ, BATCH)
    for size in (1, 10, len(content) // 2, len(content) - 1):
        answer = wire.send("forward_backward", content[:size], {"content-type": PROTOBUF})
        assert answer.status_code in {400, 404}, answer.text
    cut = content[: len(content) - 1]
    answer = wire.send("forward_backward", cut, {"content-type": PROTOBUF})
    refused(answer, 400, "protobuf", "not a complete")


@pytest.mark.parametrize(
    ("content_type", "problem"),
    [
        ("application/json", "JSON"),
        ("text/plain", "Content-Type"),
        ("multipart/form-data; boundary=x", "Content-Type"),
    ],
)
def test_a_wrong_content_type_is_refused(
    run: tinker.TrainingClient, wire: Wire, content_type: str, problem: str
) -> None:
    content = forward_backward_bytes(run.model_id, UNUSED_SEQ, BATCH)
    answer = wire.send("forward_backward", content, {"content-type": content_type})
    refused(answer, 400, problem, "")
    step = b'{"model_id": "x", "adam_params": {}}'
    answer = wire.send("optim_step", step, {"content-type": PROTOBUF})
    refused(answer, 400, "Content-Type", "application/json")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b'{"model_id": NaN}', b"\xff\xfe", b"[" * 100_000]
)
def test_what_is_no_json_object_is_refused(wire: Wire, body: bytes) -> None:
    refused(wire.send("optim_step", body, {"content-type": "application/json"}), 400, "body", "")


def test_a_field_of_the_wrong_kind_is_refused_by_name(
    run: tinker.TrainingClient, wire: Wire
) -> None:
    right: dict[str, Any] = {
        "model_id": run.model_id,
        "seq_id": UNUSED_SEQ,
        "adam_params": {},
    }
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"adam_params": {"learning_rate": "fast"}}, "learning_rate"),
        ({"adam_params": []}, "adam_params"),
        ({"adam_params": {"momentum": 0.9}}, "momentum"),
        ({"model_id": 5}, "model_id"),
        ({"model_id": None}, "model_id"),
        ({"seq_id": -1}, "seq_id"),
        ({"seq_id": "one"}, "seq_id"),
        ({"seq_id": 2**31}, "seq_id"),
        ({"seq_id": 2**70}, "seq_id"),
        ({"stray": 1}, "stray"),
    ]
    for wrong, name in mistakes:
        refused(wire.post("optim_step", right | wrong), 400, name, "")


def test_a_zstd_bomb_is_refused(run: tinker.TrainingClient, wire: Wire) -> None:
    """A hundred kilobytes that would unpack to a gigabyte."""
    bomb = zstandard.ZstdCompressor().compressobj()
    block = bytes(2**24)
    content = b"".join(bomb.compress(block) for _ in range(64)) + bomb.flush()
    headers = {"content-type": PROTOBUF, "content-encoding": "zstd"}
    refused(wire.send("forward_backward", content, headers), 400, "unpacks to more than", "MiB")
    whole = zstandard.compress(forward_backward_bytes(run.model_id, UNUSED_SEQ, BATCH))
    for damaged in (whole[:-1], whole[1:], whole + b"x"):
        refused(wire.send("forward_backward", damaged, headers), 400, "zstd", "")
    headers["content-encoding"] = "gzip"
    refused(wire.send("forward_backward", whole, headers), 400, "'gzip'", "use zstd")


def test_a_sparse_bomb_is_refused(run: tinker.TrainingClient) -> None:
    """A few bytes that would unfold to a matrix of a gigabyte."""
    rows, columns = 5, 50_000_000
    huge = types.TensorData(
        data=[1],
        dtype="int64",
        shape=[rows, columns],
        sparse_crow_indices=[0] + [1] * rows,
        sparse_col_indices=[0],
    )
    bad = replace(of(), loss_fn_inputs={"target_tokens": huge})
    with pytest.raises(tinker.BadRequestError, match=r"target_tokens.*MiB"):
        run.forward_backward([bad], "cross_entropy").result()


# ---- anything


STRANGE: tuple[Any, ...] = (
    None, True, -1, 1.5, 2**63, 1e308, "", "\0", "\ud800", "x" * 70_000, [], [None], {}, {"a": [1]},
)  # fmt: skip


def everywhere(body: Any, value: Any) -> Iterator[Any]:
    """Copies of a body, each with ``value`` in the place of one part of it."""
    yield value
    parts: dict[Any, Any] = {}
    if isinstance(body, dict | list):
        items = cast(list[Any], body)
        parts = dict(enumerate(items)) if isinstance(body, list) else dict(cast(Any, body))
    for key, part in parts.items():
        for other in everywhere(part, value):
            changed = copy(cast(Any, body))
            changed[key] = other
            yield changed


def test_no_strange_value_is_our_failure(wire: Wire) -> None:
    """Whatever stands anywhere in a body, nothing breaks, and nothing makes the SDK repeat it."""
    session = session_of(wire)
    create = {"session_id": session, "base_model": MODEL}
    run, sampler = f"{session}:train:0", f"{session}:sample:0"
    lora = {"rank": 1, "seed": 1, "train_attn": False, "train_unembed": False}
    wire.result(wire.promise("create_model", create | {"model_seq_id": 0, "lora_config": lora}))
    wire.post("create_sampling_session", create | {"sampling_session_seq_id": 0})
    adam = {"learning_rate": 0.0, "beta1": 0.9, "eps": 1e-8, "grad_clip_norm": 0.0}
    tensor = {"data": [1, 2], "dtype": "int64", "shape": [2]}
    chunk = {"type": "encoded_text", "tokens": [1, 2]}
    batch_: dict[str, Any] = {
        "loss_fn": "cross_entropy",
        "loss_fn_config": {},
        "data": [{"model_input": {"chunks": [chunk]}, "loss_fn_inputs": {"target_tokens": tensor}}],
    }
    total = {"op": "call_method", "name": "s", "target": "sum", "args": [{"ref": "logprobs"}]}
    out = [{"tuple": [{"ref": "s"}, {"dict": {"custom/a:sum": {"ref": "s"}}}]}]
    nodes: list[Any] = [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
        total | {"kwargs": {"dim": 0}},
        {"op": "output", "name": "output", "target": "output", "args": out},
    ]
    inputs = [{"name": "logprobs", "rank": 1}]
    loss = {"name": "a", "inputs": inputs, "graph": {"format": 1, "nodes": nodes}}
    bodies: dict[str, dict[str, Any]] = {
        "client/config": {"sdk_version": "0"},
        "create_session": {"tags": ["a"], "user_metadata": {"a": "b"}, "display_name": "d"},
        "session_heartbeat": {"session_id": session},
        "telemetry": {"events": [{}]},
        "create_model": create | {"model_seq_id": 1, "lora_config": lora, "user_metadata": {}},
        "get_info": {"model_id": run},
        "forward": {"model_id": run, "forward_input": batch_},
        "optim_step": {"model_id": run, "seq_id": 5, "adam_params": adam},
        "save_weights": {"model_id": run, "path": "a", "ttl_seconds": 3600, "overwrite": True},
        "save_weights_for_sampler": {"model_id": run, "path": "a", "kind": "snapshot"},
        "load_weights": {"model_id": run, "path": f"tinker://{run}/weights/a", "optimizer": True},
        "weights_info": {"tinker_path": f"tinker://{run}/weights/a"},
        "create_sampling_session": create | {"sampling_session_seq_id": 1, "model_path": None},
        "create_custom_loss": loss | {"session_id": session, "custom_loss_seq_id": 1},
        "asample": sample_of(sampler) | {"seq_id": 1, "num_samples": 1},
        "retrieve_future": {"request_id": "none"},
        "cancel_future": {"request_id": "none"},
        f"sessions/{session}x/finish": {"reason": {"type": "success"}, "detail": "x"},
    }
    for path, body in bodies.items():
        for value in STRANGE:
            for strange in everywhere(body, value):
                content = json.dumps(strange).encode()
                answer = wire.send(path, content, {"content-type": "application/json"})
                if answer.status_code != 200:
                    assert answer.status_code in {400, 404, 422}, (path, strange, answer.text)
                    assert answer.json()["detail"]


def test_no_damaged_batch_is_our_failure(mine: tinker.ServiceClient, wire: Wire) -> None:
    # A run of its own: some damage leaves a batch that is right, and may give it any place.
    run = mine.create_lora_training_client(MODEL, rank=1).result()
    whole = forward_backward_bytes(run.model_id, 1, BATCH)
    random = Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(random.randint(1, 3)):
            place = random.randrange(len(damaged))
            damaged[place : place + random.randrange(3)] = random.randbytes(random.randrange(3))
        answer = wire.send("forward_backward", bytes(damaged), {"content-type": PROTOBUF})
        assert answer.status_code in {200, 400, 404}, answer.text


# ---- help


def refused(answer: httpx.Response, status: int, problem: str, allowed: str) -> None:
    """The answer is this refusal, and one that the SDK reads as such (protocol section 1.6)."""
    assert answer.status_code == status, answer.text
    assert problem in answer.json()["detail"]
    assert allowed in answer.json()["detail"]
    assert int(answer.headers["content-length"]) == len(answer.content) > 0
    assert "content-encoding" not in answer.headers


def session_of(wire: Wire) -> str:
    return wire.post("create_session", {}).json()["session_id"]


def new_run_in(session: str, seq: int) -> dict[str, Any]:
    lora = {"rank": 4}
    return {
        "session_id": session,
        "model_seq_id": seq,
        "base_model": MODEL,
        "lora_config": lora,
    }


def sample_of(sampler: str, max_tokens: int = 1) -> dict[str, Any]:
    return {
        "sampling_session_id": sampler,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": TOKENS}]},
        "sampling_params": {"max_tokens": max_tokens, "stop": []},
    }
