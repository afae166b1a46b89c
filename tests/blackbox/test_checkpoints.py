"""Saving, resuming, sampling from what was saved, and the records of it, through the SDK."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.blackbox.conftest import ALIAS, KEY, MODEL, OTHER_KEY
from tests.blackbox.data import batch, train_one_step
from tests.blackbox.saved import arrays, distance, folder_of, identical, moved, weights_of
from tests.blackbox.wire import Wire
from twinkle_dask import LocalService

# A failure that will not pass must come at once: the SDK would repeat other ones for minutes.
pytestmark = pytest.mark.timeout(30)

PROMPT = types.ModelInput.from_ints([20, 21, 22, 23])
GREEDY = types.SamplingParams(max_tokens=12, temperature=0, stop=[])
HOUR = 3600
DECADE = 10 * 365 * 86400


@pytest.fixture
def run(client: tinker.ServiceClient) -> tinker.TrainingClient:
    """Trained a little, so that its adapter says something."""
    run = client.create_lora_training_client(
        MODEL, rank=4, seed=1, train_unembed=False, user_metadata={"renderer_name": "plain"}
    ).result()
    train_one_step(run, batch(), lr=3e-2)
    return run


@pytest.fixture
def rest(service: LocalService) -> tinker.RestClient:
    return tinker.RestClient(base_url=service.url, api_key=KEY)


def train_on(run: tinker.TrainingClient) -> None:
    """Away from where it is, and from what it says."""
    for seed in range(3):
        train_one_step(run, batch(seed=seed), lr=5e-2)


@dataclass(frozen=True)
class Drawn:
    """What a sampler says to the prompt; equal within rounding, far less than adapters differ."""

    tokens: Sequence[int]
    logprobs: Sequence[float]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Drawn)
            and self.tokens == other.tokens
            and np.allclose(self.logprobs, other.logprobs, atol=1e-4)
        )


def drawn(sampler: tinker.SamplingClient) -> Drawn:
    (sequence,) = sampler.sample(PROMPT, 1, GREEDY).result().sequences
    assert sequence.logprobs is not None
    return Drawn(list(sequence.tokens), list(sequence.logprobs))


def load(run: tinker.TrainingClient, path: str, *, with_optimizer: bool = False) -> str | None:
    """The old way of loading, into a run that exists; the SDK warns that it will go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if with_optimizer:
            return run.load_state_with_optimizer(path).result().path  # pyright: ignore[reportDeprecated]
        return run.load_state(path).result().path  # pyright: ignore[reportDeprecated]


def known(rest: tinker.RestClient, run: str) -> dict[str, types.Checkpoint]:
    """A run's checkpoints by their id."""
    listed = rest.list_checkpoints(run).result().checkpoints
    return {checkpoint.checkpoint_id: checkpoint for checkpoint in listed}


# ---- saving


def test_a_saved_state_has_an_address(
    run: tinker.TrainingClient, rest: tinker.RestClient, service: LocalService
) -> None:
    before = datetime.now(UTC)
    path = run.save_state("ck-1.a_b", user_metadata={"step": "1"}).result().path
    assert path == f"tinker://{run.model_id}/weights/ck-1.a_b"
    (checkpoint,) = known(rest, run.model_id).values()
    assert checkpoint.checkpoint_id == "weights/ck-1.a_b"
    assert checkpoint.checkpoint_type == "training"
    assert checkpoint.tinker_path == path
    assert checkpoint.user_metadata == {"step": "1"}
    assert before <= checkpoint.time <= datetime.now(UTC)
    assert checkpoint.expires_at is None
    assert not checkpoint.public
    files = folder_of(service, path).iterdir()
    assert checkpoint.size_bytes == sum(file.stat().st_size for file in files)


