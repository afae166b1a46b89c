"""Training with losses by class name, which need a batch as a whole.

The core adds up gradients of losses that are sums over tokens; a loss like DPO is none. So a batch
goes through the model twice: a forward gives the scores, ``twinkle_dask.batch_losses`` gives the
loss and its slopes by them, and a ``forward_backward`` with a linear loss of these slopes adds the
gradient, which is exact because a loss enters the chain rule by its slopes alone. Where they do
not depend on the scores (cross entropy), or where a loss of the core has the same ones (GRPO), one
pass does. Every pass is an ordinary operation of the run: acknowledged, journaled, replayed.
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import numpy as np

from twinkle_dask.batch_losses import (
    BatchLossSpec,
    contrast,
)
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.prepared_batches import (
    INLINE_TOKENS,
    BatchResult,
    BatchRow,
    PreparedBatch,
    has_many_values,
    prepare,
)
from twinkle_dask.operations.runs import Runs
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.operations.training import Training
from twinkle_dask.operations.values import Tenant
from twinkle_dask.types import (
    Embed,
    EmbedResult,
    Float32Array,
    ForwardBackward,
    ForwardBackwardResult,
    Int32Array,
    Json,
    LoraSpec,
    LossName,
    LossSpec,
    RunId,
)

_PLAIN = LossSpec(name=LossName.CROSS_ENTROPY)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRow:
    """One row to embed.

    Attributes:
        tokens: int32 (N,).
        label: 1 begins a group (the anchor), 0 goes on with it (its positive, then negatives).
    """

    tokens: Int32Array
    label: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedBatchResult:
    """``embeddings``: float32 (S, D), of length 1 each; ``loss``: None without one."""

    embeddings: Float32Array
    loss: float | None = None
    num_counted: float = 0.0


class BatchTraining:
    """Passes over whole batches. Each call waits until its work is done.

    Two calls for one run that have a gradient do not overlap; whoever takes a step between two
    passes of a call (through another connection) has it computed with slopes of before.
    """

    def __init__(
        self, runs: Runs, training: Training, catalogue: Catalogue, tickets: TicketBoard
    ) -> None:
        self._runs = runs
        self._training = training
        self._catalogue = catalogue
        self._tickets = tickets
        self._locks = WeakValueDictionary[RunId, asyncio.Lock]()

    async def forward(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        rows: Sequence[BatchRow],
        loss: BatchLossSpec | None = None,
        arguments: Json | None = None,
        adapter: bool = True,
        temperature: float = 1.0,
        want_correct: bool = False,
        dropout_seed: int | None = None,
    ) -> BatchResult:
        """Score a batch without a gradient, with its loss if one is given.

        Args:
            tenant: Who asks.
            run: Theirs.
            rows: At least one.
            loss: Needs ``arguments`` too, or none.
            arguments: What the call says besides, by Twinkle's names (``advantages``, ...), as
                JSON; the loss takes what it knows.
            adapter: False scores with the base model alone.
            temperature: Divides the logits.
            want_correct: Tell where the likeliest token is the label.
            dropout_seed: With it the adapter's dropout is on, and draws from it.

        Raises:
            InvalidRequest: A row, the loss or an argument is wrong; says which.
        """
        prepared = await self._prepare(tenant, run, rows, loss, arguments or {})
        how = _How(
            adapter=adapter,
            temperature=temperature,
            want_correct=want_correct,
            dropout_seed=dropout_seed,
        )
        seen = await self._score(tenant, run, prepared, how)
        if loss is None:
            return prepared.result(None, seen)
        value, _ = await prepared.evaluate(seen.logprobs)
        return prepared.result(value, seen)

    async def forward_backward(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        rows: Sequence[BatchRow],
        loss: BatchLossSpec,
        arguments: Json,
        temperature: float = 1.0,
        want_correct: bool = False,
        dropout_seed: int | None = None,
        logprobs: Sequence[Float32Array] | None = None,
    ) -> BatchResult:
        """Add the gradient of a batch to the run.

        Args:
            tenant: Who asks.
            run: Theirs.
            rows: As in ``forward``; so ``loss``, ``arguments``, ``temperature``, ``want_correct``.
            loss: Of tokens, not of embeddings.
            arguments: See ``forward``.
            temperature: See ``forward``.
            want_correct: See ``forward``.
            dropout_seed: None draws one, if the adapter has dropout.
            logprobs: Of a ``forward`` of the same rows by the same weights with the same seed, if
                the caller has them: spares a pass.

        Raises:
            InvalidRequest: As in ``forward``, or a score is not a number; nothing was added.
        """
        prepared = await self._prepare(tenant, run, rows, loss, arguments)
        lane = await self._runs.lane(tenant, run)
        how = _How(
            temperature=temperature,
            want_correct=want_correct,
            dropout_seed=_dropout_seed(dropout_seed, lane.run.spec),
        )
        async with self._lock(run):
            if (direct := prepared.objective.direct) is not None:
                inputs = prepared.scattered(direct.inputs)
                seen = await self._add(tenant, run, prepared, how, direct.loss, inputs)
                value, _ = await prepared.evaluate(seen.logprobs)
                return prepared.result(value, seen)
            known = logprobs is not None and not prepared.objective.raw_scores and not want_correct
            if known and logprobs is not None:
                seen = ForwardBackwardResult(logprobs=tuple(logprobs), metrics={})
            else:
                seen = await self._score(tenant, run, prepared, how)
            value, slopes_T = await prepared.evaluate(seen.logprobs, finite=True)
            weights = prepared.scattered({"weights": -slopes_T})
            how = replace(how, want_correct=False)
            await self._add(tenant, run, prepared, how, _PLAIN, weights, rated=known)
        return prepared.result(value, seen)

    async def embed(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        rows: Sequence[EmbedRow],
        loss: BatchLossSpec | None = None,
        adapter: bool = True,
    ) -> EmbedBatchResult:
        """Embed rows without a gradient, with their loss if one is given.

        Raises:
            InvalidRequest: The labels make no groups, or the loss is one of tokens.
        """
        labels = _labels(rows)
        if loss is not None:
            _of_embeddings(loss)
        result = await self._embed(tenant, run, Embed(rows=_tokens(rows), adapter=adapter))
        if loss is None:
            return EmbedBatchResult(embeddings=result.embeddings)
        value, _ = await asyncio.to_thread(contrast, loss, labels, result.embeddings)
        return EmbedBatchResult(embeddings=result.embeddings, loss=value, num_counted=1.0)

    async def embed_forward_backward(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        rows: Sequence[EmbedRow],
        loss: BatchLossSpec,
        dropout_seed: int | None = None,
    ) -> EmbedBatchResult:
        """Add the gradient of a loss of embeddings (InfonceLoss) to the run.

        Raises:
            InvalidRequest: As in ``embed``; nothing was added.
        """
        labels = _labels(rows)
        _of_embeddings(loss)
        lane = await self._runs.lane(tenant, run)
        dropout_seed = _dropout_seed(dropout_seed, lane.run.spec)
        tokens = _tokens(rows)
        async with self._lock(run):
            first = await self._embed(tenant, run, Embed(rows=tokens, dropout_seed=dropout_seed))
            value, slopes = await asyncio.to_thread(contrast, loss, labels, first.embeddings)
            await self._embed(
                tenant,
                run,
                Embed(
                    rows=tokens,
                    slopes=tuple(slopes.astype(np.float32)),
                    dropout_seed=dropout_seed,
                    num_counted=1.0,
                ),
            )
        return EmbedBatchResult(embeddings=first.embeddings, loss=value, num_counted=1.0)

    def _lock(self, run: RunId) -> asyncio.Lock:
        lock = self._locks.get(run)
        if lock is None:
            lock = self._locks[run] = asyncio.Lock()
        return lock

    async def _prepare(
        self,
        tenant: Tenant,
        run: RunId,
        rows: Sequence[BatchRow],
        loss: BatchLossSpec | None,
        arguments: Json,
    ) -> PreparedBatch:
        lane = await self._runs.lane(tenant, run)
        vocab_size = self._catalogue.get(lane.run.base_model).facts.vocab_size
        large = sum(len(row.tokens) for row in rows) > INLINE_TOKENS
        if large or has_many_values(arguments):
            return await asyncio.to_thread(prepare, rows, loss, arguments, vocab_size)
        return prepare(rows, loss, arguments, vocab_size)

    async def _score(
        self, tenant: Tenant, run: RunId, prepared: PreparedBatch, how: "_How"
    ) -> ForwardBackwardResult:
        """A forward, which changes nothing."""
        request = ForwardBackward(
            data=prepared.data({}),
            loss=_PLAIN,
            backward=False,
            adapter=how.adapter,
            temperature=how.temperature,
            raw_scores=prepared.objective.raw_scores,
            want_correct=how.want_correct and prepared.scores_labels,
            dropout_seed=how.dropout_seed,
        )
        ticket = await self._training.forward_backward(tenant, run, seq=None, batch=request)
        return await self._tickets.take(tenant.id, ticket.id, ForwardBackwardResult)

    async def _add(
        self,
        tenant: Tenant,
        run: RunId,
        prepared: PreparedBatch,
        how: "_How",
        loss: LossSpec,
        inputs: Mapping[str, Sequence[Float32Array]],
        *,
        rated: bool = True,
    ) -> ForwardBackwardResult:
        """A pass that adds the gradient of a loss of the core."""
        request = ForwardBackward(
            data=prepared.data(inputs),
            loss=loss,
            temperature=how.temperature,
            raw_scores=prepared.objective.raw_scores,
            want_correct=how.want_correct and prepared.scores_labels,
            dropout_seed=how.dropout_seed,
            num_counted=prepared.objective.num_counted,
        )
        ticket = await self._training.forward_backward(
            tenant, run, seq=None, batch=request, rated=rated
        )
        return await self._tickets.take(tenant.id, ticket.id, ForwardBackwardResult)

    async def _embed(self, tenant: Tenant, run: RunId, request: Embed) -> EmbedResult:
        ticket = await self._training.embed(tenant, run, seq=None, batch=request)
        return await self._tickets.take(tenant.id, ticket.id, EmbedResult)


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """What holds for both passes of a batch."""

    adapter: bool = True
    temperature: float = 1.0
    want_correct: bool = False
    dropout_seed: int | None = None


def _dropout_seed(given: int | None, spec: LoraSpec) -> int | None:
    """One seed for all passes of a batch; none without dropout."""
    return secrets.randbits(62) if given is None and spec.dropout > 0 else given


def _tokens(rows: Sequence[EmbedRow]) -> tuple[Int32Array, ...]:
    return tuple(row.tokens for row in rows)


def _labels(rows: Sequence[EmbedRow]) -> list[int]:
    if not rows:
        raise InvalidRequest("The batch is empty; send at least one row.")
    return [row.label for row in rows]


def _of_embeddings(loss: BatchLossSpec) -> None:
    if not loss.embeds:
        raise InvalidRequest(
            f"{loss.name} is a loss of tokens; task='embedding' takes InfonceLoss (set_loss)."
        )
