"""What a setting may be: checks that say in words what they want, and defaults."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import Json

Check = Callable[[Any], str | None]
"""Says what a value should be, or None if it is fine."""

_LARGEST: Final = sys.float_info.max
_LARGEST_WHOLE: Final = 2**53


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """``default`` is None where a value must be given, or where None is one."""

    default: Any
    check: Check
    needed: bool = False


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Check:
    """A finite number from ``low`` to ``high``, or above ``low``."""
    if high < math.inf:
        wanted = f"a number from {low:g} to {high:g}"
    elif low > -math.inf:
        wanted = f"a finite number {'above' if above else 'of at least'} {low:g}"
    else:
        wanted = "a finite number"

    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return wanted
        inside = low < value if above else low <= value
        # Whole numbers have no bound of their own, and some are no floats.
        return None if inside and value <= high and abs(value) <= _LARGEST else wanted

    return check


def whole(low: int | None = None) -> Check:
    """A whole number of at least ``low``."""
    wanted = "a whole number" if low is None else f"a whole number of at least {low}"

    def check(value: Any) -> str | None:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        inside = is_whole and abs(value) <= _LARGEST_WHOLE and (low is None or value >= low)
        return None if inside else wanted

    return check


def or_none(inner: Check) -> Check:
    """That, or nothing."""

    def check(value: Any) -> str | None:
        return None if value is None else (wanted := inner(value)) and f"{wanted}, or nothing"

    return check


def flag(value: Any) -> str | None:
    """A truth value."""
    return None if isinstance(value, bool) else "true or false"


def one_of(*words: str) -> Check:
    """One of a few words."""

    def check(value: Any) -> str | None:
        return None if isinstance(value, str) and value in words else "one of " + ", ".join(words)

    return check


def filled(what: str, takes: Mapping[str, Setting], given: Mapping[str, Any]) -> Json:
    """Every setting, with its default where it is not given.

    Raises:
        InvalidRequest: Unknown setting, a needed one is missing, or a value makes no sense.
    """
    if unknown := sorted(given.keys() - takes.keys()):
        names = ", ".join(sorted(takes)) or "no settings"
        raise InvalidRequest(f"{what} has no setting {unknown[0][:60]!r}; it takes: {names}.")
    values: Json = {}
    for name, setting in takes.items():
        if name not in given:
            if setting.needed:
                raise InvalidRequest(f"{what} needs {name!r}: {setting.check(None)}.")
            values[name] = setting.default
            continue
        values[name] = given[name]
        if (wanted := setting.check(values[name])) is not None:
            shown = str(values[name])[:60]
            raise InvalidRequest(f"Setting {name!r} of {what} must be {wanted}, not {shown!r}.")
    return values
