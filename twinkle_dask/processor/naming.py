"""Names that clients send, looked up in closed tables."""

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.types import Json

Model = TypeVar("Model", bound=BaseModel)
Value = TypeVar("Value")

_PLUGIN_SCHEMES = ("ms://", "hf://")


def refuse_plugin(name: str) -> None:
    """Refuse the id of code on a hub.

    Raises:
        NotSupported: It is one.
    """
    if name.startswith(_PLUGIN_SCHEMES):
        raise NotSupported(
            f"{name[:100]!r} names code on a hub; this server runs no code of its clients. Use one "
            "of the built-in names."
        )


def looked_up(table: Mapping[str, Value], what: str, name: str) -> Value:
    """The entry of a name.

    Raises:
        InvalidRequest: There is none; the message lists the names.
        NotSupported: It is the id of a plugin.
    """
    refuse_plugin(name)
    value = table.get(name)
    if value is None:
        raise InvalidRequest(f"There is no {what} {name[:60]!r}; there is {', '.join(table)}.")
    return value


def known(table: Mapping[str, type[Model]], what: str, name: str, arguments: Json) -> Model:
    """The entry of a name, made with arguments.

    Raises:
        InvalidRequest: Unknown name or arguments.
        NotSupported: It is the id of a plugin.
    """
    return checked(looked_up(table, what, name), f"{name}", arguments)


def checked(model: type[Model], where: str, arguments: Json) -> Model:
    """Arguments read by their names and types.

    Raises:
        InvalidRequest: One is unknown, missing or of another type.
    """
    try:
        return model.model_validate(arguments)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = ".".join(str(part) for part in problem["loc"]) or "the arguments"
        if problem["type"] == "extra_forbidden":
            fields = ", ".join(f.alias or n for n, f in model.model_fields.items()) or "none"
            raise InvalidRequest(
                f"{where} has no argument {name[:60]!r}; it takes {fields}."
            ) from None
        if problem["type"] == "missing":
            raise InvalidRequest(f"{where} needs the argument {name!r}.") from None
        said = problem["msg"].removeprefix("Value error, ")
        raise InvalidRequest(f"{where}, argument {name[:60]!r}: {said}.") from None
