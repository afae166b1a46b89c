"""When a sequence ends: stop tokens, end of sequence, stop strings, length."""

from collections.abc import Sequence
from typing import Any

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import Stop, StopReason

# A character is at most four bytes of UTF-8, so four tokens that still end in half a character
# hold bytes that are no text.
_LONGEST_CHARACTER = 4
_HALF_A_CHARACTER = "\ufffd"
_CONTEXT_TOKENS = 4


class StopRule:
    """Decides after each token of one sequence whether it was the last."""

    def __init__(
        self,
        stop: Stop,
        *,
        max_tokens: int,
        end_of_sequence_ids: Sequence[int],
        prompt: Sequence[int],
        tokenizer: Any | None,
    ) -> None:
        """Make the rule of one sequence.

        Args:
            stop: What the request asks for.
            max_tokens: At least 1.
            end_of_sequence_ids: The model's own.
            prompt: Its last tokens are context for the text of the first generated ones.
            tokenizer: The Hugging Face tokenizer; needed for stop strings only.

        Raises:
            InvalidRequest: Stop strings without a tokenizer, or an empty one.
        """
        self._left = max_tokens
        self._tokens = frozenset(stop.tokens)
        if stop.end_of_sequence:
            self._tokens |= frozenset(end_of_sequence_ids)
        self._text: TextWatch | None = None
        if stop.strings:
            if tokenizer is None:
                raise InvalidRequest(
                    "This model has no tokenizer, so it cannot stop at strings; give token ids."
                )
            if "" in stop.strings:
                raise InvalidRequest("A stop string must not be empty.")
            self._text = TextWatch(tokenizer, stop.strings, prompt)

    @property
    def tokens_left(self) -> int:
        """How many more tokens the sequence may get."""
        return self._left

    def after(self, token: int) -> StopReason | None:
        """Note a token, which belongs to the sequence in any case; None means go on."""
        self._left -= 1
        if token in self._tokens or (self._text is not None and self._text.completes(token)):
            return StopReason.STOP
        return StopReason.LENGTH if self._left <= 0 else None


class TextWatch:
    """Turns tokens into text as they come and looks for strings in it.

    A token's text depends on its neighbours (half characters, spaces in front of words), so each
    new piece is the difference of two short decodings that begin at the same earlier token. Only
    as much text is kept as a string could still begin in; the prompt's text does not count.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], prompt: Sequence[int]) -> None:
        self._decode = tokenizer.decode
        self._strings = tuple(strings)
        self._keep = max(len(string) for string in strings) - 1
        self._tail = ""
        # tokens[:read] are in the tail; decoding starts at the token before them, as context.
        self._tokens = list(prompt[-_CONTEXT_TOKENS:])
        self._before = self._text_of(self._tokens)
        if self._before.endswith(_HALF_A_CHARACTER):
            self._tokens, self._before = [], ""
        self._read = len(self._tokens)

    def completes(self, token: int) -> bool:
        """Add a token; whether one of the strings is in the text now."""
        self._tokens.append(token)
        text = self._text_of(self._tokens)
        new = text[len(self._before) :]
        whole = new.rstrip(_HALF_A_CHARACTER)
        seen = self._tail + whole
        if any(string in seen for string in self._strings):
            return True
        if whole == new or len(self._tokens) - self._read >= _LONGEST_CHARACTER:
            seen = self._tail + new
            self._tail = seen[len(seen) - self._keep :] if len(seen) > self._keep else seen
            self._tokens = self._tokens[self._read :]
            self._read = len(self._tokens)
            self._before = self._text_of(self._tokens)
        return False

    def _text_of(self, tokens: list[int]) -> str:
        text: str = self._decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text
