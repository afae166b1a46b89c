"""Saving, resuming, sampling from what was saved: items 43 to 52, 55 and 56."""

from collections.abc import Callable
from datetime import UTC, datetime
from urllib.parse import quote

import pytest
import tinker
from tinker import types

from tests.blackbox.conftest import KEY, MODEL
from tests.blackbox.data import batch, train_one_step
from tests.blackbox.saved import arrays, distance, folder_of, identical, moved, weights_of
from tests.blackbox.states import DECADE, HOUR, a_run, drawn, expire, known, load, train_on
from twinkle_dask import LocalService

# A failure that will not pass must come at once: the SDK would repeat other ones for minutes.
pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def run(client: tinker.ServiceClient) -> tinker.TrainingClient:
    return a_run(client)


@pytest.fixture
def rest(service: LocalService) -> tinker.RestClient:
    return tinker.RestClient(base_url=service.url, api_key=KEY)


def test_43_a_saved_state_has_an_address(
    run: tinker.TrainingClient, rest: tinker.RestClient, service: LocalService
) -> None:
    before = datetime.now(UTC)
    saved = run.save_state("ck-1.a_b", user_metadata={"step": "1"}).result()
    path = saved.path
    assert path == f"tinker://{run.model_id}/weights/ck-1.a_b"
    (checkpoint,) = known(rest, run.model_id).values()
    assert checkpoint.checkpoint_id == "weights/ck-1.a_b"
    assert checkpoint.checkpoint_type == "training"
    assert checkpoint.tinker_path == path
    assert checkpoint.user_metadata == {"step": "1"}
    assert before <= checkpoint.time <= datetime.now(UTC)
    assert checkpoint.expires_at is None
    assert not checkpoint.public
    assert quote(checkpoint.checkpoint_id, safe="") in saved.get_console_url()
    files = folder_of(service, path).iterdir()
    assert checkpoint.size_bytes == sum(file.stat().st_size for file in files)


def test_44_a_name_is_taken_once(
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


def test_44_a_name_is_taken_once_in_a_pipeline_too(
    run: tinker.TrainingClient, rest: tinker.RestClient
) -> None:
    """The second is submitted before the first is saved, so it fails as a result."""
    pending = [run.save_state("ck") for _ in range(2)]
    assert pending[0].result().path.endswith("/weights/ck")
    with pytest.raises((tinker.BadRequestError, tinker.RequestFailedError), match="exists already"):
        pending[1].result()
    assert len(known(rest, run.model_id)) == 1


def test_44_overwriting_replaces_everything(
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


def test_45_a_state_lives_as_long_as_was_asked(
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
def test_45_a_lifetime_out_of_range_is_refused(
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


def test_45_what_has_expired_is_not_found_at_once(
    client: tinker.ServiceClient,
    run: tinker.TrainingClient,
    rest: tinker.RestClient,
    service: LocalService,
) -> None:
    path = run.save_state("ck", ttl_seconds=HOUR).result().path
    sampler = client.create_sampling_client(model_path=path).result()
    drawn(sampler)
    expire(service, path)
    assert known(rest, run.model_id) == {}
    assert rest.get_training_run(run.model_id).result().last_checkpoint is None
    attempts: list[Callable[[], object]] = [
        lambda: client.create_training_client_from_state(path).result(),
        lambda: load(run, path),
        lambda: client.create_sampling_client(model_path=path).result(),
        lambda: rest.get_weights_info_by_tinker_path(path).result(),
        lambda: rest.set_checkpoint_ttl_from_tinker_path(path, None).result(),
        lambda: rest.delete_checkpoint_from_tinker_path(path).result(),
    ]
    for attempt in attempts:
        with pytest.raises(tinker.NotFoundError):
            attempt()
    assert run.save_state("ck").result().path == path  # the name is free
    assert known(rest, run.model_id)["weights/ck"].expires_at is None


def test_46_from_state_the_optimizer_starts_over(
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
def test_46_a_state_from_before_the_first_step(
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


def test_47_a_state_is_saved_at_its_place_in_the_order(
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


def test_48_a_state_outlives_its_session(
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


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_49_loading_into_a_fresh_client(
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


def test_50_what_is_not_there_is_not_found_at_once(
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


def test_51_named_weights_can_be_sampled_from(
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


def test_51_a_training_state_can_be_sampled_from(
    client: tinker.ServiceClient, run: tinker.TrainingClient
) -> None:
    path = run.save_state("ck").result().path
    expected = drawn(run.save_weights_and_get_sampling_client().result())
    assert drawn(client.create_sampling_client(model_path=path).result()) == expected


def test_52_a_snapshot_stays_what_it_is(
    run: tinker.TrainingClient, rest: tinker.RestClient
) -> None:
    snapshot = run.save_weights_and_get_sampling_client().result()
    expected = drawn(snapshot)
    train_on(run)
    later = run.save_weights_and_get_sampling_client().result()
    assert drawn(later) != expected
    assert drawn(snapshot) == expected
    assert known(rest, run.model_id) == {}  # no name, so in no list


def test_52_a_snapshot_is_taken_at_its_place_in_the_order(run: tinker.TrainingClient) -> None:
    expected = drawn(run.save_weights_and_get_sampling_client().result())
    run.forward(batch(), "cross_entropy")
    snapshot = run.save_weights_and_get_sampling_client()
    run.forward_backward(batch(), "cross_entropy")
    step = run.optim_step(types.AdamParams(learning_rate=5e-2))
    assert drawn(snapshot.result()) == expected
    step.result()
    assert drawn(run.save_weights_and_get_sampling_client().result()) != expected


def test_55_weights_tell_their_shape(run: tinker.TrainingClient, rest: tinker.RestClient) -> None:
    for path in (
        run.save_state("ck").result().path,
        run.save_weights_for_sampler("s").result().path,
    ):
        info = rest.get_weights_info_by_tinker_path(path).result()
        assert (info.base_model, info.is_lora, info.lora_rank) == (MODEL, True, 4)
        assert (info.train_attn, info.train_mlp, info.train_unembed) == (True, True, False)


def test_56_checkpoints_are_listed_and_deleted(
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
