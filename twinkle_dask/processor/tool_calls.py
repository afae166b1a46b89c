"""Tool calls that a model has written as text, in the form of Hermes and Qwen.

``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, or inside it Qwen's
``<function=name><parameter=key>value</parameter></function>``. A last call whose end is missing is
read if it is complete otherwise.
"""

import re
from typing import Any, Final, cast

import orjson

from twinkle_dask.types import Json

_OPEN: Final = "<tool_call>"
_CLOSE: Final = "</tool_call>"
_FUNCTION: Final = re.compile(r"<function=([^<>]{1,256})>")
_PARAMETER: Final = re.compile(r"<parameter=([^<>]{1,256})>")


def parse_tool_calls(text: str) -> list[Json]:
    """The calls in a text, in OpenAI's form with ``arguments`` as an object; broken ones left out.

    Returns:
        ``{"type": "function", "function": {"name": ..., "arguments": {...}}}`` of each.
    """
    calls: list[Json] = []
    for block in _blocks(text):
        call = _tagged(block) or _json(block)
        if call is not None:
            name, arguments = call
            calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def without_tool_calls(text: str) -> str:
    """What a text says besides its calls."""
    kept: list[str] = []
    for position, part in enumerate(text.split(_OPEN)):
        kept.append(part if position == 0 else part.partition(_CLOSE)[2])
    return "".join(kept).rstrip()


def _blocks(text: str) -> list[str]:
    return [part.partition(_CLOSE)[0].strip() for part in text.split(_OPEN)[1:]]


def _json(block: str) -> tuple[str, Json] | None:
    call = _loaded(block)
    if not isinstance(call, dict):
        return None
    fields = cast(dict[str, Any], call)
    name = fields.get("name") or fields.get("tool_name")
    arguments = fields.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _loaded(arguments)
    if not isinstance(name, str) or not name:
        return None
    return name, cast(Json, arguments) if isinstance(arguments, dict) else {}


def _tagged(block: str) -> tuple[str, Json] | None:
    function = _FUNCTION.search(block)
    if function is None:
        return None
    body = block[function.end() :].partition("</function>")[0]
    arguments: Json = {}
    for parameter in _PARAMETER.finditer(body):
        text = body[parameter.end() :].partition("</parameter>")[0].strip()
        value = _loaded(text)
        arguments[parameter.group(1).strip()] = text if value is None and text != "null" else value
    return function.group(1).strip(), arguments


def _loaded(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
