"""Runs, their steps, their order and their repetition: items 14 to 41 of the protocol's checklist.

The losses are in ``test_losses``; here two ways of asking for the same thing are compared.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tinker
import torch
import zstandard
from tinker import types
from tinker.proto import tinker_public_pb2 as pb
from tinker.resources import training

from tests.blackbox.conftest import ALIAS, MODEL
from tests.blackbox.data import batch, datum, logprobs, random_tokens, train_one_step
from tests.blackbox.saved import Weights, distance, identical, moved, weights_of
from tests.blackbox.training import STEP, new_run, spent
from tests.blackbox.wire import Wire
from twinkle_dask import LocalService

Losses = types.ForwardBackwardOutput


@dataclass(frozen=True)
class Sent:
    """A ``forward_backward`` on its way, as the SDK posts it."""

    seq: int
    encoding: str | None

    @classmethod
    def of(cls, body: bytes, options: Any) -> "Sent":
        encoding = options["headers"].get("Content-Encoding")
        content = zstandard.decompress(body) if encoding == "zstd" else body
        message: Any = pb.ForwardBackwardRequest
        return cls(message.FromString(content).seq_id, encoding)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    """What the SDK posts, in order; it is posted all the same."""
    seen: list[Sent] = []
    resource: Any = training.AsyncTrainingResource
    made = resource.__init__

    def make(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        post = self._post

        async def note_and_post(path: str, **given: Any) -> Any:
            if path.endswith("/forward_backward"):
                seen.append(Sent.of(given["body"], given["options"]))
            return await post(path, **given)

        self._post = note_and_post

    monkeypatch.setattr(resource, "__init__", make)
    return seen


def with_flags(client: tinker.ServiceClient, **flags: Any) -> None:
    """As if the server had answered ``client/config`` so."""
    holder: Any = client.holder
    config = holder.get_client_config().model_copy(update=flags)
    holder._client_config = config
    holder._constructor_kwargs["_client_config"] = config


@pytest.fixture
def run(client: tinker.ServiceClient) -> tinker.TrainingClient:
    return new_run(client)


def test_14_runs_are_numbered_within_their_session(client: tinker.ServiceClient) -> None:
    session = client.holder.get_session_id()
    ids = [new_run(client).model_id for _ in range(2)]
    assert ids == [f"{session}:train:0", f"{session}:train:1"]


def test_15_a_run_tells_what_it_is(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(ALIAS, rank=3).result()
    info = run.get_info()
    assert info.model_id == run.model_id
    assert info.model_data.model_name == info.model_name == ALIAS
    assert info.model_data.arch == "Qwen3ForCausalLM"
    assert info.is_lora
    assert info.lora_rank == 3
    tokenizer: Any = run.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("Who are you?")) == "Who are you?"


def test_16_an_unknown_model_is_refused_by_name(client: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.BadRequestError, match=f"'no/such'.*{MODEL}"):
        client.create_lora_training_client("no/such").result()


def test_17_forward_changes_nothing(run: tinker.TrainingClient, service: LocalService) -> None:
    data = batch(num=3)
    train_one_step(run, data)
    before = weights_of(service, run, "before")
    forward = run.forward(data, "cross_entropy").result()
    assert [array.shape for array in logprobs(forward)] == [(11,), (12,), (13,)]
    assert spent(run) == 0.0
    assert identical(weights_of(service, run, "after"), before)
    backward = run.forward_backward(data, "cross_entropy").result()
    assert backward.metrics == pytest.approx(forward.metrics, rel=1e-6)
    np.testing.assert_allclose(logprobs(backward)[2], logprobs(forward)[2], rtol=1e-5)


def test_18_the_loss_is_the_weighted_sum(run: tinker.TrainingClient) -> None:
    tokens = random_tokens(9, seed=1)
    weights = [0.0, 1.0, -0.5, 0.25, 3.0, 0.0, 0.0, 1.0]
    output = run.forward_backward([datum(tokens, weights=weights)], "cross_entropy").result()
    (lp,) = logprobs(output)
    assert (lp < 0).all()  # at weight zero too
    expected = -float(np.dot(np.asarray(weights), lp))
    assert output.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)


def test_20_sparse_targets_and_weights_are_the_dense_ones(
    client: tinker.ServiceClient, service: LocalService
) -> None:
    """(N, K) targets as for distillation; CSR leaves out cells of weight 0."""
    rng = np.random.default_rng(0)
    tokens = random_tokens(10, seed=2)
    used = rng.random((10, 12)) < 0.2
    targets = torch.tensor(rng.integers(0, 4096, (10, 12)) * used)
    weights = torch.tensor(rng.normal(size=(10, 12)) * used, dtype=torch.float32)
    sparse = types.TensorData.from_torch_sparse(targets)
    assert sparse.sparse_crow_indices is not None
    results: list[tuple[types.ForwardBackwardOutput, float, Weights]] = []
    for convert in (types.TensorData.from_torch, types.TensorData.from_torch_sparse):
        run = new_run(client)
        inputs = {"target_tokens": convert(targets), "weights": convert(weights)}
        prompt = types.ModelInput.from_ints(tokens)
        data = [types.Datum(model_input=prompt, loss_fn_inputs=inputs)]
        output = run.forward_backward(data, "cross_entropy").result()
        results.append((output, spent(run), weights_of(service, run, "after")))
    (dense, dense_norm, dense_weights), (csr, csr_norm, csr_weights) = results
    assert logprobs(dense)[0].shape == logprobs(csr)[0].shape == (10, 12)
    expected = -float((weights.numpy() * logprobs(dense)[0]).sum())
    assert dense.metrics["loss:sum"] == pytest.approx(expected, rel=1e-4)
    assert csr.metrics == dense.metrics
    assert csr_norm == dense_norm > 0
    assert identical(csr_weights, dense_weights)


def test_21_2500_data_travel_in_chunks_and_come_back_in_order(
    client: tinker.ServiceClient, wire: Wire
) -> None:
    """The SDK makes three requests of them, which arrive as 2, 3, 1."""
    rng = np.random.default_rng(0)
    data = [datum(rng.integers(10, 4096, 2 + i % 3).tolist()) for i in range(2500)]
    chunked, whole = new_run(client), new_run(client)
    future = chunked.forward_backward(data, "cross_entropy")
    metrics = wire.metrics(wire.forward_backward(whole.model_id, 1, data))
    output = future.result()
    assert len(output.loss_fn_outputs) == 2500
    assert [len(array) for array in logprobs(output)] == [1 + i % 3 for i in range(2500)]
    assert output.metrics == pytest.approx(metrics, rel=1e-5)
    for i in (0, 1023, 1024, 2047, 2048, 2499):
        alone = chunked.forward([data[i]], "cross_entropy").result()
        np.testing.assert_allclose(
            logprobs(output)[i], logprobs(alone)[0], rtol=1e-4, err_msg=str(i)
        )
    step = wire.result(wire.optim_step(whole.model_id, 2))
    assert spent(chunked) == pytest.approx(step["metrics"]["grad_norm:mean"], rel=1e-5)


def test_21_the_first_chunk_arrives_last(client: tinker.ServiceClient, sent: list[Sent]) -> None:
    """2, 3, 1; and what comes behind them waits for all three."""
    run = new_run(client)
    with_flags(client, fwdbwd_max_chunk_len=2)
    data = batch(num=5)
    learned = run.forward_backward(data, "cross_entropy")
    step = run.optim_step(STEP)
    after = run.forward(data, "cross_entropy")
    assert len(learned.result().loss_fn_outputs) == 5
    assert step.result().metrics
    assert after.result().metrics["loss:sum"] < learned.result().metrics["loss:sum"]
    order = [one.seq for one in sent]
    assert set(order[:2]) == {2, 3}
    assert order[2] == 1
    assert order[5] == 5


@pytest.mark.parametrize("arrival", [(1, 2, 3), (2, 3, 1), (3, 2, 1)])
def test_21_requests_may_arrive_in_any_order(
    run: tinker.TrainingClient, wire: Wire, arrival: tuple[int, ...]
) -> None:
    """As with the SDK's parallel chunks, and with that switched off."""
    data = batch(num=3)
    sent = {seq: wire.forward_backward(run.model_id, seq, [data[seq - 1]]) for seq in arrival}
    step = wire.optim_step(run.model_id, 4)
    losses = [wire.metrics(sent[seq])["loss:sum"] for seq in (1, 2, 3)]
    assert wire.result(step)["metrics"]["grad_norm:mean"] > 0
    after = wire.metrics(wire.forward_backward(run.model_id, 5, data))
    assert after["loss:sum"] < sum(losses)


