"""How clients write the address of a checkpoint: ``<scheme>://<run>/<kind>/<name>``.

``tinker`` and ``twinkle`` name the same things, and every face reads both.
"""

import re
from typing import Literal, TypeAlias

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.validation import checkpoint_name
from twinkle_dask.operations.values import CheckpointAddress
from twinkle_dask.store.records import CheckpointKind
from twinkle_dask.types import RunId

Scheme: TypeAlias = Literal["tinker", "twinkle"]

_SCHEMES = ("tinker://", "twinkle://")
# Ids of runs are "<session>:train:<n>" or "<session>-<adapter>"; ':' rules out any URL parser that
# knows ports.
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,255}")


def address_of(run: str, kind: str, name: str) -> CheckpointAddress:
    """Put an address together from the segments of a URL.

    Raises:
        InvalidRequest: One of them cannot be what it should be.
    """
    if not _RUN.fullmatch(run):
        raise InvalidRequest(f"{_short(run)} cannot be the id of a training run.")
    try:
        checkpoint_kind = CheckpointKind(kind)
    except ValueError:
        known = " or ".join(repr(str(k)) for k in CheckpointKind)
        raise InvalidRequest(f"Checkpoint kind {_short(kind)} must be {known}.") from None
    return CheckpointAddress(run=RunId(run), kind=checkpoint_kind, name=checkpoint_name(name))


def is_address(path: str) -> bool:
    """Whether a text begins as an address does."""
    return path.startswith(_SCHEMES)


def parse_address(path: str, scheme: Scheme) -> CheckpointAddress:
    """Read an address of either scheme. Nothing in it is percent-decoded.

    Args:
        path: What the client sent.
        scheme: The face's own, for the message.

    Raises:
        InvalidRequest: It is none.
    """
    parts = path.partition("://")[2].split("/")
    if not is_address(path) or len(parts) != 3:
        raise InvalidRequest(
            f"{_short(path)} is not a checkpoint address; "
            f"it should read {scheme}://<training run>/weights/<name>."
        )
    return address_of(*parts)


def format_address(address: CheckpointAddress, scheme: Scheme) -> str:
    """Write an address as a face's clients read it."""
    return f"{scheme}://{address.run}/{address.kind}/{address.name}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
