"""How Tinker writes the address of a checkpoint: ``tinker://<run>/<kind>/<name>``."""

import re

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.validation import checkpoint_name
from twinkle_dask.operations.values import CheckpointAddress
from twinkle_dask.store.records import CheckpointKind
from twinkle_dask.types import RunId

_SCHEME = "tinker://"
# The ids we make are "<session>:train:<n>"; ':' rules out any URL parser that knows ports.
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


def parse_address(path: str) -> CheckpointAddress:
    """Read a ``tinker://`` address. Nothing in it is percent-decoded.

    Raises:
        InvalidRequest: It is none.
    """
    parts = path.removeprefix(_SCHEME).split("/")
    if not path.startswith(_SCHEME) or len(parts) != 3:
        raise InvalidRequest(
            f"{_short(path)} is not a checkpoint address; "
            "it should read tinker://<training run>/weights/<name>."
        )
    return address_of(*parts)


def format_address(address: CheckpointAddress) -> str:
    """Write an address as clients read it."""
    return f"{_SCHEME}{address.run}/{address.kind}/{address.name}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
