"""What runs are set to between calls, on SQLite and on PostgreSQL."""

from tests.store.samples import ANN, BOB, NOW, fill
from twinkle_dask.store.records import RunPhase, RunSettingsRecord
from twinkle_dask.store.store import Store
from twinkle_dask.types import RunId

RUN = RunId("s1:train:0")
RECORD = RunSettingsRecord(
    run_id=RUN, tenant_id=ANN, settings={"loss": None}, progress={"steps": 0}, created_at=NOW
)


async def test_a_row_is_its_tenants_alone(store: Store) -> None:
    await fill(store)
    assert await store.run_settings.get(ANN, RUN) is None
    assert await store.run_settings.add(RECORD) == RECORD
    assert await store.run_settings.get(ANN, RUN) == RECORD
    assert await store.run_settings.get(BOB, RUN) is None


async def test_each_part_is_replaced_as_a_whole(store: Store) -> None:
    await fill(store)
    await store.run_settings.add(RECORD)
    await store.run_settings.set_settings(RUN, {"loss": {"name": "DPOLoss"}})
    await store.run_settings.set_progress(RUN, {"steps": 1, "rate": 0.1})
    await store.run_settings.set_pending(RUN, "pending/1", {"steps": 2})
    stored = await store.run_settings.get(ANN, RUN)
    assert stored is not None
    assert stored.settings == {"loss": {"name": "DPOLoss"}}
    assert (stored.progress, stored.pending_path) == ({"steps": 2}, "pending/1")
    assert await store.run_settings.pending_paths() == {"pending/1"}


async def test_removing_tells_which_blob_is_left(store: Store) -> None:
    await fill(store)
    await store.run_settings.add(RECORD)
    await store.run_settings.set_pending(RUN, "pending/1", {})
    assert await store.run_settings.remove(RUN) == "pending/1"
    assert await store.run_settings.get(ANN, RUN) is None
    assert await store.run_settings.remove(RUN) is None


async def test_a_run_that_could_not_be_made_leaves_its_name(store: Store) -> None:
    await fill(store)
    await store.run_settings.add(RECORD)
    await store.run_settings.remove(RUN)
    await store.runs.remove_failed(RUN)
    assert await store.runs.get(ANN, RUN) is not None  # it was made
    await store.runs.set_state(RUN, RunPhase.FAILED)
    await store.runs.remove_failed(RUN)
    assert await store.runs.get(ANN, RUN) is None
