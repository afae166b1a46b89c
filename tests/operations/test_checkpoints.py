"""What becomes of checkpoints: added, shared, copied, downloaded, removed; failures in between."""

import asyncio
import io
import tarfile
from pathlib import Path

import pytest

from tests.operations.parts import ANN, MODEL, Parts, open_parts
from twinkle_dask.clock import utc_now
from twinkle_dask.errors import InvalidRequest, NotFound, ServiceFault, StorageFailed
from twinkle_dask.operations.audit import Audit
from twinkle_dask.operations.copying import Copying
from twinkle_dask.operations.downloads import ARCHIVE, Downloads
from twinkle_dask.operations.lanes import Lane
from twinkle_dask.operations.requests import (
    LaneRequest,
    SaveExternal,
    SaveForSampler,
    SaveState,
    load_of,
)
from twinkle_dask.operations.values import (
    CheckpointAddress,
    Failed,
    LoraRequest,
    ServedModel,
    Tenant,
    Ticket,
)
from twinkle_dask.store.records import CheckpointKind, RunPhase
from twinkle_dask.types import AdamParams, OptimStep, RunId, SamplerId, TenantId

BOB = Tenant(id=TenantId("bob"), name="Bob", key_hint="5678")
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 9}


async def submit(parts: Parts, run: RunId, request: LaneRequest) -> Ticket:
    def make(_lane: Lane, _model: ServedModel) -> LaneRequest:
        return request

    return await parts.runs.submit(ANN, run, seq=None, make=make)


async def save(
    parts: Parts, run: RunId, name: str = "ck", *, number: int = 0, overwrite: bool = False
) -> CheckpointAddress:
    identity = f"{name}{number}"
    request = SaveState(
        name=name,
        overwrite=overwrite,
        ttl_s=None,
        user_metadata={},
        checkpoint_id=identity,
        folder=f"checkpoints/{run}/{identity}",
        actor="Ann",
    )
    await parts.done((await submit(parts, run, request)).id)
    return CheckpointAddress(run=run, kind=CheckpointKind.TRAINING, name=name)


async def export(parts: Parts, run: RunId) -> CheckpointAddress:
    request = SaveExternal(
        name="e", ttl_s=None, recipients=(), checkpoint_id="e", folder=f"checkpoints/{run}/e"
    )
    await parts.done((await submit(parts, run, request)).id)
    return CheckpointAddress(run=run, kind=CheckpointKind.EXTERNAL, name="e")


async def a_run(parts: Parts) -> RunId:
    return await parts.a_run(await parts.a_session())


def copying(parts: Parts) -> Copying:
    return Copying(parts.store, parts.checkpoints, parts.sessions, Audit(parts.store))


def downloads(parts: Parts) -> Downloads:
    return Downloads(parts.store, parts.blobs, parts.checkpoints, Audit(parts.store))


async def events(parts: Parts, tenant: Tenant = ANN) -> list[str]:
    """Oldest first."""
    found = await Audit(parts.store).of_day(tenant, None, family="checkpoints")
    return [one.event.removeprefix("checkpoints.") for one in reversed(found)]


# ---- going