def test_a_name_is_taken_once(
    run: tinker.TrainingClient, rest: tinker.RestClient, service: LocalService
) -> None:
    saved = weights_of(service, run, "ck")
    folder = folder_of(service, f"tinker://{run.model_id}/weights/ck")
    train_on(run)
    with pytest.raises(tinker.BadRequestError, match=r"'ck'.* exists already"):
        run.save_state("ck").result()
    assert len(known(rest, run.model_id)) == 1
    assert identical(arrays(folder / "adapter_model.safetensors"), saved)
    run.save_weights_for_sampler("ck").result()  # another kind, another address
    with pytest.raises(tinker.BadRequestError, match=r"'ck'.* exists already"):
        run.save_weights_for_sampler("ck").result()
    assert known(rest, run.model_id).keys() == {"weights/ck", "sampler_weights/ck"}


def test_a_name_is_taken_once_in_a_pipeline_too(
    run: tinker.TrainingClient, rest: tinker.RestClient
) -> None:
    """The second is submitted before the first is saved, so it fails as a result."""
    pending = [run.save_state("ck") for _ in range(2)]
    assert pending[0].result().path.endswith("/weights/ck")
    with pytest.raises((tinker.BadRequestError, tinker.RequestFailedError), match="exists already"):
        pending[1].result()
    assert len(known(rest, run.model_id)) == 1


def test_overwriting_replaces_everything(
    client: tinker.ServiceClient,
    run: tinker.TrainingClient,
    rest: tinker.RestClient,
    service: LocalService,
) -> None:
    path = run.save_state("ck", ttl_seconds=HOUR, user_metadata={"a": "1"}).result().path
    old = folder_of(service, path)
    train_on(run)
    assert run.save_state("ck", overwrite=True, user_metadata={"b": "2"}).result().path == path
    (checkpoint,) = known(rest, run.model_id).values()
    assert checkpoint.user_metadata == {"b": "2"}
    assert checkpoint.expires_at is None
    assert not old.exists()
    resumed = client.create_training_client_from_state(path).result()
    assert identical(weights_of(service, resumed, "x"), weights_of(service, run, "x"))


def test_a_state_lives_as_long_as_was_asked(
    run: tinker.TrainingClient, rest: tinker.RestClient
) -> None:
    def life(name: str) -> float:
        """Seconds from now to the end."""
        end = known(rest, run.model_id)[name].expires_at
        assert end is not None
        return (end - datetime.now(UTC)).total_seconds()

    path = run.save_state("ck", ttl_seconds=HOUR).result().path
    assert life("weights/ck") == pytest.approx(HOUR, abs=60)
    run.save_weights_for_sampler("s", ttl_seconds=DECADE).result()
    assert life("sampler_weights/s") == pytest.approx(DECADE, abs=60)
    rest.set_checkpoint_ttl_from_tinker_path(path, 2 * HOUR).result()
    assert life("weights/ck") == pytest.approx(2 * HOUR, abs=60)
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert known(rest, run.model_id)["weights/ck"].expires_at is None


@pytest.mark.parametrize("ttl_s", [HOUR - 1, DECADE + 1, 0, -HOUR])
def test_a_lifetime_out_of_range_is_refused(
    run: tinker.TrainingClient, rest: tinker.RestClient, ttl_s: int
) -> None:
    path = run.save_state("ck").result().path
    with pytest.raises(tinker.BadRequestError, match=f"ttl_seconds.* {HOUR} to {DECADE}"):
        run.save_state("other", ttl_seconds=ttl_s).result()
    with pytest.raises(tinker.BadRequestError, match="ttl_seconds"):
        run.save_weights_for_sampler("other", ttl_seconds=ttl_s).result()
    with pytest.raises(tinker.BadRequestError, match="ttl_seconds"):
        rest.set_checkpoint_ttl_from_tinker_path(path, ttl_s).result()
    (checkpoint,) = known(rest, run.model_id).values()
    assert checkpoint.expires_at is None


# ---- resuming


