"""What training data claim is held against what was recorded, and told where it differs."""

import re
from dataclasses import replace

import numpy as np
import pytest

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.provenance import (
    BatchSpans,
    DatumSpans,
    Span,
    SpanKind,
    check_cover,
    check_tokens,
)
from twinkle_dask.operations.recording import RecordedSample, sequence_ids, sequence_of
from twinkle_dask.types import Datum, ForwardBackward, LossName, LossSpec, TicketId

TICKET = TicketId("ab12")
FIRST, SECOND = sequence_ids(TICKET, 2)
PROMPT, DRAWN = [5, 6, 7], [8, 9, 10, 11]
KNOWN = {
    TICKET: RecordedSample(
        prompt=np.array(PROMPT, np.int32),
        sequences=(np.array(DRAWN, np.int32), np.array([1], np.int32)),
    )
}


def prompt(length: int, offset: int = 0, sequence: str = FIRST) -> Span:
    return Span(kind=SpanKind.PROMPT, sequence_id=sequence, offset=offset, length=length)


def sampled(length: int, offset: int = 0, sequence: str = FIRST) -> Span:
    return Span(kind=SpanKind.SAMPLED, sequence_id=sequence, offset=offset, length=length)


TRUE = DatumSpans(
    model_input=(prompt(3), sampled(3)), loss_inputs=(prompt(2, offset=1), sampled(4))
)


def batch(loss: LossName = LossName.PPO) -> ForwardBackward:
    """Two data, each the prompt and what was drawn, shifted by one as clients do it."""
    tokens = np.array([*PROMPT, *DRAWN])
    datum = Datum(
        tokens=tokens[:-1].astype(np.int32),
        target_tokens=tokens[1:].astype(np.int64),
        loss_inputs={},
    )
    return ForwardBackward(data=(datum, datum), loss=LossSpec(name=loss))


def check(spans: DatumSpans, loss: LossName = LossName.PPO) -> None:
    of_batch: BatchSpans = {1: spans}
    check_cover(batch(loss), of_batch)
    check_tokens(batch(loss), of_batch, KNOWN)


@pytest.mark.parametrize("loss", [LossName.PPO, LossName.STABLE_REINFORCE])
def test_the_truth_passes(loss: LossName) -> None:
    check(TRUE, loss)
    # In pieces, empty ones among them, it is still true.
    pieces = (prompt(1), prompt(0, offset=3), prompt(2, offset=1), sampled(1), sampled(2, offset=1))
    check(replace(TRUE, model_input=pieces), loss)


@pytest.mark.parametrize(
    ("spans", "complaint"),
    [
        (replace(TRUE, model_input=()), "Datum 1: model_input_spans is empty"),
        (replace(TRUE, loss_inputs=()), "Datum 1: loss_fn_input_spans is empty"),
        (replace(TRUE, model_input=(prompt(3),)), "covers 3 positions, but there are 6"),
        (replace(TRUE, model_input=(prompt(3), sampled(4))), "covers 7 positions"),
        (replace(TRUE, model_input=(prompt(7), sampled(-1))), "[1] has offset 0 and length -1"),
        (replace(TRUE, model_input=(prompt(3, -1), sampled(3))), "[0] has offset -1"),
        (replace(TRUE, model_input=(prompt(3, sequence=""), sampled(3))), "names no sequence"),
        (replace(TRUE, model_input=(prompt(2), sampled(4))), "[1] does not hold what sequence"),
        (replace(TRUE, model_input=(prompt(4), sampled(2))), "ends at 4, but sequence"),
        (replace(TRUE, loss_inputs=(sampled(4), prompt(2, offset=1))), "loss_fn_input_spans[0]"),
        (replace(TRUE, loss_inputs=(prompt(2, offset=2), sampled(4))), "ends at 4, but sequence"),
        (
            replace(TRUE, model_input=(prompt(3), sampled(3, sequence=SECOND))),
            f"sequence '{SECOND}' has 1 sampled tokens",
        ),
        (
            replace(TRUE, loss_inputs=(prompt(2, offset=1), sampled(4, offset=1))),
            "ends at 5, but sequence",
        ),
        (
            replace(TRUE, model_input=(prompt(2), prompt(1), sampled(3))),
            "Datum 1: model_input_spans[1] does not hold what sequence 'ab12-0' does: its prompt "
            "token 0 is 5, not 7",
        ),
    ],
)
@pytest.mark.parametrize("loss", [LossName.PPO, LossName.STABLE_REINFORCE])
def test_what_is_not_true_is_named(spans: DatumSpans, complaint: str, loss: LossName) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(complaint)):
        check(spans, loss)


@pytest.mark.parametrize(
    "name", ["none", "none-0", f"{TICKET}-2", f"{TICKET}-x", "-1", f"{TICKET}-"]
)
def test_an_unknown_sequence_says_nothing_unless_the_loss_needs_it(name: str) -> None:
    spans = replace(TRUE, model_input=(prompt(3), sampled(3, sequence=name)))
    check(spans)
    with pytest.raises(InvalidRequest, match=r"Datum 1: model_input_spans\[1\] names .*recorded"):
        check(spans, LossName.STABLE_REINFORCE)


def test_a_target_in_the_prompt_is_padding() -> None:
    one = batch().data[0]
    padded = one.target_tokens.copy()
    padded[:2] = 0
    check_tokens(replace(batch(), data=(replace(one, target_tokens=padded),)), {0: TRUE}, KNOWN)


def test_of_several_targets_one_is_the_token() -> None:
    one = batch().data[0]
    two = np.stack([np.zeros_like(one.target_tokens), one.target_tokens], axis=1)
    for targets, is_true in ((two, True), (two + 1, False)):
        several = replace(batch(), data=(replace(one, target_tokens=targets),))
        check_cover(several, {0: TRUE})
        if is_true:
            check_tokens(several, {0: TRUE}, KNOWN)
        else:
            with pytest.raises(InvalidRequest, match=r"loss_fn_input_spans\[1\]"):
                check_tokens(several, {0: TRUE}, KNOWN)


def test_names_of_sequences_lead_back_to_their_sample() -> None:
    assert [sequence_of(name) for name in (FIRST, SECOND)] == [(TICKET, 0), (TICKET, 1)]
    for name in ("", "-", "ab12", "ab12-", "ab12-1e3", "ab12-²", "ab12-" + "9" * 5000):
        assert sequence_of(name) is None
