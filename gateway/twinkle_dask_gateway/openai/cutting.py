"""Text that ends before a stop text, as it comes."""

from collections.abc import Sequence


class Cut:
    """Passes text on until one of ``stops`` has come, which is left out with all after it.

    What could still become the beginning of one is held back until it is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held: str = ""
        self.ended = False

    def add(self, text: str) -> str:
        """What can be told now."""
        if self.ended:
            return ""
        text = self._held + text
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.ended = True
            self._held = ""
            return text[: min(ends)]
        keep = max((self._beginning(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, at the end."""
        rest = self._held
        self._held = ""
        return rest

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """How much of the text's end is how ``stop`` begins."""
        most = min(len(text), len(stop) - 1)
        return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
