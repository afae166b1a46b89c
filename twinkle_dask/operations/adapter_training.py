"""Passes and steps of adapters, with the settings that are kept here.

A pass may come in parts: ``forward`` keeps its batch, ``calculate_loss`` says with which arguments
its loss is computed, ``backward`` adds the gradient, by the same rows, settings and dropout as one
``forward_backward`` would. The batch that waits is a blob beside the adapter's row, so it survives
a restart like everything else. Calls on one adapter are done in the order of their arrival.
"""

import asyncio
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import orjson

from twinkle_dask import packing
from twinkle_dask.batch_losses import BatchLossSpec, loss_spec
from twinkle_dask.errors import InvalidRequest, ServiceFault
from twinkle_dask.operations.adapter_metrics import (
    Measured,
    accumulated,
    calculated,
    check,
    known_arguments,
)
from twinkle_dask.operations.adapter_settings import AdapterSettings, Named, Progress
from twinkle_dask.operations.adapters import Adapter, Adapters
from twinkle_dask.operations.batch_training import BatchRow, BatchTraining, EmbedRow
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.runs import Runs
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.operations.training import Training
from twinkle_dask.operations.values import Tenant, Ticket
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.store import Store
from twinkle_dask.types import (
    ClipGradient,
    Datum,
    Float32Array,
    ForwardBackward,
    ForwardBackwardResult,
    GradientStep,
    GradientStepResult,
    Int32Array,
    Int64Array,
    Json,
    LossName,
    LossSpec,
    OptimizerSpec,
    RunId,
    SchedulerSpec,
)

