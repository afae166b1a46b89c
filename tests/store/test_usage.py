"""Usage is counted with the first outcome and never again."""

from dataclasses import replace

from tests.store.samples import ANN, BOB, at, fill, operation
from twinkle_dask.store.records import OperationRecord, UsageKind
from twinkle_dask.store.store import Store
from twinkle_dask.types import SessionId

HOUR = at(0).replace(minute=0, second=0, microsecond=0)
LATER = at(7200)
SAMPLED = (UsageKind.PREFILL, UsageKind.SAMPLE)


async def add(store: Store, seq: int, *, key_id: int = 7, sampler: bool = False) -> OperationRecord:
    owner = {"run": None, "sampler": "s1:sample:0"} if sampler else {}
    record = replace(operation(seq, **owner), key_id=key_id, input_tokens=10)
    await store.journal.add(record)
    return record


async def sums(store: Store) -> dict[tuple[UsageKind, int], int]:
    rows = await store.usage.between(ANN, HOUR, LATER)
    assert {row.session_id for row in rows} <= {"s1"}
    assert {row.base_model for row in rows} <= {"tiny"}
    return {(row.kind, row.key_id): row.amount for row in rows}


async def finish(
    store: Store, record: OperationRecord, *used: UsageKind, tokens: int | None = None
) -> bool:
    return await store.journal.finish(
        record.ticket_id, result=b"", result_bytes=0, when=at(1), used=used, output_tokens=tokens
    )


async def test_amounts_of_an_hour_add_up_by_key_and_kind(store: Store) -> None:
    await fill(store)
    for seq in (1, 2):
        assert await finish(store, await add(store, seq), UsageKind.TRAINING)
    assert await finish(store, await add(store, 3, key_id=8), UsageKind.TRAINING)
    assert await finish(store, await add(store, 0, sampler=True), *SAMPLED, tokens=4)
    assert await finish(store, await add(store, 4), UsageKind.CHECKPOINT)
    assert await sums(store) == {
        (UsageKind.TRAINING, 7): 20,
        (UsageKind.TRAINING, 8): 10,
        (UsageKind.PREFILL, 7): 10,
        (UsageKind.SAMPLE, 7): 4,
        (UsageKind.CHECKPOINT, 7): 1,
    }
    assert await store.usage.between(BOB, HOUR, LATER) == ()
    assert await store.usage.between(ANN, LATER, at(9999)) == ()
    assert len(await store.usage.of_session(ANN, SessionId("s1"))) == 5


async def test_a_second_outcome_counts_nothing(store: Store) -> None:
    await fill(store)
    record = await add(store, 1)
    assert await finish(store, record, UsageKind.TRAINING)
    assert not await finish(store, record, UsageKind.TRAINING)
    failed = await add(store, 2)
    await store.journal.fail(failed.ticket_id, kind="X", message="m", when=at(1))
    assert not await finish(store, failed, UsageKind.TRAINING)
    assert await sums(store) == {(UsageKind.TRAINING, 7): 10}


async def test_nothing_drawn_makes_no_row(store: Store) -> None:
    await fill(store)
    assert await finish(store, await add(store, 0, sampler=True), *SAMPLED, tokens=0)
    assert await sums(store) == {(UsageKind.PREFILL, 7): 10}


async def test_an_operation_of_a_version_before_counts_nothing(store: Store) -> None:
    await fill(store)
    record = operation(1)
    await store.journal.add(record)
    assert await finish(store, record, UsageKind.TRAINING)
    assert await sums(store) == {}