def test_from_state_the_optimizer_starts_over(
    client: tinker.ServiceClient, run: tinker.TrainingClient, service: LocalService
) -> None:
    path = run.save_state("ck").result().path
    saved = weights_of(service, run, "same")
    fresh = client.create_training_client_from_state(path).result()
    kept = client.create_training_client_from_state_with_optimizer(path).result()
    assert identical(weights_of(service, fresh, "start"), saved)
    assert identical(weights_of(service, kept, "start"), saved)
    assert fresh.get_info().lora_rank == 4
    for one in (run, fresh, kept):
        train_one_step(one, batch(seed=9))
    end, end_fresh, end_kept = (weights_of(service, one, "end") for one in (run, fresh, kept))
    assert identical(end_kept, end)
    assert distance(moved(end_fresh, saved), moved(end, saved)) > 0.1
    # Without moments the first step of Adam has the size of the learning rate everywhere.
    assert max(abs(way).max() for way in moved(end_fresh, saved).values()) == pytest.approx(
        1e-2, rel=1e-3
    )


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_a_state_from_before_the_first_step(
    client: tinker.ServiceClient, service: LocalService, with_optimizer: bool
) -> None:
    """Its optimizer has no moments yet."""
    run = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    path = run.save_state("new").result().path
    create = (
        client.create_training_client_from_state_with_optimizer
        if with_optimizer
        else client.create_training_client_from_state
    )
    resumed = create(path).result()
    assert identical(weights_of(service, resumed, "x"), weights_of(service, run, "x"))
    assert train_one_step(resumed, batch()) == train_one_step(run, batch())
    assert identical(weights_of(service, resumed, "y"), weights_of(service, run, "y"))


def test_unspent_gradients_are_no_part_of_a_state(
    client: tinker.ServiceClient, run: tinker.TrainingClient
) -> None:
    run.forward_backward(batch(), "cross_entropy").result()
    path = run.save_state("ck").result().path
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    assert resumed.optim_step(types.AdamParams()).result().metrics == {"grad_norm:mean": 0.0}
    metrics = run.optim_step(types.AdamParams()).result().metrics
    assert metrics is not None
    assert metrics["grad_norm:mean"] > 0


def test_a_state_is_saved_at_its_place_in_the_order(
    client: tinker.ServiceClient, run: tinker.TrainingClient
) -> None:
    """Everything is pipelined; the state is that between the two steps."""
    expected = [train_one_step(run, batch()) for _ in range(3)]
    path = run.save_state("start").result().path
    run = client.create_training_client_from_state_with_optimizer(path).result()
    again = client.create_training_client_from_state_with_optimizer(path).result()
    expected = [train_one_step(again, batch()) for _ in range(3)]
    run.forward_backward(batch(), "cross_entropy")
    run.optim_step(types.AdamParams(learning_rate=1e-2))
    saved = run.save_state("between")
    run.forward_backward(batch(), "cross_entropy")
    run.optim_step(types.AdamParams(learning_rate=1e-2))
    between = client.create_training_client_from_state_with_optimizer(saved.result().path).result()
    assert [train_one_step(between, batch()) for _ in range(2)] == pytest.approx(
        expected[1:], rel=1e-6
    )


def test_a_state_outlives_its_session(
    client: tinker.ServiceClient, rest: tinker.RestClient, service: LocalService
) -> None:
    with tinker.ServiceClient(base_url=service.url, api_key=KEY) as first:
        run = first.create_lora_training_client(MODEL, rank=4, user_metadata={"a": "1"}).result()
        train_one_step(run, batch())
        path = run.save_state("ck").result().path
        saved = weights_of(service, run, "same")
        expected = train_one_step(run, batch())
    resumed = client.create_training_client_from_state_with_optimizer(
        path, user_metadata={"b": "2"}
    ).result()
    assert resumed.model_id == f"{client.holder.get_session_id()}:train:0"
    assert identical(weights_of(service, resumed, "start"), saved)
    assert train_one_step(resumed, batch()) == expected
    info = rest.get_training_run(resumed.model_id).result()
    assert info.user_metadata == {"b": "2"}


