"""The tables are whole: whatever may happen leads to a state that the table knows."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_dask.lifecycle import (
    LANE,
    SESSION,
    IllegalMove,
    LaneEvent,
    LaneState,
    SessionEvent,
    SessionState,
    move,
)

TABLES = [
    pytest.param(SESSION, SessionState, SessionEvent, SessionState.ACTIVE, id="session"),
    pytest.param(LANE, LaneState, LaneEvent, LaneState.DETACHED, id="lane"),
]
Table = Mapping[Any, Mapping[Any, Any]]


@pytest.mark.parametrize(("table", "states", "events", "first"), TABLES)
@given(data=st.data())
def test_any_story_stays_within_the_table(
    table: Table,
    states: type[StrEnum],
    events: type[StrEnum],
    first: StrEnum,
    data: st.DataObject,
) -> None:
    state = first
    for event in data.draw(st.lists(st.sampled_from(list(events)))):
        assert state in table
        if event in table[state]:
            state = move(table, state, event)
            assert state in states
        else:
            with pytest.raises(IllegalMove, match=repr(event)):
                move(table, state, event)


@pytest.mark.parametrize(("table", "states", "events", "first"), TABLES)
def test_every_state_is_reached_and_every_event_happens(
    table: Table, states: type[StrEnum], events: type[StrEnum], first: StrEnum
) -> None:
    reached, found = {first}, [first]
    while found:
        new = {*table[found.pop()].values()} - reached
        reached |= new
        found += new
    assert reached == set(states) == set(table)
    assert {event for moves in table.values() for event in moves} == set(events)


@given(st.lists(st.sampled_from(SessionEvent), min_size=1))
def test_the_first_ending_of_a_session_wins(story: list[SessionEvent]) -> None:
    ended = state = move(SESSION, SessionState.ACTIVE, story[0])
    for event in story[1:]:
        if event in SESSION[state]:
            state = move(SESSION, state, event)
    assert state is ended


@given(st.sampled_from(LaneState))
def test_a_lane_can_be_closed_and_its_host_lost_at_any_time(state: LaneState) -> None:
    assert move(LANE, state, LaneEvent.CLOSE) is LaneState.CLOSED
    assert move(LANE, state, LaneEvent.HOST_LOST) in {LaneState.DETACHED, LaneState.CLOSED}
