"""Blobs that nobody names go, at the start; a backlog of finished operations goes in one round."""

from dataclasses import replace

import pytest

from tests.operations.parts import ANN, Parts
from tests.store.samples import operation
from twinkle_dask.clock import utc_now
from twinkle_dask.errors import StorageFailed
from twinkle_dask.operations.sweeping import remove_all, sweep


async def test_the_sweep_takes_what_no_record_names_and_nothing_else(parts: Parts) -> None:
    run = await parts.a_run(await parts.a_session())
    snapshot = {"state.json": b"{}"}
    parts.blobs.put_folder(f"snapshots/{run}/1-a", snapshot)
    await parts.store.runs.set_snapshot(run, f"snapshots/{run}/1-a", 1)
    kinds = ("journal", "results", "snapshots", "checkpoints")
    parts.blobs.put_folder("checkpoints/c/weights-1", snapshot)
    kept = {kind: parts.files(kind) for kind in kinds}
    assert all(kept.values())
    parts.blobs.put_folder(f"snapshots/{run}/0-late", snapshot)
    parts.blobs.put_folder("snapshots/gone:train:0/1-a", snapshot)
    parts.blobs.put_folder("snapshots/gone:train:0/2-b", snapshot)
    for path in ("journal/none", "results/none"):
        parts.blobs.put(path, b"")
    await sweep(parts.store, parts.blobs)
    assert {kind: parts.files(kind) for kind in kinds} == kept
    assert parts.blobs.names("snapshots") == (run,)


async def test_the_sweep_of_an_empty_store_is_nothing(parts: Parts) -> None:
    await sweep(parts.store, parts.blobs)


async def test_a_blob_that_cannot_be_removed_keeps_no_other(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        parts.blobs.put(f"journal/{name}", b"")
    remove = parts.blobs.remove

    def failing(path: str) -> None:
        if path == "journal/b":
            raise StorageFailed("no permission")
        remove(path)

    monkeypatch.setattr(parts.blobs, "remove", failing)
    await remove_all(parts.blobs, ["journal/a", "journal/b", "journal/c"])
    assert [path.name for path in parts.files("journal")] == ["b"]


async def test_one_round_prunes_a_whole_backlog(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinkle_dask.operations.upkeep._PRUNE_AT_ONCE", 3)
    for _ in range(10):
        one = operation(None, run=None)
        assert one.payload_path is not None
        parts.blobs.put(one.payload_path, b"")
        await parts.store.journal.add(replace(one, tenant_id=ANN.id))
        await parts.store.journal.fail(one.ticket_id, kind="X", message="", when=utc_now())
        await parts.store.journal.delivered([one.ticket_id], utc_now())
    await parts.upkeep.tidy()
    assert parts.files("journal") == []


async def test_a_step_that_fails_keeps_no_other_from_its_work(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = operation(None, run=None)
    await parts.store.journal.add(one)
    await parts.store.journal.fail(one.ticket_id, kind="X", message="", when=one.created_at)
    await parts.store.journal.delivered([one.ticket_id], utc_now())

    async def broken() -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(parts.runs, "drop_ended", broken)
    await parts.upkeep.tidy()
    assert await parts.store.journal.get(one.tenant_id, one.ticket_id) is None
