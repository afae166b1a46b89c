"""Passes of adapters by the settings that are kept with them, and what metrics say of them.

A pass may come in parts: ``forward`` keeps its batch, ``calculate_loss`` says with which arguments
its loss is computed, ``backward`` adds the gradient, by the same rows, settings and dropout as one
``forward_backward`` would. Calls on one adapter are done in the order of their arrival.
"""

import math
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import orjson

from twinkle_dask.batch_losses import BatchLossSpec
from twinkle_dask.errors import InvalidRequest, ServiceFault
from twinkle_dask.operations.adapter_batches import (
    AdapterBatch,
    PassResult,
    embed_rows,
    measured,
    token_rows,
)
from twinkle_dask.operations.adapter_metrics import (
    Measured,
    accumulated,
    calculated,
    check,
    known_arguments,
)
from twinkle_dask.operations.adapter_steps import AdapterSteps
from twinkle_dask.operations.adapters import Adapter, Adapters
from twinkle_dask.operations.batch_training import BatchTraining
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.pending_batches import PendingBatch, PendingBatches
from twinkle_dask.operations.runs import Runs
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.operations.training import Training
from twinkle_dask.operations.values import Tenant
from twinkle_dask.types import (
    Datum,
    Float32Array,
    ForwardBackward,
    ForwardBackwardResult,
    Json,
    LossName,
    LossSpec,
    RunId,
)