def test_22_pipelined_steps_equal_awaited_ones(client: tinker.ServiceClient) -> None:
    awaited, pipelined = new_run(client), new_run(client)
    expected = [train_one_step(awaited, batch(seed=i)) for i in range(5)]
    pending: list[tinker.APIFuture[types.ForwardBackwardOutput]] = []
    for i in range(5):
        pending.append(pipelined.forward_backward(batch(seed=i), "cross_entropy"))
        pipelined.optim_step(STEP)
    losses = [future.result().metrics["loss:sum"] for future in pending]
    assert losses == pytest.approx(expected, rel=1e-6)


def test_23_gradients_accumulate_until_a_step(
    client: tinker.ServiceClient, service: LocalService
) -> None:
    data = batch(num=4)
    parts, whole = new_run(client), new_run(client)
    pending = [parts.forward_backward(part, "cross_entropy") for part in (data[:1], data[1:])]
    at_once = whole.forward_backward(data, "cross_entropy").result()
    losses = [future.result().metrics["loss:sum"] for future in pending]
    assert sum(losses) == pytest.approx(at_once.metrics["loss:sum"], rel=1e-5)
    assert spent(parts) == pytest.approx(spent(whole), rel=1e-5)
    # Adam's first step is the gradient's sign, so only entries of noise may differ.
    after = weights_of(service, parts, "after"), weights_of(service, whole, "after")
    assert distance(*after) < 1e-3
    assert spent(parts) == 0.0


