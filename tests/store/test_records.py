"""Each family of records does what it promises, on SQLite and on PostgreSQL."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy.exc import IntegrityError

from tests.store.samples import (
    ANN,
    BOB,
    NOW,
    at,
    checkpoint,
    fill,
    operation,
    run,
    sampler,
    session,
)
from twinkle_dask.clock import utc_now
from twinkle_dask.store.copies import Copied
from twinkle_dask.store.journal import DuplicateOperation
from twinkle_dask.store.records import (
    CheckpointKind,
    OperationRecord,
    OperationState,
    RunPhase,
    SessionState,
    TenantKey,
)
from twinkle_dask.store.store import Store
from twinkle_dask.types import RunId, SamplerId, SessionId, TicketId

RUN = RunId("s1:train:0")
SESSION = SessionId("s1")
AHEAD = datetime(2999, 1, 1, tzinfo=UTC)


async def end_session(store: Store) -> None:
    state = SessionState.FINISHED
    await store.sessions.end(SESSION, state, reason="done", detail=None, when=at(1))


async def add_finished(store: Store, one: OperationRecord) -> None:
    await store.journal.add(one)
    await store.journal.finish(one.ticket_id, result_path=None, result_bytes=0, when=NOW)


async def prune_all(store: Store) -> tuple[OperationRecord, ...]:
    return await store.journal.prune(delivered_before=at(99), finished_before=at(99))


class TestKeys:
    async def test_a_key_is_kept_as_first_stored(self, store: Store) -> None:
        key = TenantKey(key_hash="ab" * 32, tenant_id=ANN, name="Ann", hint="1234", created_at=NOW)
        assert await store.keys.add(key) == key
        assert await store.keys.add(replace(key, name="again")) == key
        assert await store.keys.all() == (key,)


class TestSessions:
    async def test_everything_comes_back_as_it_was_stored(self, store: Store) -> None:
        elsewhere = datetime(2026, 11, 23, 14, tzinfo=timezone(timedelta(hours=2)))
        one = session(created_at=elsewhere)
        assert await store.sessions.add(one) == one
        found = await store.sessions.get(ANN, one.id)
        assert found == one
        assert found is not None
        assert found.created_at.tzinfo is UTC

    async def test_another_tenants_session_does_not_exist(self, store: Store) -> None:
        await store.sessions.add(session())
        assert await store.sessions.get(BOB, SESSION) is None
        assert await store.sessions.page(BOB, 10, 0) == ((), 0)

    async def test_any_number_of_them_is_found(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("twinkle_dask.store.database._MAX_NAMES", 2)
        names = {SessionId(f"s{number}") for number in range(5)}
        for name in names:
            await store.sessions.add(session(name))
        found = await store.sessions.among({*names, SessionId("none")})
        assert {one.id for one in found} == names
        assert await store.sessions.among(()) == ()

    async def test_an_idempotency_key_finds_the_session_it_made(self, store: Store) -> None:
        first = await store.sessions.add(session("s1", key="k"))
        assert await store.sessions.add(session("s2", key="k")) == first
        assert await store.sessions.by_idempotency_key(ANN, "k") == first
        assert await store.sessions.by_idempotency_key(BOB, "k") is None
        bobs = session("s3", tenant=BOB, key="k")
        assert await store.sessions.add(bobs) == bobs

    async def test_sessions_without_key_are_never_the_same(self, store: Store) -> None:
        for name in ("s1", "s2"):
            assert (await store.sessions.add(session(name))).id == name

    async def test_a_session_ends_once(self, store: Store) -> None:
        for name in ("s1", "s2"):
            await store.sessions.add(session(name))
        await store.sessions.touch([SESSION, SessionId("s2")], at(5))
        expired = SessionState.EXPIRED
        assert await store.sessions.end(SESSION, expired, reason="quiet", detail=None, when=at(9))
        again = SessionState.FINISHED
        assert not await store.sessions.end(SESSION, again, reason="x", detail=None, when=at(10))
        await store.sessions.touch([SESSION], at(20))
        ended = await store.sessions.get(ANN, SESSION)
        assert ended is not None
        assert (ended.state, ended.end_reason, ended.ended_at) == (expired, "quiet", at(9))
        assert ended.last_seen_at == at(5)
        assert [active.id for active in await store.sessions.active()] == ["s2"]

    async def test_pages_are_newest_first(self, store: Store) -> None:
        for second in range(5):
            await store.sessions.add(session(f"s{second}", created_at=at(second)))
        page, total = await store.sessions.page(ANN, 2, 1)
        assert ([one.id for one in page], total) == (["s3", "s2"], 5)


class TestRuns:
    async def test_everything_comes_back_as_it_was_stored(self, store: Store) -> None:
        await store.sessions.add(session())
        one = run()
        assert await store.runs.add(one) == one
        assert await store.runs.get(ANN, one.id) == one
        assert await store.runs.get(BOB, one.id) is None
        assert await store.runs.page(ANN, 5, 0) == ((one,), 1)

    async def test_a_place_in_the_session_is_taken_once(self, store: Store) -> None:
        await fill(store)
        rival = replace(run(), id=RunId("other"))
        assert await store.runs.add(rival) == run()

    async def test_a_run_needs_its_session(self, store: Store) -> None:
        with pytest.raises(IntegrityError):
            await store.runs.add(run(session="nowhere"))

    async def test_runs_of_an_ended_session_are_to_be_closed_once_their_work_is_done(
        self, store: Store
    ) -> None:
        for name in ("s1", "s2"):
            await store.sessions.add(session(name))
            for seq, state in enumerate(RunPhase):
                await store.runs.add(run(seq, session=name, state=state))
        assert [one.run_seq for one in await store.runs.in_session(SESSION)] == [*range(6)]
        unloaded = {"s1:train:3", "s2:train:3"}  # whatever their sessions do
        assert {one.id for one in await store.runs.to_close()} == unloaded
        await store.journal.add(work := operation(1))
        await end_session(store)
        others = {"s1:train:1", "s1:train:2", *unloaded}  # 0 has work, 4 is closed, 5 a copy
        assert {one.id for one in await store.runs.to_close()} == others
        await store.journal.fail(work.ticket_id, kind="X", message="", when=NOW)
        assert {one.id for one in await store.runs.to_close()} == {*others, RUN}

    async def test_a_closed_run_has_no_snapshot(self, store: Store) -> None:
        await fill(store)
        await store.runs.set_snapshot(RUN, "snapshots/a", 4)
        assert await store.runs.snapshot_folders() == {"snapshots/a"}
        await store.runs.close(RUN)
        assert await store.runs.snapshot_folders() == set()
        assert await store.runs.set_snapshot(RUN, "snapshots/late", 9) == "snapshots/late"
        found = await store.runs.get(ANN, RUN)
        assert found is not None
        assert (found.state, found.snapshot_path) == (RunPhase.CLOSED, None)

    async def test_a_snapshot_replaces_an_older_one_and_never_a_newer(self, store: Store) -> None:
        await fill(store)
        assert await store.runs.set_snapshot(RUN, "snapshots/a", 4) is None
        assert await store.runs.set_snapshot(RUN, "snapshots/b", 6) == "snapshots/a"
        assert await store.runs.set_snapshot(RUN, "snapshots/late", 5) == "snapshots/late"
        assert await store.runs.set_snapshot(RUN, "snapshots/b", 6) is None
        assert await store.runs.set_snapshot(RunId("none"), "snapshots/c", 1) == "snapshots/c"
        found = await store.runs.get(ANN, RUN)
        assert found is not None
        assert (found.snapshot_path, found.snapshot_seq) == ("snapshots/b", 6)

    async def test_touch_notes_the_latest_request(self, store: Store) -> None:
        await fill(store)
        await store.runs.touch([], at(1))
        await store.runs.touch([RUN, RunId("gone")], at(99))
        found = await store.runs.get(ANN, RUN)
        assert found is not None
        assert found.last_request_at == at(99)


class TestSamplers:
    async def test_a_repeated_sampler_is_the_stored_one(self, store: Store) -> None:
        await store.sessions.add(session())
        one = sampler(checkpoint="c")
        assert await store.samplers.add(one) == one
        assert await store.samplers.add(replace(one, id=SamplerId("other"))) == one
        assert await store.samplers.get(ANN, one.id) == one
        assert await store.samplers.get(BOB, one.id) is None
        assert await store.samplers.in_session(SESSION) == (one,)


class TestJournal:
    async def test_a_place_in_an_order_is_taken_once(self, store: Store) -> None:
        await fill(store)
        first = operation(1)
        await store.journal.add(first)
        other_order = operation(1, run=None, sampler="s1:sample:0")
        await store.journal.add(other_order)
        for rival, holder in (
            (operation(1), first),
            (operation(1, run=None, sampler="s1:sample:0"), other_order),
            (replace(operation(2), ticket_id=first.ticket_id), first),
        ):
            with pytest.raises(DuplicateOperation) as duplicate:
                await store.journal.add(rival)
            assert duplicate.value.stored == holder

    async def test_operations_without_seq_are_never_the_same(self, store: Store) -> None:
        await fill(store)
        for _ in range(2):
            await store.journal.add(operation(None))
            await store.journal.add(operation(None, run=None))

    async def test_the_first_outcome_stands(self, store: Store) -> None:
        await fill(store)
        one = operation()
        await store.journal.add(one)
        ticket = one.ticket_id
        assert await store.journal.finish(ticket, result_path="r/1", result_bytes=7, when=at(1))
        assert not await store.journal.fail(ticket, kind="X", message="late", when=at(2))
        await store.journal.delivered([ticket], at(3))
        done = OperationState.DONE
        assert await store.journal.get(ANN, ticket) == replace(
            one,
            state=done,
            result_path="r/1",
            result_bytes=7,
            finished_at=at(1),
            delivered_at=at(3),
        )
        assert await store.journal.get(BOB, ticket) is None
        assert not await store.journal.fail(TicketId("none"), kind="X", message="", when=NOW)

    async def test_replay_sees_a_runs_operations_in_order(self, store: Store) -> None:
        await fill(store)
        operations = {seq: operation(seq) for seq in (3, 1, 2, 4)}
        sample = replace(operation(None, run=None), sequence_ids=("a", "b"))
        for one in (sample, *operations.values()):
            await store.journal.add(one)
        assert await store.journal.last_finished_seq(RUN) == -1
        assert await store.journal.first_pending_seq(RUN) == 1
        for seq in (1, 2):
            ticket = operations[seq].ticket_id
            await store.journal.fail(ticket, kind="InvalidRequest", message="no", when=at(9))
        assert [one.seq for one in await store.journal.for_run(RUN, after_seq=1)] == [2, 3, 4]
        assert await store.journal.pending() == (operations[3], operations[4], sample)
        assert await store.journal.last_finished_seq(RUN) == 2
        await store.runs.set_snapshot(RUN, "snapshots/a", 3)
        assert await store.journal.last_finished_seq(RUN) == 3
        assert await store.journal.first_pending_seq(RUN) == 3
        assert await store.journal.first_pending_seq(RunId("none")) is None

    async def test_a_place_in_an_order_can_be_looked_up(self, store: Store) -> None:
        await fill(store)
        in_run = operation(1)
        await store.journal.add(in_run)
        await store.journal.add(operation(1, run=None, sampler="s1:sample:0"))
        assert await store.journal.at(RUN, 1) == in_run
        assert await store.journal.at(RUN, 2) is None

    async def test_without_a_snapshot_the_whole_run_stays_replayable(self, store: Store) -> None:
        await fill(store)
        created = operation(0)
        await store.journal.add(created)
        await store.journal.finish(created.ticket_id, result_path=None, result_bytes=0, when=at(1))
        prune = store.journal.prune
        assert await prune(delivered_before=at(99), finished_before=at(99)) == ()
        await store.runs.set_snapshot(RUN, "snapshots/a", 0)
        assert len(await prune(delivered_before=at(99), finished_before=at(99))) == 1

    async def test_pruning_keeps_what_a_replay_needs(self, store: Store) -> None:
        await fill(store)
        operations = {seq: operation(seq) for seq in range(1, 6)}
        for one in operations.values():
            await store.journal.add(one)
        for seq in (1, 2, 3, 4):
            ticket = operations[seq].ticket_id
            await store.journal.finish(ticket, result_path=None, result_bytes=0, when=at(seq))
        await store.runs.set_snapshot(RUN, "snapshots/a", 3)
        await store.journal.delivered([operations[seq].ticket_id for seq in (1, 4)], at(10))
        early = at(-100)
        prune = store.journal.prune
        gone = await prune(delivered_before=at(11), finished_before=early)
        assert [one.seq for one in gone] == [1]  # 4 is delivered, but newer than the snapshot
        gone = await prune(delivered_before=early, finished_before=at(2.5))
        assert [one.seq for one in gone] == [2]
        await store.runs.set_state(RUN, RunPhase.CLOSED)
        gone = await prune(delivered_before=at(99), finished_before=at(99), limit=1)
        assert len(gone) == 1
        assert len(await prune(delivered_before=at(99), finished_before=at(99))) == 1
        assert await store.journal.pending() == (operations[5],)

    async def test_what_changes_nothing_is_not_kept_for_a_replay(self, store: Store) -> None:
        await fill(store)
        for seq in range(4):
            await add_finished(store, replace(operation(seq), changes_run=seq == 0))
        # The last one tells where the order stands, so that its place is not given away again.
        assert [one.seq for one in await prune_all(store)] == [1, 2]
        assert await store.journal.last_finished_seq(RUN) == 3
        await add_finished(store, replace(operation(4), changes_run=True))
        assert [one.seq for one in await prune_all(store)] == [3]
        await store.runs.set_snapshot(RUN, "snapshots/a", 4)
        assert [one.seq for one in await prune_all(store)] == [0, 4]

    async def test_samples_are_never_replayed(self, store: Store) -> None:
        await fill(store)
        await add_finished(store, operation(1, run=None, sampler="s1:sample:0"))
        assert len(await prune_all(store)) == 1

    async def test_blobs_in_use_are_those_an_operation_names(self, store: Store) -> None:
        await fill(store)
        assert await store.journal.blob_paths() == set()
        await store.journal.add(first := operation(1))
        await store.journal.add(second := operation(2))
        await store.journal.finish(first.ticket_id, result_path="r/1", result_bytes=1, when=NOW)
        paths = {first.payload_path, "r/1", second.payload_path}
        assert await store.journal.blob_paths() == paths

    async def test_payloads_within_the_snapshot_are_forgotten(self, store: Store) -> None:
        await fill(store)
        operations = {seq: operation(seq) for seq in (1, 2, 3)}
        for one in operations.values():
            await store.journal.add(one)
        for seq in (1, 3):
            ticket = operations[seq].ticket_id
            await store.journal.finish(ticket, result_path=None, result_bytes=0, when=NOW)
        paths = await store.journal.prune_replayed(RUN, up_to_seq=2)
        assert paths == (operations[1].payload_path,)  # 2 is pending, 3 is newer
        assert await store.journal.prune_replayed(RUN, up_to_seq=2) == ()
        kept = await store.journal.get(ANN, operations[1].ticket_id)
        assert kept is not None
        assert (kept.payload_path, kept.payload_bytes) == (None, 0)
        # Without a snapshot: all that are not to be done.
        assert await store.journal.prune_replayed(RUN) == (operations[3].payload_path,)

    async def test_loads_that_a_replay_would_do_again(self, store: Store) -> None:
        await fill(store)
        loads = [replace(operation(seq), kind="load_state") for seq in (1, 2, 3)]
        for one in (*loads[:2], operation(4)):
            await add_finished(store, one)
        await store.journal.add(loads[2])  # has no outcome, so it may still fail
        assert {one.seq for one in await store.journal.loads("load_state")} == {1, 2}
        await store.runs.set_snapshot(RUN, "snapshots/1", 1)
        assert {one.seq for one in await store.journal.loads("load_state")} == {2}
        await store.runs.close(RUN)
        assert await store.journal.loads("load_state") == ()


class TestCheckpoints:
    async def test_a_name_is_overwritten_only_on_request(self, store: Store) -> None:
        await fill(store)
        first, second = checkpoint("a"), checkpoint("a")
        assert await store.checkpoints.add(first) is None
        assert await store.checkpoints.add(second) == first
        assert await store.checkpoints.by_id(second.id) is None
        assert await store.checkpoints.add(second, overwrite=True) == first
        training = CheckpointKind.TRAINING
        assert await store.checkpoints.get(ANN, RUN, training, "a") == second
        assert await store.checkpoints.get(BOB, RUN, training, "a") is None
        assert await store.checkpoints.get(ANN, RUN, CheckpointKind.SAMPLER, "a") is None
        assert await store.checkpoints.by_id(first.id) is None

    async def test_one_that_lost_its_name_may_be_added_again(self, store: Store) -> None:
        await fill(store)
        first, second = checkpoint("a"), checkpoint("a")
        await store.checkpoints.add(first)
        await store.checkpoints.add(second, overwrite=True)
        again = await store.checkpoints.add(first, overwrite=True)  # done again after a crash
        assert again is not None
        assert again.id == first.id
        assert await store.checkpoints.get(ANN, RUN, CheckpointKind.TRAINING, "a") == second

    async def test_unnamed_ones_have_no_rivals_and_are_not_listed(self, store: Store) -> None:
        await fill(store)
        kind = CheckpointKind.SAMPLER
        unnamed = [checkpoint(None, kind=kind, expires_at=AHEAD) for _ in range(2)]
        for one in unnamed:
            assert await store.checkpoints.add(one) is None
        assert await store.checkpoints.for_run(ANN, RUN) == ()
        assert await store.checkpoints.page(ANN, 10, 0) == ((), 0)
        assert await store.checkpoints.latest(ANN, [RUN]) == {}
        assert await store.checkpoints.by_id(unnamed[0].id) == unnamed[0]
        expired = await store.checkpoints.expired(AHEAD)
        assert {one.id for one in expired} == {one.id for one in unnamed}

    async def test_unnamed_ones_of_a_closed_run_are_left_behind_once_nobody_samples_them(
        self, store: Store
    ) -> None:
        await fill(store)
        kind = CheckpointKind.SAMPLER
        weights, drawn, named = (checkpoint(name, kind=kind) for name in (None, None, "kept"))
        for one in (weights, drawn, named):
            await store.checkpoints.add(one)
        await store.samplers.add(sampler(1, checkpoint=drawn.id))
        sample = operation(1, run=None, sampler="s1:sample:1")
        await store.journal.add(sample)
        assert await store.checkpoints.left_behind() == ()
        await store.runs.close(RUN)  # unloaded: its samplers go on
        assert await store.checkpoints.left_behind() == ()
        await end_session(store)
        assert await store.checkpoints.left_behind() == (weights,)
        await store.journal.fail(sample.ticket_id, kind="X", message="", when=NOW)
        assert {one.id for one in await store.checkpoints.left_behind()} == {weights.id, drawn.id}

    async def test_the_latest_of_each_kind_for_many_runs(self, store: Store) -> None:
        await fill(store)
        await store.runs.add(run(1))
        kinds = (CheckpointKind.TRAINING, CheckpointKind.SAMPLER)
        newest = {}
        for number, owner in enumerate(("s1:train:0", "s1:train:1")):
            for kind in kinds:
                for second in range(3):
                    one = checkpoint(
                        f"c{second}", kind=kind, run=owner, created_at=at(second + number)
                    )
                    await store.checkpoints.add(one)
                    newest[RunId(owner), kind] = one
        found = await store.checkpoints.latest(ANN, [RUN, RunId("s1:train:1"), RunId("none")])
        assert found == newest
        assert await store.checkpoints.latest(BOB, [RUN]) == {}
        page, total = await store.checkpoints.page(ANN, 2, 0)
        assert (len(page), total) == (2, 12)
        names = [one.name for one in await store.checkpoints.for_run(ANN, RUN)]
        assert names == ["c0", "c0", "c1", "c1", "c2", "c2"]

    async def test_expiry_is_set_and_lifted(self, store: Store) -> None:
        await fill(store)
        one = checkpoint()
        await store.checkpoints.add(one)
        assert await store.checkpoints.expired(at(1000)) == ()
        assert await store.checkpoints.set_expiry(one.id, AHEAD)
        assert await store.checkpoints.expired(AHEAD - timedelta(seconds=1)) == ()
        assert await store.checkpoints.expired(AHEAD) == (replace(one, expires_at=AHEAD),)
        assert await store.checkpoints.set_expiry(one.id, None)
        assert await store.checkpoints.expired(AHEAD) == ()
        assert not await store.checkpoints.set_expiry("none", None)

    async def test_what_has_expired_is_in_no_answer(self, store: Store) -> None:
        await fill(store)
        training = CheckpointKind.TRAINING
        one = checkpoint("a")
        await store.checkpoints.add(one)
        assert await store.checkpoints.set_expiry(one.id, utc_now())
        assert await store.checkpoints.get(ANN, RUN, training, "a") is None
        assert await store.checkpoints.readable(ANN, RUN, training, "a") is None
        assert await store.checkpoints.by_id(one.id) is None
        assert await store.checkpoints.for_run(ANN, RUN) == ()
        assert await store.checkpoints.page(ANN, 10, 0) == ((), 0)
        assert await store.checkpoints.latest(ANN, [RUN]) == {}
        assert not await store.checkpoints.has_folder(one.path)
        assert not await store.checkpoints.set_expiry(one.id, None)
        assert not await store.checkpoints.set_public(one.id, True)
        assert len(await store.checkpoints.expired(utc_now())) == 1
        # Its name is free, and its files are left to be removed.
        again = checkpoint("a", created_at=utc_now())
        held = await store.checkpoints.add(again)
        assert held is not None
        assert held.id == one.id
        assert await store.checkpoints.get(ANN, RUN, training, "a") == again
        (left,) = await store.checkpoints.expired(utc_now())
        assert (left.id, left.name) == (one.id, None)

    async def test_others_read_what_is_public(self, store: Store) -> None:
        await fill(store)
        training = CheckpointKind.TRAINING
        one, private = checkpoint("a"), checkpoint("b")
        for each in (one, private):
            await store.checkpoints.add(each)
        assert await store.checkpoints.readable(BOB, RUN, training, "a") is None
        assert await store.checkpoints.set_public(one.id, True)
        assert not await store.checkpoints.set_public(one.id, True)
        shown = replace(one, public=True)
        assert await store.checkpoints.readable(BOB, RUN, training, "a") == shown
        assert await store.checkpoints.get(BOB, RUN, training, "a") is None
        assert await store.checkpoints.for_run(BOB, RUN) == (shown,)
        assert await store.checkpoints.page(BOB, 10, 0) == ((), 0)
        assert await store.checkpoints.set_public(one.id, False)
        assert await store.checkpoints.readable(BOB, RUN, training, "a") is None

    async def test_idle_ones_are_those_without_a_name_that_nobody_samples(
        self, store: Store
    ) -> None:
        await fill(store)
        kind = CheckpointKind.SAMPLER
        old, used, drawn, newest = (
            checkpoint(None, kind=kind, created_at=at(second)) for second in range(4)
        )
        named = checkpoint("kept", kind=kind)
        for one in (old, used, drawn, newest, named):
            await store.checkpoints.add(one)
        await store.checkpoints.touch([used.id], at(50))
        await store.samplers.add(sampler(1, checkpoint=drawn.id))
        await store.journal.add(operation(1, run=None, sampler="s1:sample:1"))
        assert await store.checkpoints.idle(at(40)) == (old,)
        assert {one.id for one in await store.checkpoints.idle(at(60))} == {old.id, used.id}

    async def test_a_copy_shares_its_folder_until_one_of_both_is_gone(self, store: Store) -> None:
        await fill(store)
        source = checkpoint("a")
        await store.checkpoints.add(source)
        held = replace(run(1), state=RunPhase.COPIED)
        copy = replace(source, id="copy", run_id=held.id)
        add = store.copies.add
        assert not await store.checkpoints.is_shared(source)
        assert await add(copy, held, None, source=source.id) is Copied.DONE
        assert await add(replace(copy, id="x"), held, None, source=source.id) is Copied.TAKEN
        assert await store.checkpoints.is_shared(source)
        await store.checkpoints.retire(source.id, utc_now())
        assert not await store.checkpoints.is_shared(copy)
        assert await store.checkpoints.is_shared(source)
        other = replace(copy, id="y", run_id=run(2).id)
        assert await add(other, run(2), None, source=source.id) is Copied.SOURCE_GONE
        assert await store.runs.get(ANN, run(2).id) is None

    async def test_deleting_is_final(self, store: Store) -> None:
        await fill(store)
        one = checkpoint()
        await store.checkpoints.add(one)
        assert await store.checkpoints.delete(one.id)
        assert not await store.checkpoints.delete(one.id)
        assert await store.checkpoints.by_id(one.id) is None
