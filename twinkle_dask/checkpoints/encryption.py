"""Files encrypted for whoever holds a private key of age (https://age-encryption.org)."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import pyrage  # pyright: ignore[reportMissingTypeStubs]

from twinkle_dask.errors import InvalidRequest

#: Added to the names of encrypted files.
SUFFIX = ".age"

# The module is written in Rust, without types.
_age: Any = pyrage

Recipient: TypeAlias = Any


def parse(recipients: Sequence[str]) -> tuple[Recipient, ...]:
    """Public keys as they are written: ``age1...``, or a line of an SSH public key file.

    Raises:
        InvalidRequest: One is neither; says which by its place, not by its text.
    """
    return tuple(_parse(text.strip(), index) for index, text in enumerate(recipients))


def encrypted(files: Mapping[str, bytes], recipients: Sequence[Recipient]) -> dict[str, bytes]:
    """Each file under its new name; any one of the recipients can read it."""
    return {name + SUFFIX: _age.encrypt(data, list(recipients)) for name, data in files.items()}


def _parse(text: str, index: int) -> Recipient:
    kind = _age.ssh if text.startswith("ssh-") else _age.x25519
    try:
        return kind.Recipient.from_str(text)
    except _age.RecipientError:
        raise InvalidRequest(
            f"Recipient {index} is no public key of age ('age1...') and no SSH public key "
            "(ssh-ed25519 or ssh-rsa)."
        ) from None
