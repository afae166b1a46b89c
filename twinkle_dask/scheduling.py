"""The order within one run, as a table of numbers: no I/O, no clock of its own.

The official client numbers a run's requests 1, 2, 3 and sends several before any is answered.
Parts of one call arrive out of order (the first part last), a request may be sent again, and a
number may never come at all because it was refused or failed in the client. So the rules are:

* An operation starts only after every lower number has started or is known never to come.
* A number that was refused is passed over at once. A number that just stays away is passed over
  when nothing has arrived for ``grace_s``, or ``patience_s`` while somebody is sending.
* A number that arrives after it was passed over is too late; the caller refuses it.
"""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from twinkle_dask.errors import OutOfOrder

Item = TypeVar("Item")


@dataclass(slots=True)
class RunOrder(Generic[Item]):
    """What waits in one run, and what may start.

    Attributes:
        next_seq: The lowest number that has neither started nor been passed over.
        grace_s: How long an absent number is waited for, in seconds.
        patience_s: The same while somebody is sending; an upload may stall for ever.
    """

    next_seq: int = 1
    grace_s: float = 2.0
    patience_s: float = 60.0
    _waiting: dict[int, Item] = field(default_factory=dict[int, Item])
    _refused: set[int] = field(default_factory=set[int])
    _last_change_s: float = 0.0

    def __len__(self) -> int:
        """Operations that wait."""
        return len(self._waiting)

    def free_seq(self) -> int:
        """The number for a request that came without one: behind everything known."""
        return max([self.next_seq - 1, *self._waiting, *self._refused]) + 1

    def knows(self, seq: int) -> bool:
        """Whether the number has had its turn or waits for it, so that it may be a repeat."""
        return seq < self.next_seq or seq in self._waiting

    def check(self, seq: int) -> None:
        """Refuse a number whose turn is over, or that is taken by a waiting operation.

        Raises:
            OutOfOrder: It can no longer start in order; carries the number expected.
        """
        if seq < self.next_seq or seq in self._waiting:
            raise OutOfOrder(
                f"Request number {seq} comes too late: the run has moved on and expects "
                f"{self.free_seq()}. Send it again as a new request.",
                self.free_seq(),
            )

    def add(self, seq: int, item: Item, now_s: float) -> None:
        """Let an operation wait for its turn. Call ``check`` first."""
        self.check(seq)
        self._refused.discard(seq)
        self._waiting[seq] = item
        self._last_change_s = now_s

    def refuse(self, seq: int, now_s: float) -> None:
        """The request with this number was refused, so nobody need wait for it."""
        if seq >= self.next_seq and seq not in self._waiting:
            self._refused.add(seq)
            self._last_change_s = now_s

    def take(self, now_s: float, *, sending: bool = False) -> list[tuple[int, Item]]:
        """Remove and return, in order, what may start now.

        Args:
            now_s: Any clock that only rises, the one used with ``add``.
            sending: Somebody is in the middle of sending a request, so absent numbers may come.
        """
        ready: list[tuple[int, Item]] = []
        while self._waiting:
            if self.next_seq in self._waiting:
                ready.append((self.next_seq, self._waiting.pop(self.next_seq)))
                self.next_seq += 1
            elif self.next_seq in self._refused:
                self._refused.discard(self.next_seq)
                self.next_seq += 1
            elif now_s - self._last_change_s >= (self.patience_s if sending else self.grace_s):
                self.next_seq = min(self._waiting)
                self._refused = {seq for seq in self._refused if seq > self.next_seq}
            else:
                break
        return ready

    def look_again_s(self, now_s: float) -> float | None:
        """Seconds until ``take`` may give more without anything new arriving; None if never."""
        if not self._waiting:
            return None
        return max(0.0, self._last_change_s + self.grace_s - now_s)