_R = TypeVar("_R")
_INLINE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterBatch:
    """What a pass goes over.

    Attributes:
        tokens: Of each row, int32 (N,).
        labels: Of each row, int64 (N,), shifted, -100 where nothing is predicted; for embeddings
            int64 (1,), 1 where a group begins. Empty if none were sent.
        embeds: The pass makes embeddings, not logprobs.
        temperature: Divides the logits.
    """

    tokens: tuple[Int32Array, ...]
    labels: tuple[Int64Array, ...]
    embeds: bool = False
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    """What a pass gave; what it does not make is None.

    Attributes:
        logprobs: Of each row, float32 (N,).
        embeddings: float32 (B, D).
        logits: Of each row, float32 (N, V), divided by the temperature.
    """

    loss: float | None = None
    logprobs: tuple[Float32Array, ...] | None = None
    embeddings: Float32Array | None = None
    logits: tuple[Float32Array, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingBatch:
    """A batch that went forward and may still have a loss and a gradient.

    Attributes:
        training: Of ``forward``; else of ``forward_only``, which has no backward.
        adapter: False if the base model alone made the pass.
        dropout_seed: What the adapter's dropout left out in it.
        arguments: Of ``calculate_loss``, as JSON; None before it.
        measured: What metrics are told of the pass.
        counted: The metrics have been told.
    """

    batch: AdapterBatch
    training: bool
    adapter: bool
    dropout_seed: int | None
    arguments: str | None
    measured: Measured
    counted: bool = False


packing.register(AdapterBatch, PendingBatch)


class AdapterTraining:
    """What is done to adapters. Each call waits until its work is done."""

    def __init__(
        self,
        *,
        adapters: Adapters,
        batches: BatchTraining,
        training: Training,
        runs: Runs,
        catalogue: Catalogue,
        tickets: TicketBoard,
        store: Store,
        blobs: BlobStore,
    ) -> None:
        self._adapters = adapters
        self._batches = batches
        self._training = training
        self._runs = runs
        self._catalogue = catalogue
        self._tickets = tickets
        self._store = store
        self._blobs = blobs

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
            result, measured = await self._gradient(tenant, adapter, batch, arguments, None)
            progress = await self._told(adapter, adapter.progress)
            progress = accumulated(adapter.settings, progress, measured, training=True)
            progress = replace(progress, gradients=progress.gradients + 1)
            await self._put(adapter, None, progress)
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
                    tenant, run, rows=_embed_rows(batch, needed=False), adapter=use_adapter
                )
                result = PassResult(embeddings=embedded.embeddings, logits=logits)
                measured = _measured(batch, told, None, embeddings=embedded.embeddings)
            else:
                scored = await self._batches.forward(
                    tenant,
                    run,
                    rows=_rows(batch, needed=False),
                    adapter=use_adapter,
                    temperature=batch.temperature,
                    want_correct=_wants_correct(adapter.settings, training=training),
                    dropout_seed=seed,
                )
                logprobs = scored.logprobs if batch.labels else None
                result = PassResult(logprobs=logprobs, logits=logits)
                measured = _measured(batch, told, None, scored.logprobs, scored.correct)
            progress = await self._told(adapter, adapter.progress)
            pending = PendingBatch(
                batch=batch,
                training=training,
                adapter=use_adapter,
                dropout_seed=seed,
                arguments=None,
                measured=measured,
            )
            await self._put(adapter, pending, progress)
            return result

    async def calculate_loss(self, tenant: Tenant, run: RunId, arguments: Json) -> float:
        """The loss of the batch that went forward last.

        Raises:
            InvalidRequest: None did, an argument is wrong, or the loss is NaN or infinite.
        """
        async with self._adapters.lock(run):
            adapter = await self._adapters.reread(tenant, run)
            pending = await self._pending(adapter)
            if pending is None:
                raise InvalidRequest("Call forward or forward_only before calculate_loss.")
            batch, loss = pending.batch, _loss(adapter.settings)
            check(
                adapter.settings,
                adapter.progress,
                batch.labels,
                arguments,
                training=pending.training,
            )
            if batch.embeds:
                embedded = await self._batches.embed(
                    tenant, run, rows=_embed_rows(batch), loss=loss, adapter=pending.adapter
                )
                value = embedded.loss
            else:
                _of_tokens(loss)
                scored = await self._batches.forward(
                    tenant,
                    run,
                    rows=_rows(batch),
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
            measured = replace(pending.measured, loss=value, arguments=known_arguments(arguments))
            pending = replace(pending, arguments=_text(arguments), measured=measured)
            await self._put(adapter, pending, adapter.progress)
            return value

    async def backward(self, tenant: Tenant, run: RunId) -> None:
        """Add the gradient of the batch that went forward last.

        Raises:
            InvalidRequest: None did, or its loss was not calculated.
        """
        async with self._adapters.lock(run):
            adapter = await self._adapters.reread(tenant, run)
            pending = await self._pending(adapter)
            if pending is None or pending.arguments is None or not pending.training:
                raise InvalidRequest(
                    "Call forward and calculate_loss before backward; forward_only leaves nothing "
                    "to go back through."
                )
            _, measured = await self._gradient(
                tenant, adapter, pending.batch, _json(pending.arguments), pending.dropout_seed
            )
            progress = adapter.progress
            if not pending.counted:
                progress = accumulated(adapter.settings, progress, measured, training=True)
            progress = replace(progress, gradients=progress.gradients + 1)
            await self._put(adapter, None, progress)

    async def step(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        clip: ClipGradient | None = None,
        step: bool = False,
        zero: bool = False,
        advance: bool = False,
        accumulation: int | None = None,
    ) -> GradientStepResult:
        """Any parts of an optimizer step by the adapter's settings; see ``GradientStep``.

        ``accumulation`` is the adapter's from now on, if it is given.

        Raises:
            InvalidRequest: A step is asked for and no optimizer was set.
        """
        async with self._adapters.lock(run):
            adapter = await self._adapters.reread(tenant, run)
            settings = adapter.settings
            if accumulation is not None and accumulation != settings.accumulation:
                settings = replace(settings, accumulation=accumulation)
                await self._store.run_settings.set_settings(run, settings.json())
            if step and settings.optimizer is None:
                raise InvalidRequest("No optimizer is set; call set_optimizer before step.")
            optimizer = _optimizer(settings)
            request = GradientStep(
                clip=clip,
                step=optimizer if step else None,
                optimizer=optimizer,
                schedule=_schedule(settings),
                zero=zero,
                advance=advance,
                accumulation=settings.accumulation,
            )
            result = await self._stepped(tenant, run, request)
            progress = replace(
                adapter.progress,
                steps=result.steps,
                learning_rate=result.learning_rate,
                grad_norm=(
                    adapter.progress.grad_norm if result.grad_norm is None else result.grad_norm
                ),
                schedule_steps=adapter.progress.schedule_steps + (advance and result.done),
            )
            if progress != adapter.progress:
                await self._adapters.keep(run, progress)
            return result

    async def set_optimizer(self, tenant: Tenant, run: RunId, optimizer: Named) -> None:
        """Start with another optimizer, without memory and without a schedule."""
        await self._renew(tenant, run, optimizer, None)

    async def set_schedule(self, tenant: Tenant, run: RunId, schedule: Named) -> None:
        """Have the learning rate follow another schedule, from its beginning.

        Raises:
            InvalidRequest: No optimizer is set.
        """
        await self._renew(tenant, run, None, schedule)

    async def calculate_metric(self, tenant: Tenant, run: RunId, *, training: bool) -> Json:
        """What the training or evaluation metrics say; they begin anew."""
        async with self._adapters.lock(run):
            adapter = await self._adapters.reread(tenant, run)
            settings, progress = adapter.settings, adapter.progress
            pending = await self._pending(adapter)
            if pending is not None and pending.training is training and not pending.counted:
                progress = accumulated(settings, progress, pending.measured, training=training)
                pending = replace(pending, counted=True)
            if (optimizer := _optimizer(settings)) is not None:
                # Asked for anew: a checkpoint may have been loaded meanwhile.
                request = GradientStep(
                    optimizer=optimizer,
                    schedule=_schedule(settings),
                    accumulation=settings.accumulation,
                )
                told = await self._stepped(tenant, run, request)
                progress = replace(progress, learning_rate=told.learning_rate)
            values, progress = calculated(settings, progress, training=training)
            await self._put(adapter, pending, progress)
            return values

    async def _renew(
        self, tenant: Tenant, run: RunId, optimizer: Named | None, schedule: Named | None
    ) -> None:
        async with self._adapters.lock(run):
            adapter = await self._adapters.reread(tenant, run)
            settings = adapter.settings
            if optimizer is not None:
                settings = replace(settings, optimizer=optimizer, schedule=None)
            elif settings.optimizer is None:
                raise InvalidRequest("No optimizer is set; call set_optimizer first.")
            else:
                settings = replace(settings, schedule=schedule)
            request = GradientStep(
                optimizer=_optimizer(settings),
                schedule=_schedule(settings),
                fresh_optimizer=optimizer is not None,
                fresh_schedule=True,
                accumulation=settings.accumulation,
            )
            result = await self._stepped(tenant, run, request)
            # Written last: until here the former settings were in force.
            await self._store.run_settings.set_settings(run, settings.json())
            progress = replace(adapter.progress, learning_rate=result.learning_rate)
            await self._adapters.keep(run, progress)

    async def _gradient(
        self,
        tenant: Tenant,
        adapter: Adapter,
        batch: AdapterBatch,
        arguments: Json,
        dropout_seed: int | None,
    ) -> tuple[PassResult, Measured]:
        loss = _loss(adapter.settings)
        if batch.embeds:
            embedded = await self._batches.embed_forward_backward(
                tenant, adapter.run, rows=_embed_rows(batch), loss=loss, dropout_seed=dropout_seed
            )
            measured = _measured(batch, arguments, embedded.loss, embeddings=embedded.embeddings)
            return PassResult(loss=embedded.loss, embeddings=embedded.embeddings), measured
        _of_tokens(loss)
        done = await self._batches.forward_backward(
            tenant,
            adapter.run,
            rows=_rows(batch),
            loss=loss,
            arguments=arguments,
            temperature=batch.temperature,
            want_correct=_wants_correct(adapter.settings, training=True),
            dropout_seed=dropout_seed,
        )
        measured = _measured(
            batch, arguments, done.loss, done.logprobs, done.correct, num_counted=done.num_counted
        )
        return PassResult(loss=done.loss, logprobs=done.logprobs or None), measured

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
        return (await self._result(tenant, ticket, ForwardBackwardResult)).logprobs

    async def _dropout_seed(self, tenant: Tenant, run: RunId) -> int | None:
        lane = await self._runs.lane(tenant, run)
        return secrets.randbits(62) if lane.run.spec.dropout > 0 else None

    async def _stepped(
        self, tenant: Tenant, run: RunId, request: GradientStep
    ) -> GradientStepResult:
        ticket = await self._training.gradient_step(tenant, run, step=request)
        return await self._result(tenant, ticket, GradientStepResult)

    async def _told(self, adapter: Adapter, progress: Progress) -> Progress:
        """Progress with what the waiting batch means to the metrics, before it is replaced."""
        pending = await self._pending(adapter)
        if pending is None or pending.counted:
            return progress
        return accumulated(adapter.settings, progress, pending.measured, training=pending.training)

    async def _pending(self, adapter: Adapter) -> PendingBatch | None:
        if adapter.pending is None:
            return None
        content = await asyncio.to_thread(self._blobs.get, adapter.pending)
        pending = await _aside(len(content), packing.unpack, content)
        if not isinstance(pending, PendingBatch):
            raise ServiceFault("The batch that waits cannot be read; call forward again.")
        return pending

    async def _put(
        self, adapter: Adapter, pending: PendingBatch | None, progress: Progress
    ) -> None:
        """Write progress down, and the batch that waits from now on."""
        if pending is None and adapter.pending is None:
            await self._adapters.keep(adapter.run, progress)
            return
        path = None
        if pending is not None:
            path = f"pending/{secrets.token_hex(12)}"
            size = sum(len(tokens) for tokens in pending.batch.tokens) * 32
            content = await _aside(size, packing.pack, pending)
            await asyncio.to_thread(self._blobs.put, path, content)
        await self._store.run_settings.set_pending(adapter.run, path, progress.json())
        if adapter.pending is not None:
            await asyncio.to_thread(self._blobs.remove, adapter.pending)

    async def _result(self, tenant: Tenant, ticket: Ticket, kind: type[_R]) -> _R:
        result = await self._tickets.result(tenant.id, ticket.id)
        self._tickets.retrieved(tenant.id, [ticket.id])
        if not isinstance(result, kind):
            raise ServiceFault(f"The answer is a {type(result).__name__}.")
        return result


async def _aside(num_bytes: int, work: Any, value: Any) -> Any:
    return await asyncio.to_thread(work, value) if num_bytes > _INLINE_BYTES else work(value)


def _loss(settings: AdapterSettings) -> BatchLossSpec:
    return loss_spec(settings.loss.name, settings.loss.settings)


def _of_tokens(loss: BatchLossSpec) -> None:
    if loss.embeds:
        raise InvalidRequest(f"{loss.name} is a loss of embeddings; pass task='embedding'.")


def _optimizer(settings: AdapterSettings) -> OptimizerSpec | None:
    named = settings.optimizer
    return None if named is None else OptimizerSpec(name=named.name, settings=named.settings)


def _schedule(settings: AdapterSettings) -> SchedulerSpec | None:
    named = settings.schedule
    return None if named is None else SchedulerSpec(name=named.name, settings=named.settings)


def _wants_correct(settings: AdapterSettings, *, training: bool) -> bool:
    metrics = settings.train_metrics if training else settings.eval_metrics
    return any(metric.name == "Accuracy" for metric in metrics)


def _rows(batch: AdapterBatch, *, needed: bool = True) -> list[BatchRow]:
    if not batch.labels:
        if needed:
            raise InvalidRequest("The inputs have no labels, so there is no loss.")
        nothing = [np.full(len(tokens), -100, np.int64) for tokens in batch.tokens]
        return _paired(batch.tokens, nothing)
    return _paired(batch.tokens, batch.labels)


def _paired(tokens: Sequence[Int32Array], labels: Sequence[Int64Array]) -> list[BatchRow]:
    return [BatchRow(tokens=row, labels=own) for row, own in zip(tokens, labels, strict=True)]


def _embed_rows(batch: AdapterBatch, *, needed: bool = True) -> list[EmbedRow]:
    if not batch.labels:
        if needed:
            raise InvalidRequest(
                "The inputs have no labels; each row has one, 1 for an anchor and 0 for what "
                "belongs to the anchor before."
            )
        return [EmbedRow(tokens=tokens) for tokens in batch.tokens]
    pairs = zip(batch.tokens, batch.labels, strict=True)
    return [EmbedRow(tokens=tokens, label=int(labels[0])) for tokens, labels in pairs]


def _measured(
    batch: AdapterBatch,
    arguments: Json,
    loss: float | None,
    logprobs: Sequence[Float32Array] = (),
    correct: Sequence[Any] | None = None,
    *,
    embeddings: Float32Array | None = None,
    num_counted: float = 0.0,
) -> Measured:
    return Measured(
        labels=batch.labels,
        logprobs=tuple(logprobs),
        correct=None if correct is None else tuple(correct),
        embeddings=embeddings,
        loss=loss,
        num_counted=num_counted,
        arguments=known_arguments(arguments),
    )


def _text(arguments: Mapping[str, Any]) -> str:
    return orjson.dumps(arguments).decode()


def _json(text: str) -> Json:
    value: Json = orjson.loads(text)
    return value
