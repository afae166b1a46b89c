"""From the rows whose turn it is to passes over the model: what is computed together, and first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from twinkle_dask.trainer.batch import length_groups
from twinkle_dask.trainer.queues import Pick, RunQueues
from twinkle_dask.trainer.work import Work


@dataclass(frozen=True, slots=True)
class PlannedPass:
    """Rows that are computed together."""

    picks: Sequence[Pick]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatches:
    """Cuts micro-batches into passes.

    Attributes:
        tokens: Most tokens of a micro-batch.
        pass_tokens: What one more pass costs, in tokens.
        packed: Rows of any lengths share a pass without padding.
        alone: Each micro-batch holds rows of one work only.
        gradient_bytes: Most bytes of gradients in the making, over the works of a micro-batch.
    """

    tokens: int
    pass_tokens: int
    packed: bool
    alone: bool
    gradient_bytes: int

    def next(self, queues: RunQueues, bytes_of: Callable[[Work], int]) -> list[PlannedPass]:
        """Take the next micro-batch out of the queues; its passes, in the order to compute them.

        Args:
            queues: Give up the rows.
            bytes_of: What a work's gradients take while it is computed.
        """
        passes: list[PlannedPass] = []
        batch = queues.next_batch(
            self.tokens, alone=self.alone, bytes_of=bytes_of, most_bytes=self.gradient_bytes
        )
        for picks in self._by_kind(batch):
            for now in self._small_first(picks):
                passes += [PlannedPass(now)] if self.packed else self._by_length(now)
        return passes

    def _by_kind(self, picks: Sequence[Pick]) -> list[Sequence[Pick]]:
        """Rows that learn and rows that do not: the latter would pay for a backward they need not.

        A few of them ride along, since a pass of their own costs more.
        """
        learning = [pick for pick in picks if pick.body.backward]
        others = [pick for pick in picks if not pick.body.backward]
        if not learning or not others:
            return [picks] if picks else []
        if sum(map(_num_tokens, others)) <= self.pass_tokens:
            return [picks]
        return [others, learning]

    def _small_first(self, picks: Sequence[Pick]) -> list[Sequence[Pick]]:
        """Works that end with this micro-batch go first, with a little of the others to fill up.

        So a small step beside somebody's endless batch takes a small pass, not a full one.
        """
        ending = [pick for pick in picks if pick.last]
        going_on = [pick for pick in picks if not pick.last]
        if not ending or not going_on:
            return [picks]
        room = max(sum(map(_num_tokens, ending)), 2 * self.pass_tokens)
        fill: list[Pick] = []
        rest: list[Pick] = []
        for pick in going_on:
            fits = 0
            for row in pick.rows:
                room -= pick.body.length_of(row)
                if room < 0:
                    break
                fits += 1
            if fits:
                fill.append(replace(pick, rows=pick.rows[:fits]))
            if fits < len(pick.rows):
                rest.append(replace(pick, rows=pick.rows[fits:]))
        return [[*ending, *fill], rest] if rest else [picks]

    def _by_length(self, picks: Sequence[Pick]) -> list[PlannedPass]:
        rows = [(pick, row) for pick in picks for row in pick.rows]
        rows.sort(key=lambda of: of[0].body.length_of(of[1]), reverse=True)
        lengths = [pick.body.length_of(row) for pick, row in rows]
        passes: list[PlannedPass] = []
        for group in length_groups(lengths, self.pass_tokens):
            chosen: dict[str, list[int]] = {}
            for pick, row in rows[group]:
                chosen.setdefault(pick.work.id, []).append(row)
            passes.append(
                PlannedPass(
                    [
                        replace(pick, rows=tuple(chosen[pick.work.id]))
                        for pick in picks
                        if pick.work.id in chosen
                    ]
                )
            )
        return passes


def _num_tokens(pick: Pick) -> int:
    return sum(pick.body.length_of(row) for row in pick.rows)
