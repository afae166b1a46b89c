"""Messages of a conversation, checked and brought into the one form that chat templates read."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import orjson

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.types import Json

_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})
_MEDIA: Final = ("images", "videos", "audios")
_NO_MEDIA: Final = (
    "Templates here take text only; encode images with the model's processor and send them as "
    "input features."
)


def is_conversation(value: object) -> bool:
    """Whether it is a trajectory: an object with messages."""
    return isinstance(value, Mapping) and "messages" in value


def standard_messages(trajectory: Mapping[str, Any], *, default_system: str | None) -> list[Json]:
    """The messages with text content, parsed tool calls and thinking in a field of its own.

    Args:
        trajectory: With ``messages`` and maybe ``tools``.
        default_system: Put first if the conversation begins with a user's message.

    Raises:
        InvalidRequest: No list of messages, an unknown role, or a value of the wrong kind.
        NotSupported: Images, videos or audio.
    """
    if any(trajectory.get(name) for name in _MEDIA):
        raise NotSupported(_NO_MEDIA)
    given: Any = trajectory.get("messages")
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise InvalidRequest("A trajectory's messages are a list of at least one message.")
    messages = [_message(message) for message in cast(Sequence[object], given)]
    if default_system and messages[0]["role"] == "user":
        messages.insert(0, {"role": "system", "content": default_system})
    return messages


def standard_tools(trajectory: Mapping[str, Any]) -> list[Json]:
    """The tools that the conversation may use.

    Raises:
        InvalidRequest: No list of objects.
    """
    tools: Any = trajectory.get("tools") or []
    if isinstance(tools, str):
        tools = _parsed(tools, "tools")
    if not isinstance(tools, Sequence) or not all(
        isinstance(tool, Mapping) for tool in cast(Sequence[object], tools)
    ):
        raise InvalidRequest("A trajectory's tools are a list of objects.")
    return [cast(Json, listed(tool)) for tool in cast(Sequence[object], tools)]


def chosen_rounds(trajectory: Mapping[str, Any]) -> frozenset[int] | None:
    """Indices of the messages to train on, from ``user_data``'s ``key_rounds``; None is all.

    ``user_data`` is a list of pairs of a key and its value as JSON.
    """
    pairs: Any = trajectory.get("user_data")
    if not isinstance(pairs, Sequence) or isinstance(pairs, str):
        return None
    for pair in cast(Sequence[Any], pairs):
        if isinstance(pair, Sequence) and len(cast(Any, pair)) == 2 and pair[0] == "key_rounds":
            given = cast(Any, pair[1])
            rounds = _parsed(given, "key_rounds") if isinstance(given, str) else given
            if isinstance(rounds, Sequence) and rounds:
                return frozenset(r for r in cast(Sequence[Any], rounds) if isinstance(r, int))
    return None


def listed(value: Any) -> Any:
    """The same value with lists in place of tuples, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: listed(item) for key, item in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [listed(item) for item in cast(Sequence[Any], value)]
    return value


def _message(given: object) -> Json:
    if not isinstance(given, Mapping):
        raise InvalidRequest("A message is an object with role and content.")
    message: Json = listed(given)
    role = message.get("role")
    if role not in _ROLES:
        raise InvalidRequest(f"A message's role is one of {', '.join(sorted(_ROLES))}.")
    if any(message.get(name) for name in _MEDIA):
        raise NotSupported(_NO_MEDIA)
    message["content"] = _text(message.get("content"))
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"])
    if role == "assistant":
        _take_thinking_out(message)
    return message


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest("A message's content is a string or a list of text blocks.")
    texts: list[str] = []
    for block in cast(list[Any], content):
        if not isinstance(block, dict):
            raise InvalidRequest("A block of a message's content is an object.")
        fields = cast(Json, block)
        if fields.get("type", "text") != "text":
            raise NotSupported(f"A block of type {str(fields['type'])[:40]!r}: {_NO_MEDIA}")
        if not isinstance(fields.get("text"), str):
            raise InvalidRequest("A text block has its text as a string.")
        texts.append(cast(str, fields["text"]))
    return "".join(texts)


def _tool_calls(given: Any) -> list[Json]:
    if isinstance(given, str):
        given = _parsed(given, "tool_calls")
    if not isinstance(given, list):
        raise InvalidRequest("A message's tool_calls are a list.")
    calls: list[Json] = []
    for call in cast(list[Any], given):
        function: Any = cast(Json, call).get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(cast(Json, function).get("name"), str):
            raise InvalidRequest("A tool call has a function with name and arguments.")
        arguments: Any = cast(Json, function).get("arguments")
        if isinstance(arguments, str):
            arguments = _parsed(arguments, "arguments") if arguments.strip() else {}
        named: Json = {**cast(Json, function), "arguments": arguments or {}}
        calls.append({**cast(Json, call), "function": named})
    return calls


def _parsed(text: str, what: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The text given as {what} is no JSON: {error}") from error


def _take_thinking_out(message: Json) -> None:
    """``<think>...</think>`` at the start of an assistant's content becomes reasoning_content."""
    content: str = message["content"]
    if isinstance(message.get("reasoning_content"), str):
        return
    message.pop("reasoning_content", None)
    thinking, ended, rest = content.partition("</think>")
    if ended and (thinking.lstrip().startswith("<think>") or "<think>" not in content):
        message["reasoning_content"] = thinking.partition("<think>")[2] or thinking
        message["reasoning_content"] = message["reasoning_content"].strip("\n")
        message["content"] = rest.lstrip("\n")


def with_thinking_inside(message: Json) -> Json:
    """For chat templates that know no reasoning_content: the thinking as the content's start."""
    thinking: Any = message.get("reasoning_content")
    if not thinking:
        return message
    content = f"<think>\n{thinking}\n</think>\n\n{message['content']}"
    return {**message, "content": content, "reasoning_content": None}