def test_another_name_of_the_same_model_will_do(
    client: tinker.ServiceClient, run: tinker.TrainingClient, service: LocalService
) -> None:
    path = run.save_state("ck").result().path
    resumed = client.create_training_client_from_state(path, base_model=ALIAS).result()
    assert resumed.get_info().model_data.model_name == ALIAS
    assert identical(weights_of(service, resumed, "x"), weights_of(service, run, "x"))


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_loading_into_a_fresh_client(
    client: tinker.ServiceClient,
    run: tinker.TrainingClient,
    service: LocalService,
    with_optimizer: bool,
) -> None:
    path = run.save_state("ck").result().path
    fresh = client.create_lora_training_client(MODEL, rank=4, seed=9, train_unembed=False).result()
    assert load(fresh, path, with_optimizer=with_optimizer) == path
    assert identical(weights_of(service, fresh, "start"), weights_of(service, run, "start"))
    for one in (run, fresh):
        train_one_step(one, batch())
    ends = weights_of(service, run, "end"), weights_of(service, fresh, "end")
    assert identical(*ends) is with_optimizer


def test_loading_another_shape_is_refused(
    client: tinker.ServiceClient, run: tinker.TrainingClient
) -> None:
    path = run.save_state("ck").result().path
    other = client.create_lora_training_client(MODEL, rank=5).result()
    with pytest.raises(tinker.BadRequestError, match="rank 4"):
        load(other, path)
    assert train_one_step(other, batch()) > 0


def test_sampler_weights_have_no_optimizer_to_resume(
    client: tinker.ServiceClient, run: tinker.TrainingClient, service: LocalService
) -> None:
    path = run.save_weights_for_sampler("s").result().path
    with pytest.raises(tinker.BadRequestError, match="without an optimizer"):
        client.create_training_client_from_state_with_optimizer(path).result()
    resumed = client.create_training_client_from_state(path).result()
    assert identical(weights_of(service, resumed, "x"), weights_of(service, run, "x"))


def test_what_is_not_there_is_not_found_at_once(
    client: tinker.ServiceClient, run: tinker.TrainingClient, rest: tinker.RestClient
) -> None:
    missing = f"tinker://{run.model_id}/weights/missing"
    attempts: list[Callable[[], object]] = [
        lambda: client.create_training_client_from_state(missing).result(),
        lambda: client.create_training_client_from_state_with_optimizer(missing).result(),
        lambda: load(run, missing),
        lambda: client.create_sampling_client(model_path=missing).result(),
        lambda: rest.get_weights_info_by_tinker_path(missing).result(),
        lambda: rest.delete_checkpoint_from_tinker_path(missing).result(),
        lambda: rest.set_checkpoint_ttl_from_tinker_path(missing, HOUR).result(),
        lambda: rest.get_training_run("session-0:train:0").result(),
    ]
    for attempt in attempts:
        with pytest.raises(tinker.NotFoundError):
            attempt()
    assert train_one_step(run, batch()) > 0


# ---- samplers


def test_named_weights_can_be_sampled_from(
    client: tinker.ServiceClient, run: tinker.TrainingClient
) -> None:
    path = run.save_weights_for_sampler("s1").result().path
    assert path == f"tinker://{run.model_id}/sampler_weights/s1"
    expected = drawn(run.save_weights_and_get_sampling_client().result())
    train_on(run)
    by_path = client.create_sampling_client(model_path=path).result()
    assert by_path.get_base_model() == MODEL
    assert drawn(by_path) == expected
    assert drawn(run.create_sampling_client(path).result()) == expected
    assert drawn(client.create_sampling_client(base_model=MODEL).result()) != expected


def test_a_training_state_can_be_sampled_from(
    client: tinker.ServiceClient, run: tinker.TrainingClient
) -> None:
    path = run.save_state("ck").result().path
    expected = drawn(run.save_weights_and_get_sampling_client().result())
    assert drawn(client.create_sampling_client(model_path=path).result()) == expected


def test_a_snapshot_stays_what_it_is(run: tinker.TrainingClient, rest: tinker.RestClient) -> None:
    snapshot = run.save_weights_and_get_sampling_client().result()
    expected = drawn(snapshot)
    train_on(run)
    later = run.save_weights_and_get_sampling_client().result()
    assert drawn(later) != expected
    assert drawn(snapshot) == expected
    assert known(rest, run.model_id) == {}  # no name, so in no list


