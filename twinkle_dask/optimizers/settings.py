"""Kinds of settings, and a table of named things that take some."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from twinkle_dask.errors import InvalidRequest

_MOST_LISTED: Final = 1000
_LARGEST: Final = 2**53  # beyond, JSON readers differ about whole numbers


class Required:
    """Stands for the default that a setting does not have."""


REQUIRED: Final = Required()


class Refused(ValueError):
    """Says what a value must be."""


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number from ``low`` to ``high``, of at most 2**53.

    Attributes:
        above: It must be more than ``low``.
        below: It must be less than ``high``.
        whole: It must be an integer.
        optional: None is allowed too.
    """

    default: float | Required | None = REQUIRED
    low: float = 0.0
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    optional: bool = False

    def read(self, value: object) -> float | None:
        """The value as a number; JSON has one kind, so 1 is as good as 1.0 and the other way."""
        if value is None and self.optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Refused(self.wanted)
        if abs(value) > _LARGEST:
            raise Refused("a finite number of at most 2**53")
        if (
            math.isnan(value)
            or (self.whole and value != int(value))
            or value < self.low
            or value > self.high
            or (self.above and value == self.low)
            or (self.below and value == self.high)
        ):
            raise Refused(self.wanted)
        return int(value) if self.whole else float(value)

    @property
    def wanted(self) -> str:
        """What a value must be, in words."""
        words = ["a whole number" if self.whole else "a number"]
        if self.low > -math.inf:
            words.append(f"above {self.low:g}" if self.above else f"of at least {self.low:g}")
        if self.high < math.inf:
            words.append(f"below {self.high:g}" if self.below else f"at most {self.high:g}")
        return " ".join(words) + (", or null" if self.optional else "")


@dataclass(frozen=True, slots=True)
class Flag:
    """True or false."""

    default: bool | Required = REQUIRED

    def read(self, value: object) -> bool:
        """The value as it is."""
        if not isinstance(value, bool):
            raise Refused("true or false")
        return value


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some words; None among them if it is the default."""

    words: tuple[str, ...]
    default: str | Required | None = REQUIRED

    def read(self, value: object) -> str | None:
        """The value as it is."""
        if value is None and self.default is None:
            return None
        if not isinstance(value, str) or value not in self.words:
            raise Refused(" or ".join(repr(word) for word in self.words))
        return value


@dataclass(frozen=True, slots=True)
class Several:
    """A list of so many numbers, each of its own kind."""

    items: tuple[Number, ...]
    default: tuple[float | None, ...]

    def read(self, value: object) -> tuple[float | None, ...]:
        """The numbers as a tuple."""
        try:
            if isinstance(value, list | tuple):
                found: list[object] = list(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
                pairs = zip(self.items, found, strict=True)
                return tuple([item.read(one) for item, one in pairs])
        except ValueError:  # too few, too many, or one of them is refused
            pass
        wanted = "; ".join(item.wanted for item in self.items)
        raise Refused(f"a list of {len(self.items)} ({wanted})")


@dataclass(frozen=True, slots=True)
class Many:
    """A list of any number of numbers of one kind."""

    item: Number
    default: Required = REQUIRED

    def read(self, value: object) -> tuple[float | None, ...]:
        """The numbers as a tuple."""
        wanted = f"a list of 1 to {_MOST_LISTED}, each {self.item.wanted}"
        if not isinstance(value, list | tuple):
            raise Refused(wanted)
        found: list[object] = list(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        if not 1 <= len(found) <= _MOST_LISTED:
            raise Refused(wanted)
        try:
            return tuple([self.item.read(one) for one in found])
        except Refused:
            raise Refused(wanted) from None


Setting: TypeAlias = Number | Flag | Choice | Several | Many


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Named things and what each takes.

    Attributes:
        what: The thing, in a word: ``optimizer``.
        entries: Settings by name, for each name.
        refused: Names that somebody may well send, and why they are not here.
        not_taken: So for settings; the rest of the sentence.
    """

    what: str
    entries: Mapping[str, Mapping[str, Setting]]
    refused: Mapping[str, str]
    not_taken: Mapping[str, str] = field(default_factory=dict[str, str])

    def read(self, name: str, settings: Mapping[str, object]) -> dict[str, Any]:
        """All settings of ``name``: those given, as the table wants them, and the defaults.

        Raises:
            InvalidRequest: Unknown name or setting, or a value that it cannot have.
        """
        takes = self.entries.get(name)
        if takes is None:
            known = ", ".join(self.entries)
            why = self.refused.get(name)
            said = f"The {self.what} {name[:60]!r} is not offered: {why}" if why else None
            raise InvalidRequest(
                f"{said or f'Unknown {self.what} {name[:60]!r}.'} This service has: {known}."
            )
        for key in settings:
            if key not in takes:
                why = self.not_taken.get(key)
                said = f", since {why}" if why else ""
                raise InvalidRequest(
                    f"The {self.what} {name!r} has no setting {key[:60]!r} here{said}; it takes: "
                    f"{', '.join(takes)}."
                )
        return {key: self._one(name, key, kind, settings) for key, kind in takes.items()}

    def _one(self, name: str, key: str, kind: Setting, settings: Mapping[str, object]) -> Any:
        if key not in settings:
            if isinstance(kind.default, Required):
                raise InvalidRequest(f"The {self.what} {name!r} needs the setting {key!r}.")
            return kind.default
        try:
            return kind.read(settings[key])
        except Refused as error:
            raise InvalidRequest(
                f"The setting {key!r} of the {self.what} {name!r} must be {error}, not "
                f"{str(settings[key])[:60]}."
            ) from None
