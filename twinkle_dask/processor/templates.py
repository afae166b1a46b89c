"""From trajectories (messages, tools) to features (tokens, labels) and back. Pure.

A *feature* is the trajectory with ``input_ids``, ``labels``, ``attention_mask``, ``position_ids``
and ``length`` added. Labels are shifted: ``labels[i]`` is what position i has to predict, that is
token i + 1 where an assistant wrote it, else -100; the last one is -100.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final, cast

from twinkle_dask import packing
from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.processor.labelling import (
    IGNORED,
    Chat,
    encode_prompt,
    encode_turns,
    plain_tokens,
)
from twinkle_dask.processor.messages import (
    chosen_rounds,
    is_conversation,
    listed,
    standard_messages,
    standard_tools,
)
from twinkle_dask.processor.tool_calls import parse_tool_calls, without_tool_calls
from twinkle_dask.types import Json


class Truncation(StrEnum):
    """What becomes of a trajectory with more tokens than ``max_length``.

    ``LEFT`` and ``RIGHT`` cut that side off, ``SPLIT`` makes several features of it, ``DELETE``
    leaves it out.
    """

    RAISE = "raise"
    LEFT = "left"
    RIGHT = "right"
    SPLIT = "split"
    DELETE = "delete"


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateSpec:
    """How messages become tokens.

    Attributes:
        cls: Name in the protocol: one of ``CLASSES``.
        max_length: Most tokens of a feature; None is no bound.
        truncation_strategy: What becomes of longer ones.
        enable_thinking: Told to the model's chat template.
        default_system: Put before conversations that begin with a user's message.
        use_chat_template: Without, a trajectory is one user's message, encoded as plain text.
    """

    cls: str = "Template"
    max_length: int | None = 8192
    truncation_strategy: Truncation = Truncation.RAISE
    enable_thinking: bool = True
    default_system: str | None = None
    use_chat_template: bool = True


packing.register(TemplateSpec, Truncation)

#: Both use the chat template that the model comes with.
CLASSES: Final = ("Template", "Qwen3_5Template")
_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "max_length": (int, type(None)),
    "truncation_strategy": (str,),
    "enable_thinking": (bool,),
    "default_system": (str, type(None)),
    "use_chat_template": (bool,),
}


def template_spec(cls: str, arguments: Mapping[str, Any], *, base_model: str) -> TemplateSpec:
    """What a client has named.

    Args:
        cls: The template's class name.
        arguments: Of its constructor, as the client sent them.
        base_model: The one that the template is set for.

    Raises:
        InvalidRequest: An unknown name, or a value of the wrong kind.
        NotSupported: The tokenizer of another model, or a class that is known and not here.
    """
    if cls not in CLASSES:
        known = ", ".join(CLASSES)
        if cls == "DeepseekV4Template":
            raise NotSupported(f"DeepseekV4Template is not supported; there are {known}.")
        raise InvalidRequest(f"There is no template {cls[:80]!r}; there are {known}.")
    given = dict(arguments)
    model = given.pop("model_id", None)
    if model is not None and str(model).removeprefix("ms://").removeprefix("hf://") != base_model:
        raise NotSupported(f"A template for {base_model!r} uses that model's tokenizer, no other.")
    for name, value in given.items():
        kinds = _KINDS.get(name)
        if kinds is None:
            known = ", ".join(_KINDS)
            raise InvalidRequest(f"Templates take no {name[:80]!r}; they take {known}.")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise InvalidRequest(f"A template's {name} cannot be {str(value)[:80]!r}.")
    strategy = given.pop("truncation_strategy", Truncation.RAISE)
    if strategy not in list(Truncation):
        known = ", ".join(Truncation)
        raise InvalidRequest(
            f"There is no truncation_strategy {strategy[:80]!r}; there is {known}."
        )
    max_length = given.get("max_length")
    if max_length is not None and max_length < 1:
        raise InvalidRequest("A template's max_length is at least 1.")
    return TemplateSpec(cls=cls, truncation_strategy=Truncation(strategy), **given)


def encode(
    tokenizer: Any,
    spec: TemplateSpec,
    trajectories: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
) -> list[Json]:
    """Make features of trajectories, in their order.

    An element without messages may hold trajectories under its keys (``chosen``, ``rejected``);
    each of them then becomes a feature under its key.

    Args:
        tokenizer: Of Hugging Face; nothing of it is changed.
        spec: How.
        trajectories: As they came; they are not changed.
        add_generation_prompt: For sampling: end with what precedes an answer, and label nothing.

    Returns:
        As many as there are trajectories; more with ``SPLIT``, fewer with ``DELETE``.

    Raises:
        InvalidRequest: What is wrong with which trajectory, or that it is too long (``RAISE``).
        NotSupported: Something that this model's chat template cannot say.
    """
    features: list[Json] = []
    for position, trajectory in enumerate(trajectories):
        try:
            features += _encode_element(tokenizer, spec, trajectory, add_generation_prompt)
        except (InvalidRequest, NotSupported) as error:
            raise type(error)(f"Trajectory {position}: {error.message}") from error
    return features


def continued(
    tokenizer: Any, feature: Mapping[str, Any], tokens: Sequence[int], *, labelled: bool = True
) -> tuple[str, Json]:
    """A prompt's feature with what was sampled after it, ready to be trained on.

    Nothing is cut off, whatever the template says of lengths: labels stay one to one with the
    sampled tokens.

    Args:
        tokenizer: Of Hugging Face.
        feature: Of the prompt; may lack labels. Its messages get the answer, if it has messages.
        tokens: That were sampled.
        labelled: Whether the new positions are to be trained on.

    Returns:
        The tokens as text with special tokens, and the new feature.
    """
    new = {key: listed(value) for key, value in feature.items()}
    before: list[int] = list(new["input_ids"])
    sampled = [int(token) for token in tokens]
    labels: list[int] = list(new.get("labels") or [IGNORED] * len(before))
    if len(labels) != len(before):
        raise InvalidRequest(
            f"A feature has {len(labels)} labels for {len(before)} input_ids; give one for each."
        )
    learnt = sampled if labelled else [IGNORED] * len(sampled)
    if sampled:
        # The prompt's last label was for what came next, which is known only now.
        labels = [*labels[:-1], *learnt, IGNORED] if before else [*learnt[1:], IGNORED]
    new |= _fields([*before, *sampled], labels)
    messages: Any = new.get("messages")
    if isinstance(messages, list):
        answer = decode(tokenizer, [sampled], skip_special_tokens=True)[0]
        message: Json = {"role": "assistant", "content": answer}
        if calls := parse_tool_calls(answer):
            message |= {"content": without_tool_calls(answer), "tool_calls": calls}
        new["messages"] = [*cast(list[Any], messages), message]
    return decode(tokenizer, [sampled])[0], new


def decode(
    tokenizer: Any, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool = False
) -> list[str]:
    """Tokens as text.

    Raises:
        InvalidRequest: A number that is no token.
    """
    if any(not 0 <= int(token) < 2**31 for row in rows for token in row):
        raise InvalidRequest("Tokens are integers from 0.")
    return [
        tokenizer.decode([int(token) for token in row], skip_special_tokens=skip_special_tokens)
        for row in rows
    ]


def truncated(
    spec: TemplateSpec, tokens: list[int], labels: list[int]
) -> list[tuple[list[int], list[int]]]:
    """Apply a template's ``max_length`` to a row. Labels are not shifted yet.

    Raises:
        InvalidRequest: It is too long, and the strategy is ``RAISE``.
    """
    most = spec.max_length
    if most is None or len(tokens) <= most:
        return [(tokens, labels)]
    match spec.truncation_strategy:
        case Truncation.RAISE:
            raise InvalidRequest(
                f"It has {len(tokens)} tokens, which is more than the template's max_length of "
                f"{most}. Shorten it, or set another truncation_strategy."
            )
        case Truncation.LEFT:
            return [(tokens[-most:], labels[-most:])]
        case Truncation.RIGHT:
            return [(tokens[:most], labels[:most])]
        case Truncation.SPLIT:
            starts = range(0, len(tokens), most)
            return [(tokens[i : i + most], labels[i : i + most]) for i in starts]
        case Truncation.DELETE:
            return []


def _encode_element(
    tokenizer: Any, spec: TemplateSpec, element: Mapping[str, Any], prompt: bool
) -> list[Json]:
    if is_conversation(element):
        return _encode_one(tokenizer, spec, element, prompt)
    inner = {key: value for key, value in element.items() if is_conversation(value)}
    if not inner:
        raise InvalidRequest("It has no messages.")
    if spec.truncation_strategy is Truncation.SPLIT:
        # Pieces of two trajectories would be no pairs.
        spec = replace(spec, truncation_strategy=Truncation.RAISE)
    encoded = {key: _encode_one(tokenizer, spec, value, prompt) for key, value in inner.items()}
    if not all(encoded.values()):
        return []
    return [{**listed(element), **{key: features[0] for key, features in encoded.items()}}]


def _encode_one(
    tokenizer: Any, spec: TemplateSpec, trajectory: Mapping[str, Any], prompt: bool
) -> list[Json]:
    system = spec.default_system if spec.use_chat_template else None
    messages = standard_messages(trajectory, default_system=system)
    if not spec.use_chat_template:
        tokens = plain_tokens(tokenizer, messages)
        labels = [IGNORED] * len(tokens) if prompt else list(tokens)
    else:
        chat = Chat(tokenizer, standard_tools(trajectory), thinking=spec.enable_thinking)
        if prompt:
            tokens = encode_prompt(tokenizer, chat, messages)
            labels = [IGNORED] * len(tokens)
        else:
            only = chosen_rounds(trajectory)
            if only is not None and len(messages) > len(trajectory["messages"]):
                only = {index + 1 for index in only}  # they were counted without our system message
            tokens, labels = encode_turns(tokenizer, chat, messages, only)
    if not tokens:
        raise InvalidRequest("It has no tokens.")
    kept = {key: listed(value) for key, value in trajectory.items()} | {"messages": messages}
    return [
        kept | _fields(piece, [*piece_labels[1:], IGNORED])
        for piece, piece_labels in truncated(spec, tokens, labels)
    ]


def _fields(tokens: list[int], labels: list[int]) -> Json:
    return {
        "input_ids": tokens,
        "labels": labels,
        "attention_mask": [1] * len(tokens),
        "position_ids": list(range(len(tokens))),
        "length": len(tokens),
    }