def test_a_snapshot_is_taken_at_its_place_in_the_order(run: tinker.TrainingClient) -> None:
    expected = drawn(run.save_weights_and_get_sampling_client().result())
    run.forward(batch(), "cross_entropy")
    snapshot = run.save_weights_and_get_sampling_client()
    run.forward_backward(batch(), "cross_entropy")
    step = run.optim_step(types.AdamParams(learning_rate=5e-2))
    assert drawn(snapshot.result()) == expected
    step.result()
    assert drawn(run.save_weights_and_get_sampling_client().result()) != expected


def test_sampler_weights_outlive_their_session(
    client: tinker.ServiceClient, service: LocalService
) -> None:
    with tinker.ServiceClient(base_url=service.url, api_key=KEY) as first:
        run = first.create_lora_training_client(MODEL, rank=4).result()
        train_one_step(run, batch(), lr=3e-2)
        path = run.save_weights_for_sampler("s").result().path
        sampler = first.create_sampling_client(model_path=path).result()
        expected = drawn(sampler)
    assert drawn(client.create_sampling_client(model_path=path).result()) == expected


def test_weights_that_are_gone_cannot_be_sampled_from(
    client: tinker.ServiceClient, run: tinker.TrainingClient, rest: tinker.RestClient
) -> None:
    deleted = run.save_weights_for_sampler("s").result().path
    rest.delete_checkpoint_from_tinker_path(deleted).result()
    with pytest.raises(tinker.NotFoundError):
        client.create_sampling_client(model_path=deleted).result()
    # Replaced between the sampler's creation and its first sample.
    path = run.save_state("ck").result().path
    sampler = client.create_sampling_client(model_path=path).result()
    run.save_state("ck", overwrite=True).result()
    with pytest.raises(tinker.RequestFailedError, match=r"weights of .* were deleted") as gone:
        drawn(sampler)
    assert gone.value.category == types.RequestErrorCategory.User
    drawn(client.create_sampling_client(model_path=path).result())


def test_a_state_deleted_before_the_turn_of_its_load(
    client: tinker.ServiceClient, run: tinker.TrainingClient, rest: tinker.RestClient, wire: Wire
) -> None:
    path = run.save_state("ck").result().path
    fresh = client.create_lora_training_client(MODEL, rank=4, train_unembed=False).result()
    body = {"model_id": fresh.model_id, "seq_id": 2, "path": path, "optimizer": True}
    load = wire.promise("load_weights", body)  # waits for number 1
    rest.delete_checkpoint_from_tinker_path(path).result()
    wire.result(wire.optim_step(fresh.model_id, 1))
    failed = wire.result(load)
    assert failed["category"] == "user"
    assert "deleted" in failed["error"]
    assert wire.metrics(wire.forward_backward(fresh.model_id, 3, batch()))["loss:sum"] > 0


def test_a_repeated_snapshot_is_the_first_one(
    client: tinker.ServiceClient, wire: Wire, run: tinker.TrainingClient
) -> None:
    """After a lost answer the SDK keeps the number but takes the next sampler number."""
    session = client.holder.get_session_id()
    body = {"model_id": run.model_id, "seq_id": 3, "kind": "snapshot"}
    first = wire.promise("save_weights_for_sampler", {**body, "sampling_session_seq_id": 7})
    again = wire.promise("save_weights_for_sampler", {**body, "sampling_session_seq_id": 8})
    assert again == first
    assert wire.result(again)["sampling_session_id"] == f"{session}:sample:7"
    assert wire.get(f"samplers/{session}:sample:7").status_code == 200
    assert wire.get(f"samplers/{session}:sample:8").status_code == 404
    once_more = wire.promise("save_weights_for_sampler", {**body, "sampling_session_seq_id": 9})
    assert once_more == first


def test_only_snapshots_are_offered(run: tinker.TrainingClient) -> None:
    with pytest.raises(tinker.BadRequestError, match="snapshot"):
        run.save_weights_and_get_sampling_client(kind="inflight").result()


# ---- records


