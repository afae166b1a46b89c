"""The text of a sequence as it grows, for whoever reads along."""

from collections.abc import Sequence
from typing import Any

# A character is at most four bytes of UTF-8; see ``stopping``.
_LONGEST_CHARACTER = 4
_HALF_A_CHARACTER = "\ufffd"
_CONTEXT_TOKENS = 4


class TextStream:
    """What each token adds to the text of one sequence; special tokens add nothing.

    A token's text depends on its neighbours, so each new piece is the difference of two short
    decodings that begin at the same earlier token. A token that ends in half a character adds
    nothing; the whole character comes with a later one.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        """``prompt``: its last tokens are context for the first ones that are drawn."""
        self._decode = tokenizer.decode
        self._tokens = list(prompt[-_CONTEXT_TOKENS:])
        self._before = self._text()
        if self._before.endswith(_HALF_A_CHARACTER):
            self._tokens, self._before = [], ""
        # tokens[:read] have given their text; decoding starts at the token before the new ones.
        self._read = len(self._tokens)

    def add(self, token: int) -> str:
        """The text that is whole with this token and was not before."""
        self._tokens.append(token)
        text = self._text()
        new = text[len(self._before) :]
        too_long = len(self._tokens) - self._read >= _LONGEST_CHARACTER
        if new.endswith(_HALF_A_CHARACTER) and not too_long:
            return ""
        self._tokens = self._tokens[self._read :]
        self._read = len(self._tokens)
        self._before = self._text()
        return new

    def _text(self) -> str:
        text: str = self._decode(
            self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
