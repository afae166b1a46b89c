"""A conversation as tokens, and which of them an assistant wrote.

Of chat templates that mark what is generated, the marks are used. With others a turn begins where
the prompt for it ends, and ends where the conversation up to it ends. Some templates write a turn
otherwise once others follow (Qwen3 leaves its thinking out), so that neither of the two is a
beginning of the whole; then the turn is found by writing the whole with another content in its
place and comparing. That is done on the text; tokens follow by their places in it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import jinja2

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.processor.messages import with_thinking_inside
from twinkle_dask.types import Json

IGNORED: Final = -100

#: Begins and ends with characters that no text uses, so that nothing is alike with a real content.
_OTHER_CONTENT: Final = "\ue0f0other\ue0f1"
#: What templates, which are programs, fail with on messages that they do not expect.
_FAILURES: Final = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    RecursionError,
)

Render = Callable[[Sequence[Json], bool], str]


class Chat:
    """Renders conversations with a model's own chat template, in transformers' sandbox.

    Args:
        tokenizer: Of Hugging Face.
        tools: That the conversation may use.
        thinking: Told to the template as ``enable_thinking``.

    Raises:
        NotSupported: The model has no chat template, or it does not take tools.
    """

    def __init__(self, tokenizer: Any, tools: Sequence[Json], *, thinking: bool) -> None:
        if not tokenizer.chat_template:
            raise NotSupported(
                "This model has no chat template; set use_chat_template=False for plain text, or "
                "send tokens (input_ids)."
            )
        self._tokenizer = tokenizer
        self._tools = list(tools) or None
        self._thinking = thinking
        self._source: str = tokenizer.get_chat_template(tools=self._tools)
        if self._tools and "tools" not in self._source:
            raise NotSupported(
                "This model's chat template does not take tools; describe them in a system message."
            )
        self.marks_generated = "generation" in self._source and "endgeneration" in self._source

    def prepared(self, messages: Sequence[Json]) -> list[Json]:
        """The messages with nothing in them that the template would leave out silently.

        Raises:
            NotSupported: Tool calls that it does not write.
        """
        if "tool_calls" not in self._source and any(m.get("tool_calls") for m in messages):
            raise NotSupported(
                "This model's chat template does not write tool_calls; write them into the "
                "messages' content."
            )
        if "reasoning_content" in self._source:
            return list(messages)
        return [with_thinking_inside(message) for message in messages]

    def text(self, messages: Sequence[Json], prompt: bool) -> str:
        """The conversation as text.

        Args:
            messages: As ``prepared`` gives them.
            prompt: Also write what precedes an assistant's answer.
        """
        return self._apply(messages, add_generation_prompt=prompt, tokenize=False)

    def marked(self, messages: Sequence[Json]) -> tuple[list[int], list[bool]]:
        """Tokens, and which of them the template marks as generated."""
        encoded: Mapping[str, Any] = self._apply(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]

    def _apply(self, messages: Sequence[Json], **arguments: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tools=self._tools, enable_thinking=self._thinking, **arguments
            )
        except _FAILURES as error:
            raise InvalidRequest(
                f"The model's chat template does not take these messages: {str(error)[:300]}"
            ) from error


def encode_prompt(tokenizer: Any, chat: Chat, messages: Sequence[Json]) -> list[int]:
    """Tokens of a conversation and of what precedes the answer to it."""
    return _tokens(tokenizer, chat.text(chat.prepared(messages), True))


def encode_turns(
    tokenizer: Any, chat: Chat, messages: Sequence[Json], only: Collection[int] | None
) -> tuple[list[int], list[int]]:
    """Tokens of a whole conversation, and labels where an assistant speaks.

    Args:
        tokenizer: Of Hugging Face.
        chat: Renders for it.
        messages: In standard form.
        only: Indices of the messages to learn from; None is every assistant's.

    Returns:
        Tokens, and as many labels, not shifted: the token itself, or -100.
    """
    messages = chat.prepared(messages)
    if chat.marks_generated and only is None:
        tokens, marks = chat.marked(messages)
        if any(marks):
            pairs = zip(tokens, marks, strict=True)
            return tokens, [token if mark else IGNORED for token, mark in pairs]
    if not tokenizer.is_fast:
        raise NotSupported(
            "This model's tokenizer does not tell where its tokens stand in the text; encode the "
            "messages yourself and send tokens (input_ids)."
        )
    whole = chat.text(messages, False)
    spans = [
        turn_span(chat.text, messages, index, whole)
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and (only is None or index in only)
    ]
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens: list[int] = list(encoded["input_ids"])
    labels = [IGNORED] * len(tokens)
    at = 0
    for position, (start, stop) in enumerate(encoded["offset_mapping"]):
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        if at < len(spans) and stop > start >= spans[at][0]:
            labels[position] = tokens[position]
    return tokens, labels


def turn_span(render: Render, messages: Sequence[Json], index: int, whole: str) -> tuple[int, int]:
    """Where an assistant's turn stands in the text of the whole conversation.

    Args:
        render: Messages, and whether to add the prompt for an answer, to text.
        messages: The whole conversation.
        index: Of the assistant's message.
        whole: The text of all messages.

    Returns:
        From the end of the prompt for it to the end of its last mark, as places in ``whole``.
    """
    before = render(messages[:index], True)
    up_to = render(messages[: index + 1], False)
    if whole.startswith(before) and whole.startswith(up_to) and len(before) <= len(up_to):
        return len(before), len(up_to)
    other = {**messages[index], "content": _OTHER_CONTENT}
    whole_with_other = render([*messages[:index], other, *messages[index + 1 :]], False)
    up_to_with_other = render([*messages[:index], other], False)
    start = min(_common_start(whole, before), _common_start(whole, whole_with_other))
    after = _common_end(whole, whole_with_other)
    own_end = _common_end(up_to, up_to_with_other)
    return start, max(start, len(whole) - after + min(own_end, after))


def plain_tokens(tokenizer: Any, messages: Sequence[Json]) -> list[int]:
    """Tokens of the one message of a conversation that uses no chat template.

    Raises:
        InvalidRequest: There are several messages, or it is not a user's.
    """
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise InvalidRequest("Without a chat template a trajectory is one message of a user.")
    return list(tokenizer(messages[0]["content"], verbose=False)["input_ids"])


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _common_start(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _common_end(one: str, other: str) -> int:
    return _common_start(one[::-1], other[::-1])