def test_weights_tell_their_shape(run: tinker.TrainingClient, rest: tinker.RestClient) -> None:
    for path in (
        run.save_state("ck").result().path,
        run.save_weights_for_sampler("s").result().path,
    ):
        info = rest.get_weights_info_by_tinker_path(path).result()
        assert (info.base_model, info.is_lora, info.lora_rank) == (MODEL, True, 4)
        assert (info.train_attn, info.train_mlp, info.train_unembed) == (True, True, False)


def test_runs_are_listed_newest_first_page_by_page(
    client: tinker.ServiceClient, rest: tinker.RestClient
) -> None:
    """A tenant's list grows with every test, so only its front is known."""
    before = rest.list_training_runs(limit=1).result().cursor.total_count
    made = [
        client.create_lora_training_client(MODEL, rank=1 + i, user_metadata={"number": str(i)})
        .result()
        .model_id
        for i in range(3)
    ]
    pages = [rest.list_training_runs(limit=2, offset=offset).result() for offset in (0, 2)]
    listed = [listed for page in pages for listed in page.training_runs]
    assert [one.training_run_id for one in listed[:3]] == made[::-1]
    assert [one.lora_rank for one in listed[:3]] == [3, 2, 1]
    assert listed[0].user_metadata == {"number": "2"}
    assert listed[0].base_model == MODEL
    assert listed[0].is_lora
    assert listed[0].last_request_time.tzinfo is not None
    assert pages[1].cursor.model_dump() == {
        "offset": 2,
        "limit": 2,
        "total_count": before + 3,
    }
    beyond = rest.list_training_runs(limit=2, offset=before + 3).result()
    assert beyond.training_runs == []


def test_a_run_is_found_by_its_id_and_by_its_checkpoints(
    run: tinker.TrainingClient, rest: tinker.RestClient
) -> None:
    states = [run.save_state(name).result().path for name in ("a", "b")]
    weights = run.save_weights_for_sampler("s").result().path
    info = rest.get_training_run(run.model_id).result()
    assert info.user_metadata == {"renderer_name": "plain"}
    assert info.last_checkpoint is not None
    assert info.last_checkpoint.tinker_path == states[1]
    assert info.last_sampler_checkpoint is not None
    assert info.last_sampler_checkpoint.tinker_path == weights
    for path in (*states, weights):
        found = rest.get_training_run_by_tinker_path(path).result()
        assert found.training_run_id == run.model_id


def test_checkpoints_are_listed_and_deleted(
    run: tinker.TrainingClient, rest: tinker.RestClient, service: LocalService
) -> None:
    paths = [run.save_state(name).result().path for name in ("a", "b")]
    folder = folder_of(service, paths[1])
    paths.append(run.save_weights_for_sampler("s").result().path)
    newest = rest.list_user_checkpoints(limit=3).result()
    assert [checkpoint.tinker_path for checkpoint in newest.checkpoints] == paths[::-1]
    assert newest.cursor is not None
    total = newest.cursor.total_count
    second = rest.list_user_checkpoints(limit=1, offset=1).result()
    assert [checkpoint.tinker_path for checkpoint in second.checkpoints] == [paths[1]]
    assert known(rest, run.model_id).keys() == {"weights/a", "weights/b", "sampler_weights/s"}

    rest.delete_checkpoint_from_tinker_path(paths[1]).result()
    assert not folder.exists()
    rest.delete_checkpoint(run.model_id, "sampler_weights/s").result()
    assert known(rest, run.model_id).keys() == {"weights/a"}
    after = rest.list_user_checkpoints(limit=1).result()
    assert after.cursor is not None
    assert after.cursor.total_count == total - 2
    assert run.save_state("b").result().path == paths[1]  # the name is free again


# ---- tenants


