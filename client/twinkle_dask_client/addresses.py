"""Names of checkpoints: ``twinkle://RUN/weights/NAME``, or ``tinker://``; they mean the same."""

import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import quote

_FORM = re.compile(r"(?:twinkle|tinker)://([^/]+)/([^/]+)/([^/]+)")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a checkpoint lies; ``kind`` is ``weights`` or ``sampler_weights``."""

    run: str
    kind: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an address.

        Raises:
            ValueError: It is none.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no twinkle://RUN/weights/NAME.")
        return cls(*found.groups())

    @property
    def path(self) -> str:
        """Where the service has it, below ``/api/v1/``."""
        run, kind, name = (quote(part, safe="") for part in (self.run, self.kind, self.name))
        return f"training_runs/{run}/checkpoints/{kind}/{name}"
