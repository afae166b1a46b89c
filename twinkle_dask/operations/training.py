"""What a tenant does to a run: one function per operation, all through ``Runs.submit``."""

import asyncio
import secrets
from dataclasses import replace
from typing import TypeVar

from twinkle_dask.config import LimitConfig
from twinkle_dask.errors import InvalidRequest, NotFound, RequestError
from twinkle_dask.operations import validation
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.checkpoints import Checkpoints, name_taken
from twinkle_dask.operations.lanes import Lane
from twinkle_dask.operations.provenance import BatchSpans, Provenance
from twinkle_dask.operations.requests import (
    LaneRequest,
    SaveExternal,
    SaveForSampler,
    SaveState,
    load_of,
)
from twinkle_dask.operations.runs import Runs
from twinkle_dask.operations.values import CheckpointAddress, ServedModel, Tenant, Ticket
from twinkle_dask.optimizers import checked_step
from twinkle_dask.store.records import CheckpointKind
from twinkle_dask.store.store import Store
from twinkle_dask.types import (
    AdamParams,
    Embed,
    ForwardBackward,
    GradientStep,
    Json,
    LoraSpec,
    OptimStep,
    RunId,
    SamplerId,
)

#: Larger batches are checked on a thread, so that the event loop keeps turning (16,384 data of a
#: token take half a second).
_CHECK_INLINE_TOKENS = 20_000
_CHECK_INLINE_DATA = 512
_CHECK_INLINE_IMAGE_BYTES = 2**20
_CHECK_INLINE_SCORES = 200_000
_NO_SPANS: BatchSpans = {}
RowsT = TypeVar("RowsT", ForwardBackward, Embed)