def test_another_tenants_things_do_not_exist(
    run: tinker.TrainingClient,
    rest: tinker.RestClient,
    other_client: tinker.ServiceClient,
    service: LocalService,
) -> None:
    state = run.save_state("ck").result().path
    weights = run.save_weights_for_sampler("s").result().path
    own = other_client.create_lora_training_client(MODEL, rank=4, train_unembed=False).result()
    theirs = tinker.RestClient(base_url=service.url, api_key=OTHER_KEY)
    attempts: list[Callable[[], object]] = [
        lambda: theirs.get_training_run(run.model_id).result(),
        lambda: load(own, state),
    ]
    for path in (state, weights):
        attempts += [
            lambda path=path: other_client.create_training_client_from_state(path).result(),
            lambda path=path: other_client.create_sampling_client(model_path=path).result(),
            lambda path=path: theirs.get_weights_info_by_tinker_path(path).result(),
            lambda path=path: theirs.get_training_run_by_tinker_path(path).result(),
            lambda path=path: theirs.delete_checkpoint_from_tinker_path(path).result(),
            lambda path=path: theirs.set_checkpoint_ttl_from_tinker_path(path, None).result(),
        ]
    for attempt in attempts:
        with pytest.raises(tinker.NotFoundError) as refused:
            attempt()
        assert "There is no" in str(refused.value)
    assert theirs.list_checkpoints(run.model_id).result().checkpoints == []
    listed = theirs.list_user_checkpoints(limit=1000).result().checkpoints
    assert not {one.tinker_path for one in listed} & {state, weights}
    runs = theirs.list_training_runs(limit=1000).result().training_runs
    assert run.model_id not in {one.training_run_id for one in runs}
    # Nothing happened to any of it.
    assert known(rest, run.model_id).keys() == {"weights/ck", "sampler_weights/s"}
    assert train_one_step(own, batch()) > 0


def test_another_tenants_run_takes_no_work(
    run: tinker.TrainingClient, service: LocalService
) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "get_info": {},
        "optim_step": {"seq_id": 3, "adam_params": {}},
        "save_weights": {"seq_id": 3, "path": "stolen"},
        "save_weights_for_sampler": {"seq_id": 3, "path": "stolen"},
        "load_weights": {"seq_id": 3, "path": f"tinker://{run.model_id}/weights/ck"},
    }
    with Wire(service.url, OTHER_KEY) as other:
        for path, body in bodies.items():
            answer = other.post(path, {"model_id": run.model_id, **body})
            assert answer.status_code == 404, path
        session = run.model_id.split(":")[0]
        answer = other.post(
            "create_sampling_session",
            {"session_id": session, "sampling_session_seq_id": 99, "base_model": MODEL},
        )
        assert answer.status_code == 404
    # Its number 3 is free.
    assert train_one_step(run, batch()) > 0


def test_another_tenants_sampler_and_results_do_not_exist(
    client: tinker.ServiceClient, run: tinker.TrainingClient, service: LocalService
) -> None:
    run.save_weights_and_get_sampling_client().result()
    sampler = f"{client.holder.get_session_id()}:sample:0"
    sample = {
        "sampling_session_id": sampler,
        "seq_id": 0,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [20, 21]}]},
        "sampling_params": {"max_tokens": 1},
    }
    with Wire(service.url, KEY) as own, Wire(service.url, OTHER_KEY) as other:
        ticket = own.promise("asample", sample)
        own.wait(ticket)
        assert other.get(f"samplers/{sampler}").status_code == 404
        assert other.post("asample", {**sample, "seq_id": 1}).status_code == 404
        assert other.post("retrieve_future", {"request_id": ticket}).status_code == 404


def test_a_closed_session_takes_no_work(wire: Wire, service: LocalService) -> None:
    with tinker.ServiceClient(base_url=service.url, api_key=KEY) as client:
        run = client.create_lora_training_client(MODEL, rank=4).result()
        run.save_weights_and_get_sampling_client().result()
        session = client.holder.get_session_id()
    step = wire.post("optim_step", {"model_id": run.model_id, "seq_id": 2, "adam_params": {}})
    create = wire.post(
        "create_model", {"session_id": session, "model_seq_id": 1, "base_model": MODEL}
    )
    for answer in (step, create):
        assert answer.status_code == 400
        assert session in answer.json()["detail"]
    beat = wire.post("session_heartbeat", {"session_id": session})
    assert beat.status_code == 410
