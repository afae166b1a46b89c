"""``InputProcessor``: how rows become a batch, which is the server's own affair here."""

from typing import Any, Final

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.operations.adapter_settings import Named
from twinkle_dask.types import Json

#: Values by argument. All of them give the same numbers: rows of any length share a pass without
#: padding, whichever side a client would put it.
_TAKEN: Final[dict[str, tuple[Any, ...]]] = {
    "padding_side": ("right", "left"),
    "padding_free": (True, False),
    "framework": ("transformers",),
    "device_mesh": (None,),
}


def processor_of(name: str, arguments: Json) -> Named:
    """A processor as a client names it.

    Raises:
        InvalidRequest: Another class, or an unknown argument or value.
        NotSupported: Megatron's.
    """
    if name != "InputProcessor":
        raise InvalidRequest(f"Unknown processor {name[:60]!r}. This service has: InputProcessor.")
    for key, value in arguments.items():
        values = _TAKEN.get(key)
        if values is None:
            raise InvalidRequest(
                f"InputProcessor has no argument {key[:60]!r} here; it takes: {', '.join(_TAKEN)}."
            )
        if key == "framework" and value == "megatron":
            raise NotSupported("Megatron is not offered; leave framework at 'transformers'.")
        if not any(value is one or (isinstance(one, str) and value == one) for one in values):
            raise InvalidRequest(
                f"InputProcessor's {key} must be {' or '.join(repr(one) for one in values)}, not "
                f"{str(value)[:60]!r}."
            )
    return Named(name=name, settings=arguments)