class AdapterTraining:
    """What makes losses, gradients and metrics. Each call waits until its work is done."""

    def __init__(
        self,
        *,
        adapters: Adapters,
        batches: BatchTraining,
        training: Training,
        runs: Runs,
        catalogue: Catalogue,
        tickets: TicketBoard,
        pending: PendingBatches,
        steps: AdapterSteps,
    ) -> None:
        self._adapters = adapters
        self._batches = batches
        self._training = training
        self._runs = runs
        self._catalogue = catalogue
        self._tickets = tickets
        self._pending = pending
        self._steps = steps

    async def forward_backward(
        self, tenant: Tenant, run: RunId, batch: AdapterBatch, arguments: Json
    ) -> PassResult:
        """Add the gradient of a batch by the adapter's loss.

        Raises:
            InvalidRequest: The batch, or an argument of the loss; nothing was added.
        """
        async with self._adapters.lock(run):
            adapter = await self._adapters.reread(tenant, run)
            check(adapter.settings, adapter.progress, batch.labels, arguments, training=True)
            result, seen = await self._gradient(tenant, adapter, batch, arguments, None)
            progress = await self._pending.told(adapter, adapter.progress)
            progress = accumulated(adapter.settings, progress, seen, training=True)
            progress = replace(progress, gradients=progress.gradients + 1)
            await self._pending.put(adapter, None, progress)
            return result

    async def forward(
        self,
        tenant: Tenant,
        run: RunId,
        batch: AdapterBatch,
        *,
        training: bool,
        use_adapter: bool = True,
        want_logits: bool = False,
        arguments: Json | None = None,
    ) -> PassResult:
        """Score a batch and keep it for ``calculate_loss`` and, if ``training``, ``backward``.

        Args:
            tenant: Who asks.
            run: Theirs.
            batch: What to score.
            training: With the adapter's dropout.
            use_adapter: False scores with the base model alone.
            want_logits: Give the logits too.
            arguments: What metrics are told besides.
        """
        async with self._adapters.lock(run):
            adapter = await self._adapters.reread(tenant, run)
            told = arguments or {}
            check(adapter.settings, adapter.progress, batch.labels, told, training=training)
            seed = await self._dropout_seed(tenant, run) if training else None
            logits = None
            if want_logits:
                logits = await self._logits(tenant, run, batch, use_adapter, seed)
            if batch.embeds:
                embedded = await self._batches.embed(
                    tenant, run, rows=embed_rows(batch, needed=False), adapter=use_adapter
                )
                result = PassResult(embeddings=embedded.embeddings, logits=logits)
                seen = measured(batch, told, None, embeddings=embedded.embeddings)
            else:
                scored = await self._batches.forward(
                    tenant,
                    run,
                    rows=token_rows(batch, needed=False),
                    adapter=use_adapter,
                    temperature=batch.temperature,
                    want_correct=adapter.settings.wants_correct(training=training),
                    dropout_seed=seed,
                )
                logprobs = scored.logprobs if batch.labels else None
                result = PassResult(logprobs=logprobs, logits=logits)
                seen = measured(batch, told, None, scored.logprobs, scored.correct)
            progress = await self._pending.told(adapter, adapter.progress)
            pending = PendingBatch(
                batch=batch,
                training=training,
                adapter=use_adapter,
                dropout_seed=seed,
                arguments=None,
                measured=seen,
            )
            await self._pending.put(adapter, pending, progress)
            return result

    async def calculate_loss(self, tenant: Tenant, run: RunId, arguments: Json) -> float:
        """The loss of the batch that went forward last.

        Raises:
            InvalidRequest: None did, an argument is wrong, or the loss is NaN or infinite.
        """
        async with self._adapters.lock(run):
            adapter = await self._adapters.reread(tenant, run)
            pending = await self._pending.get(adapter)
            if pending is None:
                raise InvalidRequest("Call forward or forward_only before calculate_loss.")
            batch, loss = pending.batch, adapter.settings.loss_spec
            check(
                adapter.settings,
                adapter.progress,
                batch.labels,
                arguments,
                training=pending.training,
            )
            if batch.embeds:
                embedded = await self._batches.embed(
                    tenant, run, rows=embed_rows(batch), loss=loss, adapter=pending.adapter
                )
                value = embedded.loss
            else:
                _of_tokens(loss)
                scored = await self._batches.forward(
                    tenant,
                    run,
                    rows=token_rows(batch),
                    loss=loss,
                    arguments=arguments,
                    adapter=pending.adapter,
                    temperature=batch.temperature,
                    dropout_seed=pending.dropout_seed,
                )
                value = scored.loss
            if value is None:
                raise ServiceFault("The pass has no loss.")
            if not math.isfinite(value):
                raise InvalidRequest(
                    f"The loss is not a number that can be sent ({value}). Look for extreme values "
                    "in the inputs, or a learning rate that made the weights diverge."
                )
            seen = replace(pending.measured, loss=value, arguments=known_arguments(arguments))
            pending = replace(pending, arguments=_text(arguments), measured=seen)
            await self._pending.put(adapter, pending, adapter.progress)
            return value

    async def backward(self, tenant: Tenant, run: RunId) -> None:
        """Add the gradient of the batch that went forward last.

        Raises:
            InvalidRequest: None did, or its loss was not calculated.
        """
        async with self._adapters.lock(run):
            adapter = await self._adapters.reread(tenant, run)
            pending = await self._pending.get(adapter)
            if pending is None or pending.arguments is None or not pending.training:
                raise InvalidRequest(
                    "Call forward and calculate_loss before backward; forward_only leaves nothing "
                    "to go back through."
                )
            _, seen = await self._gradient(
                tenant, adapter, pending.batch, _json(pending.arguments), pending.dropout_seed
            )
            progress = adapter.progress
            if not pending.counted:
                progress = accumulated(adapter.settings, progress, seen, training=True)
            progress = replace(progress, gradients=progress.gradients + 1)
            await self._pending.put(adapter, None, progress)

    async def calculate_metric(self, tenant: Tenant, run: RunId, *, training: bool) -> Json:
        """What the training or evaluation metrics say; they begin anew."""
        async with self._adapters.lock(run):
            adapter = await self._adapters.reread(tenant, run)
            settings, progress = adapter.settings, adapter.progress
            pending = await self._pending.get(adapter)
            if pending is not None and pending.training is training and not pending.counted:
                progress = accumulated(settings, progress, pending.measured, training=training)
                pending = replace(pending, counted=True)
            if settings.optimizer is not None:
                rate = await self._steps.learning_rate(tenant, run, settings)
                progress = replace(progress, learning_rate=rate)
            values, progress = calculated(settings, progress, training=training)
            await self._pending.put(adapter, pending, progress)
            return values

    async def _gradient(
        self,
        tenant: Tenant,
        adapter: Adapter,
        batch: AdapterBatch,
        arguments: Json,
        dropout_seed: int | None,
    ) -> tuple[PassResult, Measured]:
        loss = adapter.settings.loss_spec
        if batch.embeds:
            embedded = await self._batches.embed_forward_backward(
                tenant, adapter.run, rows=embed_rows(batch), loss=loss, dropout_seed=dropout_seed
            )
            seen = measured(batch, arguments, embedded.loss, embeddings=embedded.embeddings)
            return PassResult(loss=embedded.loss, embeddings=embedded.embeddings), seen
        _of_tokens(loss)
        done = await self._batches.forward_backward(
            tenant,
            adapter.run,
            rows=token_rows(batch),
            loss=loss,
            arguments=arguments,
            temperature=batch.temperature,
            want_correct=adapter.settings.wants_correct(training=True),
            dropout_seed=dropout_seed,
        )
        seen = measured(
            batch, arguments, done.loss, done.logprobs, done.correct, num_counted=done.num_counted
        )
        return PassResult(loss=done.loss, logprobs=done.logprobs or None), seen

    async def _logits(
        self,
        tenant: Tenant,
        run: RunId,
        batch: AdapterBatch,
        use_adapter: bool,
        dropout_seed: int | None,
    ) -> tuple[Float32Array, ...]:
        """Every logit of every position, which validation bounds."""
        lane = await self._runs.lane(tenant, run)
        vocabulary = self._catalogue.get(lane.run.base_model).facts.vocab_size
        every_V = np.arange(vocabulary, dtype=np.int64)
        data = tuple(
            # A view of one row of the vocabulary; it is made whole only when it is sent.
            Datum(
                tokens=tokens,
                target_tokens=np.broadcast_to(every_V, (len(tokens), vocabulary)),
                loss_inputs={},
            )
            for tokens in batch.tokens
        )
        request = ForwardBackward(
            data=data,
            loss=LossSpec(name=LossName.CROSS_ENTROPY),
            backward=False,
            adapter=use_adapter,
            temperature=batch.temperature,
            raw_scores=True,
            dropout_seed=dropout_seed,
        )
        ticket = await self._training.forward_backward(tenant, run, seq=None, batch=request)
        return (await self._tickets.take(tenant.id, ticket.id, ForwardBackwardResult)).logprobs

    async def _dropout_seed(self, tenant: Tenant, run: RunId) -> int | None:
        lane = await self._runs.lane(tenant, run)
        return secrets.randbits(62) if lane.run.spec.dropout > 0 else None


def _of_tokens(loss: BatchLossSpec) -> None:
    if loss.embeds:
        raise InvalidRequest(f"{loss.name} is a loss of embeddings; pass task='embedding'.")


def _text(arguments: Mapping[str, Any]) -> str:
    return orjson.dumps(arguments).decode()


def _json(text: str) -> Json:
    value: Json = orjson.loads(text)
    return value
