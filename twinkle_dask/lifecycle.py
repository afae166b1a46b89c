"""States of sessions and lanes, as tables: ``state -> event -> state``. No I/O.

``docs/architecture.md`` shows these tables as diagrams. Callers do what a move asks for; an
illegal move raises, because it means that the caller's picture of the world is wrong.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar


class SessionState(StrEnum):
    """A client's connection."""

    ACTIVE = "active"
    FINISHED = "finished"
    EXPIRED = "expired"


class SessionEvent(StrEnum):
    """What happens to a session."""

    FINISH = "finish"
    EXPIRE = "expire"


class LaneState(StrEnum):
    """A run's connection to the host that computes it, as the gateway sees it."""

    DETACHED = "detached"
    RESTORING = "restoring"
    ATTACHED = "attached"
    CLOSED = "closed"


class LaneEvent(StrEnum):
    """What happens to a lane."""

    WORK = "work"
    RESTORED = "restored"
    HOST_LOST = "host_lost"
    RELEASE = "release"
    CLOSE = "close"


SESSION: Mapping[SessionState, Mapping[SessionEvent, SessionState]] = {
    SessionState.ACTIVE: {
        SessionEvent.FINISH: SessionState.FINISHED,
        SessionEvent.EXPIRE: SessionState.EXPIRED,
    },
    # The first ending wins; a client may say goodbye twice.
    SessionState.FINISHED: {SessionEvent.FINISH: SessionState.FINISHED},
    SessionState.EXPIRED: {SessionEvent.FINISH: SessionState.EXPIRED},
}

LANE: Mapping[LaneState, Mapping[LaneEvent, LaneState]] = {
    LaneState.DETACHED: {
        LaneEvent.WORK: LaneState.RESTORING,
        LaneEvent.HOST_LOST: LaneState.DETACHED,
        LaneEvent.RELEASE: LaneState.DETACHED,
        LaneEvent.CLOSE: LaneState.CLOSED,
    },
    LaneState.RESTORING: {
        LaneEvent.RESTORED: LaneState.ATTACHED,
        LaneEvent.HOST_LOST: LaneState.DETACHED,
        LaneEvent.CLOSE: LaneState.CLOSED,
    },
    LaneState.ATTACHED: {
        LaneEvent.HOST_LOST: LaneState.DETACHED,
        LaneEvent.RELEASE: LaneState.DETACHED,
        LaneEvent.CLOSE: LaneState.CLOSED,
    },
    LaneState.CLOSED: {
        LaneEvent.HOST_LOST: LaneState.CLOSED,
        LaneEvent.CLOSE: LaneState.CLOSED,
    },
}

State = TypeVar("State", bound=StrEnum)
Event = TypeVar("Event", bound=StrEnum)


class IllegalMove(RuntimeError):
    """The table has no such move; a fault of ours."""


def move(table: Mapping[State, Mapping[Event, State]], state: State, event: Event) -> State:
    """The state after an event.

    Raises:
        IllegalMove: The table has no such move.
    """
    try:
        return table[state][event]
    except KeyError:
        raise IllegalMove(f"{event!r} cannot happen in state {state!r}") from None
