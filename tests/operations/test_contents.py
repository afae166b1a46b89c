"""Small requests and results lie in the journal's rows, large ones in files; nobody can tell."""

import pytest

from tests.operations.parts import ANN, Parts
from twinkle_dask.operations import contents
from twinkle_dask.operations.lanes import Lane
from twinkle_dask.operations.requests import LaneRequest
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.operations.values import Done, ServedModel
from twinkle_dask.types import AdamParams, OptimStep, StepResult


@pytest.mark.parametrize(("inline_bytes", "num_files"), [(64 * 1024, 0), (-1, 2)])
async def test_a_step_is_kept_and_answered_the_same(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, inline_bytes: int, num_files: int
) -> None:
    run = await parts.a_run(await parts.a_session())

    def never(_lane: Lane) -> bool:
        return False

    # A snapshot would take the request away, at a time of its own.
    monkeypatch.setattr(Lane, "_snapshot_due", never)
    monkeypatch.setattr(contents, "INLINE_BYTES", inline_bytes)
    before = len(parts.files("journal")), len(parts.files("results"))

    def make(_lane: Lane, _model: ServedModel) -> LaneRequest:
        return OptimStep(adam=AdamParams())

    ticket = (await parts.runs.submit(ANN, run, seq=None, make=make)).id
    await parts.done(ticket)
    after = len(parts.files("journal")), len(parts.files("results"))
    assert (after[0] - before[0]) + (after[1] - before[1]) == num_files
    record = await parts.store.journal.get(ANN.id, ticket)
    assert record is not None
    assert record.has_payload
    payload = await contents.payload_of(parts.blobs, record)
    assert len(payload) == record.payload_bytes
    assert len(await contents.result_of(parts.blobs, record)) == record.result_bytes
    forgetful = TicketBoard(parts.store, parts.blobs, parts.quotas.queued_bytes)
    outcome = await forgetful.wait(ANN.id, ticket, 1)
    assert isinstance(outcome, Done)
    assert isinstance(outcome.result, StepResult)