@pytest.mark.parametrize(
    ("loss", "config", "message"),
    [
        ("cross_entropi", None, "Unknown loss 'cross_entropi'"),
        ("cross_entropy", {"clip": 1.0}, "no setting 'clip'"),
        ("ppo", {"clip_low_threshold": float("nan")}, "must be finite"),
        ("ppo", None, "needs 'advantages'"),
        ("dro", {"beta": -1.0}, "at least 0"),
        ("gspo", {"clip_low_threshold": 1.5}, "around 1"),
    ],
)
def test_31_a_refused_loss_leaves_the_run_as_it_was(
    run: tinker.TrainingClient, loss: types.LossFnType, config: dict[str, float], message: str
) -> None:
    """Its number is used up; what is pipelined behind it goes on."""
    good = run.forward_backward(batch(), "cross_entropy")
    refused = run.forward_backward(batch(), loss, config)
    step = run.optim_step(STEP)
    after = run.forward(batch(), "cross_entropy")
    with pytest.raises(tinker.BadRequestError, match=message):
        refused.result()
    metrics = step.result().metrics
    assert metrics is not None
    assert metrics["grad_norm:mean"] > 0
    assert after.result().metrics["loss:sum"] < good.result().metrics["loss:sum"]


def test_33_a_failing_custom_loss_ends_only_its_own_client(client: tinker.ServiceClient) -> None:
    broken, sound = new_run(client), new_run(client)

    def loss(
        data: list[types.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        broken.forward_backward_custom(batch(), loss).result()
    with pytest.raises(RuntimeError, match="poisoned"):
        broken.optim_step(STEP).result()
    assert train_one_step(sound, batch()) > 0


def test_34_metrics_can_be_combined_by_their_suffix(run: tinker.TrainingClient) -> None:
    metrics = run.forward_backward(batch(), "cross_entropy").result().metrics
    assert metrics["tokens:sum"] == 11 + 12
    assert all(len(name.split(":")) == 2 for name in metrics)
    assert {name.split(":")[1] for name in metrics} <= {"sum", "mean", "min", "max"}


def test_35_a_request_that_is_never_sent_holds_up_nobody(run: tinker.TrainingClient) -> None:
    """The SDK cannot encode such a chunk; the number it had taken never arrives."""
    picture = types.ImageAssetPointerChunk(format="png", location="x.png", expected_tokens=3)
    lost = types.Datum(
        model_input=types.ModelInput(chunks=[picture]),
        loss_fn_inputs=datum(random_tokens(4, seed=1)).loss_fn_inputs,
    )
    first = run.forward_backward([lost], "cross_entropy")
    second = run.forward_backward(batch(), "cross_entropy")
    step = run.optim_step(STEP)
    with pytest.raises(ValueError, match="ImageAssetPointerChunk"):
        first.result()
    loss = second.result().metrics["loss:sum"]
    step.result()
    assert train_one_step(run, batch()) < loss


def test_35_a_refused_step_leaves_no_gap(run: tinker.TrainingClient) -> None:
    """4xx: its number is used up, and those behind it are pipelined already."""
    learned = run.forward_backward(batch(), "cross_entropy")
    refused = run.optim_step(types.AdamParams(learning_rate=-1.0))
    step = run.optim_step(STEP)
    with pytest.raises(tinker.BadRequestError, match="learning_rate"):
        refused.result()
    metrics = step.result().metrics
    assert metrics is not None
    assert metrics["grad_norm:mean"] > 0
    assert train_one_step(run, batch()) < learned.result().metrics["loss:sum"]


def test_36_a_repeated_creation_makes_one_run(client: tinker.ServiceClient, wire: Wire) -> None:
    session = client.holder.get_session_id()
    body: dict[str, Any] = {"session_id": session, "model_seq_id": 5, "base_model": MODEL}
    body["lora_config"] = {"rank": 4}
    first = wire.promise("create_model", body)
    assert wire.promise("create_model", body) == first
    assert wire.result(first)["model_id"] == f"{session}:train:5"
    assert wire.promise("create_model", body) == first


def test_36_a_repeated_request_is_done_once(client: tinker.ServiceClient, wire: Wire) -> None:
    """While it waits, and after it is done; the body of the first one counts."""
    once, repeated = new_run(client), new_run(client)
    expected_loss = once.forward_backward(batch(), "cross_entropy").result().metrics["loss:sum"]
    expected = spent(once), once.forward(batch(), "cross_entropy").result().metrics["loss:sum"]
    run = repeated.model_id

    waiting = wire.optim_step(run, 2)  # until number 1 is there
    assert wire.optim_step(run, 2) == waiting
    first = wire.forward_backward(run, 1, batch())
    assert wire.forward_backward(run, 1, batch()) == first
    norm = wire.result(waiting)["metrics"]["grad_norm:mean"]
    assert wire.forward_backward(run, 1, batch(seed=7)) == first
    assert wire.optim_step(run, 2, learning_rate=100.0) == waiting
    assert wire.metrics(first)["loss:sum"] == expected_loss
    assert wire.metrics(first) == wire.metrics(first)  # readable again
    after = wire.metrics(wire.forward_backward(run, 3, batch()))["loss:sum"]
    assert (norm, after) == pytest.approx(expected, rel=1e-6)


def test_37_a_compressed_batch_is_the_same_batch(client: tinker.ServiceClient, wire: Wire) -> None:
    run = new_run(client).model_id
    plain = wire.forward_backward(run, 1, batch())
    packed = wire.forward_backward(run, 2, batch(), zstd=True)
    assert wire.metrics(packed) == wire.metrics(plain)


def test_37_the_sdk_compresses_when_told_to(
    client: tinker.ServiceClient, other_client: tinker.ServiceClient, sent: list[Sent]
) -> None:
    with_flags(client, proto_compress_fwdbwd=True)
    plain, packed = new_run(other_client), new_run(client)
    expected = plain.forward_backward(batch(), "cross_entropy").result()
    output = packed.forward_backward(batch(), "cross_entropy").result()
    assert [one.encoding for one in sent] == [None, "zstd"]
    assert output.metrics == pytest.approx(expected.metrics, rel=1e-6)
    assert spent(packed) == pytest.approx(spent(plain), rel=1e-6)


def test_38_chunks_one_after_another(client: tinker.ServiceClient, sent: list[Sent]) -> None:
    """With ``parallel_fwdbwd_chunks`` off they are the same batch."""
    parallel, serial = new_run(client), new_run(client)
    data = batch(num=5)
    expected = parallel.forward_backward(data, "cross_entropy").result()
    with_flags(client, parallel_fwdbwd_chunks=False, fwdbwd_max_chunk_len=2)
    sent.clear()
    output = serial.forward_backward(data, "cross_entropy").result()
    assert [one.seq for one in sent] == [1, 2, 3]
    assert output.metrics == pytest.approx(expected.metrics, rel=1e-5)
    assert len(output.loss_fn_outputs) == 5
    assert spent(serial) == pytest.approx(spent(parallel), rel=1e-5)


def test_39_a_seed_fixes_the_new_adapter(
    client: tinker.ServiceClient, service: LocalService
) -> None:
    def new(seed: int | None) -> Weights:
        run = client.create_lora_training_client(MODEL, rank=4, seed=seed).result()
        return weights_of(service, run, "new")

    first, again, other, drawn, drawn_again = map(new, (1, 1, 2, None, None))
    assert identical(first, again)
    assert not identical(first, other)
    assert not identical(drawn, drawn_again)


@pytest.mark.parametrize(
    ("attn", "mlp", "unembed", "modules"),
    [
        (True, False, False, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (False, True, False, {"gate_proj", "up_proj", "down_proj"}),
        (False, False, True, {"lm_head"}),
    ],
)
def test_40_only_what_was_asked_for_is_trained(
    client: tinker.ServiceClient,
    service: LocalService,
    attn: bool,
    mlp: bool,
    unembed: bool,
    modules: set[str],
) -> None:
    run = client.create_lora_training_client(
        MODEL, rank=4, seed=1, train_attn=attn, train_mlp=mlp, train_unembed=unembed
    ).result()
    weights = weights_of(service, run, "new")
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in weights} == modules
    data = batch()
    losses = [train_one_step(run, data) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]


def test_41_runs_of_many_tenants_do_not_disturb_each_other(
    client: tinker.ServiceClient, other_client: tinker.ServiceClient, service: LocalService
) -> None:
    """Together their rows share passes, so sums are rounded differently; nothing else differs."""
    owners = [client, other_client, client, other_client, client, other_client]
    steps = 4

    def start(run: tinker.TrainingClient, own: int) -> list[tinker.APIFuture[Losses]]:
        pending: list[tinker.APIFuture[Losses]] = []
        for step in range(steps):
            data = batch(num=1 + own % 3, length=5 + 9 * own, seed=100 * own + step % 2)
            pending.append(run.forward_backward(data, "cross_entropy"))
            # With Adam's tiny default eps, entries of pure noise would move as far as others.
            run.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-6))
        return pending

    def losses(pending: list[tinker.APIFuture[Losses]]) -> list[float]:
        return [future.result().metrics["loss:sum"] for future in pending]

    alone: list[list[float]] = []
    initial: list[Weights] = []
    final: list[Weights] = []
    for own, owner in enumerate(owners):
        run = new_run(owner, seed=own)
        initial.append(weights_of(service, run, "initial"))
        alone.append(losses(start(run, own)))
        final.append(weights_of(service, run, "final"))
    runs = [new_run(owner, seed=own) for own, owner in enumerate(owners)]
    pending = [start(run, own) for own, run in enumerate(runs)]
    for own, run in enumerate(runs):
        # Differences of 1e-7 a sum grow through the steps; 1.1e-5 was seen.
        assert losses(pending[own]) == pytest.approx(alone[own], rel=5e-5)
        together = weights_of(service, run, "final")
        way = moved(final[own], initial[own])
        assert distance(moved(together, initial[own]), way) < 1e-3