class Training:
    """Operations on runs. Each gives a ticket at once; the work is done in ``seq`` order."""

    def __init__(
        self,
        runs: Runs,
        store: Store,
        checkpoints: Checkpoints,
        catalogue: Catalogue,
        limits: LimitConfig,
        provenance: Provenance,
    ) -> None:
        self._provenance = provenance
        self._runs = runs
        self._store = store
        self._checkpoints = checkpoints
        self._catalogue = catalogue
        self._limits = limits

    async def forward_backward(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        seq: int | None,
        batch: ForwardBackward,
        spans: BatchSpans = _NO_SPANS,
        rated: bool = True,
    ) -> Ticket:
        """Add the gradient of a batch, or evaluate it.

        ``spans`` say where its tokens come from; they are checked and not kept. One that is not
        ``rated`` belongs to a call whose first pass has counted for the tenant's rates.
        """
        large = (
            len(batch.data) > _CHECK_INLINE_DATA
            or batch.num_tokens > _CHECK_INLINE_TOKENS
            or batch.num_image_bytes > _CHECK_INLINE_IMAGE_BYTES
            or batch.num_scores > _CHECK_INLINE_SCORES
        )
        checked = large or bool(spans)
        if checked:
            # Before its place is looked at. A refusal frees the place as one by ``make`` does,
            # since the face reports it.
            lane = await self._runs.lane(tenant, run)
            model = self._catalogue.get(lane.run.base_model)
            if large:
                batch = await asyncio.to_thread(validation.batch, batch, model, self._limits)
            else:
                batch = validation.batch(batch, model, self._limits)
            if spans:
                await self._provenance.check(tenant.id, lane.run.session_id, batch, spans)

        def make(lane: Lane, model: ServedModel) -> LaneRequest:
            request = batch if checked else validation.batch(batch, model, self._limits)
            return _with_dropout(request, lane.run.spec)

        return await self._runs.submit(tenant, run, seq=seq, make=make, rated=rated)

    async def embed(
        self, tenant: Tenant, run: RunId, *, seq: int | None = None, batch: Embed
    ) -> Ticket:
        """Embed rows, or add the gradient of their embeddings to the run; see ``Embed``."""
        checked = batch.num_rows > _CHECK_INLINE_DATA or batch.num_tokens > _CHECK_INLINE_TOKENS
        if checked:
            lane = await self._runs.lane(tenant, run)
            model = self._catalogue.get(lane.run.base_model)
            batch = await asyncio.to_thread(validation.embed, batch, model, self._limits)

        def make(lane: Lane, model: ServedModel) -> LaneRequest:
            request = batch if checked else validation.embed(batch, model, self._limits)
            return _with_dropout(request, lane.run.spec)

        # With slopes it is the second pass of a call.
        return await self._runs.submit(tenant, run, seq=seq, make=make, rated=batch.slopes is None)

    async def optim_step(
        self, tenant: Tenant, run: RunId, *, seq: int | None, adam: AdamParams
    ) -> Ticket:
        """Spend the gradient of everything with a smaller ``seq``."""

        def make(_lane: Lane, _model: ServedModel) -> LaneRequest:
            return OptimStep(adam=validation.adam(adam))

        return await self._runs.submit(tenant, run, seq=seq, make=make)

    async def gradient_step(
        self, tenant: Tenant, run: RunId, *, seq: int | None = None, step: GradientStep
    ) -> Ticket:
        """Clip, step, zero or move the schedule on, as far as ``step`` says; see there.

        Its settings may be a tenant's as they came: they are checked, and defaults filled in.
        """

        def make(_lane: Lane, _model: ServedModel) -> LaneRequest:
            return checked_step(step)

        return await self._runs.submit(tenant, run, seq=seq, make=make)

    async def save_state(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        seq: int | None,
        name: str,
        overwrite: bool,
        ttl_s: int | None,
        user_metadata: Json,
        optimizer: bool = True,
    ) -> Ticket:
        """Save weights and, unless it is not wanted, the optimizer under a name."""
        taken = not overwrite and await self._is_taken(tenant, run, CheckpointKind.TRAINING, name)

        def make(lane: Lane, _model: ServedModel) -> LaneRequest:
            _name_is_free(name, taken)
            validation.metadata(user_metadata, "A checkpoint's")
            checkpoint = secrets.token_hex(16)
            return SaveState(
                name=validation.checkpoint_name(name),
                overwrite=overwrite,
                ttl_s=validation.ttl(ttl_s),
                user_metadata=user_metadata,
                checkpoint_id=checkpoint,
                folder=f"checkpoints/{lane.run.id}/weights-{checkpoint}",
                actor=tenant.key_name or tenant.name,
                key_hint=tenant.key_hint,
                optimizer=optimizer,
            )

        return await self._runs.submit(tenant, run, seq=seq, make=make)

    async def save_for_sampler(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        seq: int | None,
        name: str | None,
        sampler_seq: int | None,
        ttl_s: int | None,
        user_metadata: Json,
        inflight: bool = False,
    ) -> Ticket:
        """Freeze the weights at this place for sampling: under a name, or as a new sampler.

        With ``inflight``, all samplers of the run that were made so go on with these weights.
        A model that cannot be sampled here takes names only: its weights may be sampled elsewhere.
        """
        taken = name is not None and await self._is_taken(tenant, run, CheckpointKind.SAMPLER, name)

        def make(lane: Lane, model: ServedModel) -> LaneRequest:
            if (name is None) == (sampler_seq is None):
                raise InvalidRequest("Give either a path or a sampling_session_seq_id.")
            if name is not None:
                _name_is_free(name, taken)
                validation.checkpoint_name(name)
            validation.metadata(user_metadata, "A checkpoint's")
            sampler = None
            if sampler_seq is not None:
                validation.sampled(model)
                sampler = SamplerId(f"{lane.run.session_id}:sample:{sampler_seq}")
            checkpoint = secrets.token_hex(16)
            return SaveForSampler(
                name=name,
                sampler=sampler,
                sampler_seq=sampler_seq,
                inflight=inflight,
                ttl_s=validation.ttl(ttl_s),
                user_metadata=user_metadata,
                checkpoint_id=checkpoint,
                folder=f"checkpoints/{lane.run.id}/sampler-{checkpoint}",
                actor=tenant.key_name or tenant.name,
                key_hint=tenant.key_hint,
            )

        return await self._runs.submit(tenant, run, seq=seq, make=make)

    async def save_external(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        seq: int | None,
        name: str,
        ttl_s: int | None,
        recipients: tuple[str, ...],
    ) -> Ticket:
        """Export the adapter under a name, for other programs.

        ``recipients`` are public keys of age; given any, the files are encrypted for all of them.
        """
        taken = await self._is_taken(tenant, run, CheckpointKind.EXTERNAL, name)

        def make(lane: Lane, _model: ServedModel) -> LaneRequest:
            _name_is_free(name, taken)
            checkpoint = secrets.token_hex(16)
            return SaveExternal(
                name=validation.checkpoint_name(name),
                ttl_s=validation.ttl(ttl_s),
                recipients=validation.recipients(recipients),
                checkpoint_id=checkpoint,
                folder=f"checkpoints/{lane.run.id}/external-{checkpoint}",
                actor=tenant.key_name or tenant.name,
                key_hint=tenant.key_hint,
            )

        return await self._runs.submit(tenant, run, seq=seq, make=make)

    async def load_state(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        seq: int | None,
        address: CheckpointAddress,
        with_optimizer: bool,
        reader: Tenant | None = None,
    ) -> Ticket:
        """Set a run to where a checkpoint of the same base model and LoRA shape stands.

        ``reader`` is who may read the checkpoint, if that is another account of the caller's.
        """
        lane = await self._runs.lane(tenant, run)
        try:
            record = await self._checkpoints.find((reader or tenant).id, address)
        except RequestError:
            if seq:
                lane.refuse(seq)
            raise

        def make(lane: Lane, _model: ServedModel) -> LaneRequest:
            if not self._catalogue.same_base(lane.run.base_model, record.base_model):
                raise NotFound(
                    f"There is no such checkpoint for a run of {lane.run.base_model!r}; it "
                    "belongs to another base model."
                )
            theirs, ours = record.spec, lane.run.spec
            if _shape(theirs) != _shape(ours):
                raise InvalidRequest(
                    f"The checkpoint has rank {theirs.rank} and alpha {theirs.alpha:g}, and this "
                    f"run has rank {ours.rank} and alpha {ours.alpha:g}, or other targets; create "
                    "a new run from the checkpoint."
                )
            return load_of(record, address, with_optimizer=with_optimizer)

        return await self._runs.submit(tenant, run, seq=seq, make=make)

    async def _is_taken(self, tenant: Tenant, run: RunId, kind: CheckpointKind, name: str) -> bool:
        return await self._store.checkpoints.get(tenant.id, run, kind, name) is not None


def _shape(spec: LoraSpec) -> tuple[object, ...]:
    """What two adapters must have in common for weights of one to mean the same in the other."""
    wears: object = (spec.train_attn, spec.train_mlp, spec.train_unembed)
    if spec.targets is not None:
        wears = frozenset(spec.targets)
    return (spec.rank, spec.alpha, spec.rslora, wears)


def _with_dropout(batch: RowsT, spec: LoraSpec) -> RowsT:
    """A seed where there is none, and the adapter has dropout and is to learn."""
    if spec.dropout > 0 and batch.backward and batch.dropout_seed is None:
        return replace(batch, dropout_seed=secrets.randbits(62))
    return batch


def _name_is_free(name: str, taken: bool) -> None:
    if taken:
        raise name_taken(name)
