"""Failures in words, the same for every face."""

from collections.abc import Sequence
from typing import Any

import structlog
from fastapi import Request

from twinkle_dask import errors

log = structlog.stdlib.get_logger(__name__)

# No such status exists; nobody is left to read it, but the access log is.
CLIENT_LEFT = 499


def check_address(request: Request) -> None:
    """Refuse what no database takes as text, wherever in an address it is.

    Raises:
        InvalidRequest: It is there.
    """
    if "\0" in request.scope["path"] or b"%00" in request.scope["query_string"]:
        raise errors.InvalidRequest("An address must not hold the character U+0000.")


def message_of(error: errors.TwinkleDaskError) -> str:
    """The tenant's words for a failure; one of ours carries the id under which it is logged."""
    if not isinstance(error, errors.ServiceFault):
        return error.message
    if not error.incident:
        # Kept on the error: a failed result is polled for more than once.
        error.incident = errors.new_incident()
        log.error("fault without incident", incident=error.incident, exc_info=error)
    return our_fault(error.message.rstrip("."), error.incident)


def unexpected(incident: str) -> str:
    """What is told of an exception that nobody foresaw, and that is logged under ``incident``."""
    return our_fault("Something went wrong on our side", incident)


def our_fault(message: str, incident: str) -> str:
    """A fault of ours, with what its reader can do about it."""
    return f"{message}. If it stays so, tell the operator the incident {incident}."


def describe(problems: Sequence[Any]) -> str:
    """Pydantic's findings as one short sentence, without what the client had sent."""
    found: list[str] = []
    for problem in problems[:3]:
        where = ".".join(str(step)[:60] for step in problem["loc"])
        what = str(problem["msg"]).removeprefix("Value error, ")[:300]
        found.append(f"{where}: {what}" if where else what)
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return "; ".join(found) + more
