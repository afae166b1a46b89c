"""A chat completion's body to a conversation and a way to draw."""

from typing import Any, Final, cast

from twinkle_dask.types import Json, SamplingParams, Stop
from twinkle_dask_gateway.openai.errors import WrongField
from twinkle_dask_gateway.openai.wire import ChatCompletionRequest

#: Fields that change nothing of an answer.
_HARMLESS: Final = frozenset(
    {
        "user",
        "metadata",
        "service_tier",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
#: Fields that may say what is the case anyway.
_DEFAULTS: Final[dict[str, tuple[Any, ...]]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "modalities": (["text"],),
}


def check_fields(body: ChatCompletionRequest) -> None:
    """Refuse what would be ignored.

    Raises:
        WrongField: A field asks for something that is not done, or is unknown.
    """
    for name, value in (body.model_extra or {}).items():
        if value is None or name in _HARMLESS or value in _DEFAULTS.get(name, ()):
            continue
        hint = "use repetition_penalty" if name.endswith("_penalty") else "leave it out"
        raise WrongField(f"{name[:60]!r} is not supported here with this value; {hint}.", name)
    choice = body.tool_choice
    if choice is not None and choice not in ("auto", "none"):
        raise WrongField("tool_choice can be 'auto' or 'none'.", "tool_choice")
    if body.top_logprobs and not body.logprobs:
        raise WrongField("top_logprobs needs logprobs.", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise WrongField("stream_options are for streams.", "stream_options")


def wants_calls(body: ChatCompletionRequest) -> bool:
    """Whether tool calls are to be read out of the answer."""
    return bool(body.tools) and body.tool_choice != "none"


def conversation(body: ChatCompletionRequest) -> Json:
    """The messages and tools in the form that templates take.

    Raises:
        WrongField: A message is none.
    """
    trajectory: Json = {
        "messages": [_message(one, place) for place, one in enumerate(body.messages)]
    }
    if wants_calls(body):
        trajectory["tools"] = body.tools
    return trajectory


def stops_of(body: ChatCompletionRequest) -> tuple[str, ...]:
    """The texts that end an answer."""
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def params_of(body: ChatCompletionRequest) -> SamplingParams:
    """How to draw.

    Raises:
        WrongField: There are two limits that differ, or the limit allows nothing.
    """
    limit = body.max_completion_tokens
    if limit is None:
        limit = body.max_tokens
    elif body.max_tokens is not None and body.max_tokens != limit:
        raise WrongField("Give max_completion_tokens alone.", "max_tokens")
    if limit is not None and limit < 1:
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        raise WrongField(f"{name} must be at least 1, not {limit}.", name)
    return SamplingParams(
        max_tokens=limit,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=-1 if body.top_k is None else body.top_k,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        seed=None if body.seed is None else body.seed % 2**63,
        stop=Stop(strings=stops_of(body)),
    )


def _message(message: Json, place: int) -> Json:
    where = f"messages[{place}]"
    role = message.get("role")
    if role == "developer":
        role = "system"
    if role not in ("system", "user", "assistant", "tool"):
        raise WrongField(
            f"{where} must have a role: system, user, assistant or tool.", f"{where}.role"
        )
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    elif isinstance(content, list):
        content = "".join(_text(part, where) for part in cast(list[Any], content))
    if not isinstance(content, str):
        raise WrongField(f"{where} must have a content of text.", f"{where}.content")
    return {**message, "role": role, "content": content}


def _text(part: Any, where: str) -> str:
    if isinstance(part, dict):
        fields = cast(Json, part)
        text = fields.get("text")
        if fields.get("type") == "text" and isinstance(text, str):
            return text
    raise WrongField(f"{where}: only parts of text can be read here.", f"{where}.content")
