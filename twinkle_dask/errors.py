"""What can go wrong, told by whose turn it is to act.

``RequestError`` is the tenant's to fix, ``CapacityError`` passes with time, ``ServiceFault`` is
ours. Messages are written for the tenant; fields are for programs. No class knows an HTTP status:
each face holds one table from class to status. Every class survives ``pickle`` because ``args``
holds exactly what ``__init__`` takes.

A fault of ours carries the *incident* under which whoever saw it first logged it, so that what the
tenant reports finds the trace.

To add a failure, add a leaf here; the tests then demand an entry in each face's table.
"""

import secrets


def new_incident() -> str:
    """An id for a log entry and the ``ServiceFault`` that comes of it."""
    return secrets.token_hex(6)


class TwinkleDaskError(Exception):
    """Base of everything the service raises on purpose.

    Attributes:
        message: What happened and what to do, in words for the tenant.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        # Not the default, which would show a tuple for classes with fields.
        return self.message


class RequestError(TwinkleDaskError):
    """The tenant can fix it by asking differently."""


class InvalidRequest(RequestError):
    """The request itself is wrong: a value, a shape, a name."""


class NotSupported(RequestError):
    """The request is well formed but asks for something this service does not do."""


class NotFound(RequestError):
    """No such object, or it belongs to another tenant (which must look the same)."""


class NotPermitted(RequestError):
    """The tenant is known but may not do this."""


class NotAuthenticated(RequestError):
    """The API key is missing or unknown."""


class TokenRejected(RequestError):
    """A token that was given for an API key is not valid any more, or never was."""


class OutOfOrder(RequestError):
    """A sequence number came after its run had moved past it."""

    def __init__(self, message: str, expected_seq: int = 0) -> None:
        super().__init__(message)
        self.args = (message, expected_seq)
        self.expected_seq = expected_seq


class Conflict(RequestError):
    """It does not go together with what is there already: a name that is taken, for example."""


class SessionEnded(RequestError):
    """The session was finished or expired; nothing more can be done in it."""


class CapacityError(TwinkleDaskError):
    """Nothing is wrong; the tenant should come back later."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.args = (message, retry_after_s)
        self.retry_after_s = retry_after_s


class QuotaExceeded(CapacityError):
    """The tenant's own limit is reached."""


class Saturated(CapacityError):
    """The service as a whole cannot take more at the moment."""


class ServiceFault(TwinkleDaskError):
    """Our failure. The trace is in the log under ``incident``; the tenant gets only the id."""

    def __init__(self, message: str, incident: str = "") -> None:
        super().__init__(message)
        self.args = (message, incident)
        self.incident = incident


class HostLost(ServiceFault):
    """The worker that held the run or sampler is gone; its work is restored elsewhere."""


class StorageFailed(ServiceFault):
    """The store could not be written or read, for example because the disk is full."""


class CheckpointCorrupt(ServiceFault):
    """A checkpoint's files do not hold what its record says."""


class StartupError(TwinkleDaskError):
    """The service cannot start; for the operator, who reads the message on standard error."""


class CannotSample(StartupError):
    """The sampler engine does not know how to sample this base model; it may be trained."""