async def test_a_removal_that_was_broken_off_is_made_up_for(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await a_run(parts)
    address = await save(parts, run)

    def refuse(_path: str) -> None:
        raise StorageFailed("the disk refuses")

    with monkeypatch.context() as patched:
        patched.setattr(parts.blobs, "remove", refuse)
        with pytest.raises(StorageFailed):
            await parts.checkpoints.delete(ANN, address)
        await parts.upkeep.tidy()  # no better
    with pytest.raises(NotFound):
        await parts.checkpoints.find(ANN.id, address)
    assert await parts.checkpoints.of_run(ANN, run) == ()
    assert parts.files("checkpoints")
    await save(parts, run, number=1)  # its name is free
    await parts.upkeep.tidy()
    assert [file.parent.name for file in parts.files("checkpoints")] == ["ck1"]
    assert len(await parts.store.checkpoints.expired(utc_now())) == 0


async def test_what_is_overwritten_goes_with_its_files(parts: Parts) -> None:
    run = await a_run(parts)
    address = await save(parts, run)
    await save(parts, run, number=1, overwrite=True)
    assert [file.parent.name for file in parts.files("checkpoints")] == ["ck1"]
    assert (await parts.checkpoints.find(ANN.id, address)).id == "ck1"


async def test_what_has_expired_goes_and_says_so(parts: Parts) -> None:
    run = await a_run(parts)
    address = await save(parts, run)
    await parts.store.checkpoints.set_expiry("ck0", utc_now())
    with pytest.raises(NotFound):
        await parts.checkpoints.set_ttl(ANN, address, None)
    await parts.upkeep.tidy()
    assert parts.files("checkpoints") == []
    assert await parts.store.checkpoints.expired(utc_now()) == ()
    assert await events(parts) == ["created", "expired"]


async def test_a_broken_off_deletion_is_in_the_audit_trail(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await a_run(parts)
    deleted, _expired = await save(parts, run), await save(parts, run, "old")
    await parts.store.checkpoints.set_expiry("old0", utc_now())

    def refuse(_path: str) -> None:
        raise StorageFailed("the disk refuses")

    with monkeypatch.context() as patched:
        patched.setattr(parts.blobs, "remove", refuse)
        with pytest.raises(StorageFailed):
            await parts.checkpoints.delete(ANN, deleted)
        await parts.upkeep.tidy()
    await parts.upkeep.tidy()
    assert await events(parts) == ["created", "created", "deleted", "expired"]
    assert parts.files("checkpoints") == []


async def test_what_cannot_be_removed_does_not_stop_the_tidying(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await parts.a_session()
    run = await parts.a_run(session)
    for number in range(2):
        request = SaveForSampler(
            name=None,
            sampler=SamplerId(f"{session}:sample:{number}"),
            sampler_seq=number,
            ttl_s=None,
            user_metadata={},
            checkpoint_id=f"w{number}",
            folder=f"checkpoints/{run}/w{number}",
        )
        await parts.done((await submit(parts, run, request)).id)
    await parts.end(session)
    remove = parts.blobs.remove

    def refuse(path: str) -> None:
        if path.endswith("/w0"):
            raise StorageFailed("the disk refuses")
        remove(path)

    monkeypatch.setattr(parts.blobs, "remove", refuse)
    async with asyncio.timeout(5):
        while len(parts.files("checkpoints")) > 1:
            await parts.closing.close_ended()
            await asyncio.sleep(0.01)
    assert [file.parent.name for file in parts.files("checkpoints")] == ["w0"]


async def test_what_a_run_has_loaded_stays_until_its_snapshot(parts: Parts) -> None:
    run = await a_run(parts)
    address = await save(parts, run)
    record = await parts.checkpoints.find(ANN.id, address)
    parts.host.snapshots = False
    load = load_of(record, address, with_optimizer=True)
    await parts.done((await submit(parts, run, load)).id)
    await parts.checkpoints.delete(ANN, address)
    await parts.upkeep.tidy()
    with pytest.raises(NotFound):
        await parts.checkpoints.find(ANN.id, address)
    assert parts.files("checkpoints")  # a restart would need it
    parts.host.snapshots = True
    async with asyncio.timeout(5):
        while parts.files("checkpoints"):
            await parts.done((await submit(parts, run, OptimStep(adam=AdamParams()))).id)
            await parts.upkeep.tidy()
    assert await parts.store.checkpoints.expired(utc_now()) == ()


async def test_a_run_whose_loaded_files_are_gone_says_so(tmp_path: Path) -> None:
    async with open_parts(tmp_path) as before:
        run = await a_run(before)
        address = await save(before, run)
        record = await before.checkpoints.find(ANN.id, address)
        before.host.snapshots = False
        load = load_of(record, address, with_optimizer=True)
        await before.done((await submit(before, run, load)).id)
    async with open_parts(tmp_path) as after:
        await after.runs.recover()
        after.blobs.remove(record.path)
        step = await submit(after, run, OptimStep(adam=AdamParams()))
        outcome = await after.tickets.wait(ANN.id, step.id, 5)
        assert isinstance(outcome, Failed)
        assert isinstance(outcome.error, ServiceFault)
        assert "gone" in outcome.error.message


# ---- sharing and copies


async def test_every_change_is_in_the_audit_trail_once(parts: Parts) -> None:
    run = await a_run(parts)
    address = await save(parts, run)
    for public in (True, True, False, False):
        await parts.checkpoints.set_public(ANN, address, public=public)
    await parts.checkpoints.set_ttl(ANN, address, 3600)
    await downloads(parts).archive(ANN, address)
    await copying(parts).into_project(
        ANN, address, reader=ANN, project="p", ttl_s=None, idempotency_key=None
    )
    await parts.checkpoints.delete(ANN, address)
    assert await events(parts) == [
        *("created", "published", "unpublished", "ttl_changed"),
        *("urls_signed", "copied", "deleted"),
    ]
    (first, *_) = reversed(await Audit(parts.store).of_day(ANN, None, family="checkpoints"))
    assert first.details["path"] == f"{run}/weights/ck"
    assert first.details["actor"] == "Ann"


async def test_requests_for_one_copy_at_the_same_time_make_one(parts: Parts) -> None:
    address = await save(parts, await a_run(parts))
    into_project = copying(parts).into_project
    made = await asyncio.gather(
        *(
            into_project(ANN, address, reader=ANN, project="p", ttl_s=None, idempotency_key="key")
            for _ in range(5)
        )
    )
    assert len(set(made)) == 1
    assert len(parts.files("checkpoints")) == 1
    session = await parts.a_session()
    into_session = copying(parts).into_session
    made = await asyncio.gather(
        *(
            into_session(ANN, address, reader=ANN, session=session, seq=3, ttl_s=None)
            for _ in range(5)
        )
    )
    assert {copy.run for copy in made} == {f"{session}:train:3"}
    assert await events(parts) == ["created", "copied", "copied"]


async def test_a_copy_is_nobodys_run_to_train(parts: Parts) -> None:
    address = await save(parts, await a_run(parts))
    session = await parts.a_session()
    copy = await copying(parts).into_session(
        ANN, address, reader=ANN, session=session, seq=0, ttl_s=None
    )
    with pytest.raises(InvalidRequest, match="copied checkpoint"):
        await submit(parts, copy.run, OptimStep(adam=AdamParams()))
    with pytest.raises(InvalidRequest, match="copied checkpoint"):
        await parts.runs.create(
            ANN, session, seq=0, base_model=MODEL, lora=LoraRequest(rank=1), user_metadata={}
        )
    assert parts.quotas.runs.held(ANN.id) == 1
    await parts.end(session)
    await parts.upkeep.tidy()
    assert (await parts.checkpoints.find(ANN.id, copy)).path


async def test_of_what_others_published_only_the_checkpoint_is_copied(parts: Parts) -> None:
    session = await parts.a_session()
    ticket = await parts.runs.create(
        ANN, session, seq=0, base_model=MODEL, lora=LoraRequest(rank=1), user_metadata={"a": "b"}
    )
    await parts.done(ticket.id)
    assert ticket.run is not None
    address = await save(parts, ticket.run)
    await parts.checkpoints.set_public(ANN, address, public=True)
    for owner, metadata in ((ANN, {"a": "b"}), (BOB, {})):
        copy = await copying(parts).into_project(
            owner, address, reader=owner, project="p", ttl_s=None, idempotency_key=None
        )
        held = await parts.store.runs.get(owner.id, copy.run)
        assert held is not None
        assert (held.state, held.user_metadata) == (RunPhase.COPIED, metadata)


# ---- downloads


async def test_any_part_of_a_download_is_that_part(parts: Parts) -> None:
    run = await a_run(parts)
    address = await export(parts, run)
    folder = f"checkpoints/{run}/e"
    parts.blobs.put_folder(folder, {**FILES, "state.json": b"{}"}, overwrite=True)
    granted = await downloads(parts).files(ANN, address)
    assert granted.files == tuple(sorted(FILES))
    for name, content in {**FILES, ARCHIVE: None}.items():
        download = await downloads(parts).open(granted.checkpoint, name)
        size = download.num_bytes
        whole = b"".join([part async for part in download.read(0, size)])
        assert len(whole) == size
        if content is None:
            with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
                assert tar.getnames() == sorted(FILES)
        else:
            assert whole == content
        for start in range(0, size, 61):
            for stop in range(start, size, 149):
                part = b"".join([part async for part in download.read(start, stop)])
                assert part == whole[start:stop]
    for name in ("state.json", "../e/state.json", "nothing", ""):
        with pytest.raises(NotFound):
            await downloads(parts).open(granted.checkpoint, name)
    with pytest.raises(NotFound):
        await downloads(parts).files(BOB, address)


async def test_a_file_that_goes_during_its_download_ends_it(parts: Parts) -> None:
    run = await a_run(parts)
    await export(parts, run)
    parts.blobs.put_folder(f"checkpoints/{run}/e", FILES, overwrite=True)
    download = await downloads(parts).open("e", "adapter_model.safetensors")
    parts.blobs.remove(f"checkpoints/{run}/e")
    with pytest.raises(StorageFailed):
        _ = [part async for part in download.read(0, download.num_bytes)]


# ---- unloading


async def test_an_unloaded_run_is_closed_and_counts_no_more(parts: Parts) -> None:
    run = await a_run(parts)
    address = await save(parts, run)
    parts.host.open.clear()
    step = await submit(parts, run, OptimStep(adam=AdamParams()))
    unload = await parts.runs.unload(ANN, run)
    assert (await parts.runs.unload(ANN, run)).id == unload.id
    with pytest.raises(InvalidRequest, match="unloaded"):
        await submit(parts, run, OptimStep(adam=AdamParams()))
    with pytest.raises(NotFound):
        await parts.runs.unload(BOB, run)
    parts.host.open.set()
    await parts.done(step.id)
    await parts.done(unload.id)
    async with asyncio.timeout(5):
        while parts.runs.has_lane(run):
            await parts.upkeep.tidy()
            await asyncio.sleep(0.01)
    assert parts.quotas.runs.held(ANN.id) == 0
    assert parts.host.load == 0
    record = await parts.store.runs.get(ANN.id, run)
    assert record is not None
    assert record.state is RunPhase.CLOSED
    assert parts.files("snapshots") == []
    with pytest.raises(InvalidRequest, match="unloaded"):
        await parts.runs.unload(ANN, run)  # its result was delivered and is kept no longer
    assert (await parts.checkpoints.find(ANN.id, address)).path
    await parts.upkeep.tidy()
    assert not parts.runs.has_lane(run)


async def test_an_unload_survives_a_restart(tmp_path: Path) -> None:
    async with open_parts(tmp_path) as before:
        run = await a_run(before)
        before.host.open.clear()
        step = await submit(before, run, OptimStep(adam=AdamParams()))
        unload = await before.runs.unload(ANN, run)
    async with open_parts(tmp_path) as after:
        await after.runs.recover()
        with pytest.raises(InvalidRequest, match="unloaded"):
            await submit(after, run, OptimStep(adam=AdamParams()))
        await after.done(step.id)
        await after.done(unload.id)
