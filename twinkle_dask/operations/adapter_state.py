"""An adapter's weights, and what can be told of it in lines."""

import asyncio
import secrets
from dataclasses import replace
from typing import Final

import orjson

from twinkle_dask.checkpoints import tensors
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.adapters import Adapter, Adapters
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.operations.runs import Runs
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.operations.training import Training
from twinkle_dask.operations.values import CheckpointAddress, Tenant
from twinkle_dask.optimizers import optimizer_spec
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.records import CheckpointKind
from twinkle_dask.types import Float32Array, GradientStep, GradientStepResult, Json, RunId

#: As nested lists a number takes some twelve bytes.
MAX_NUMBERS: Final = 8_000_000
_SHOWN: Final = 5
_FILE: Final = "adapter_model.safetensors"


class AdapterState:
    """Reads weights as they are saved for samplers, from a checkpoint that is gone afterwards."""

    def __init__(
        self,
        *,
        adapters: Adapters,
        training: Training,
        runs: Runs,
        catalogue: Catalogue,
        checkpoints: Checkpoints,
        tickets: TicketBoard,
        blobs: BlobStore,
    ) -> None:
        self._adapters = adapters
        self._training = training
        self._runs = runs
        self._catalogue = catalogue
        self._checkpoints = checkpoints
        self._tickets = tickets
        self._blobs = blobs

    async def weights(self, tenant: Tenant, adapter: Adapter) -> dict[str, Float32Array]:
        """The weights by PEFT's names, at their place among the adapter's calls.

        Raises:
            InvalidRequest: They are too many for an answer of this kind.
        """
        async with self._adapters.lock(adapter.run):
            return await self._weights(tenant, adapter)

    async def summary(self, tenant: Tenant, adapter: Adapter) -> str:
        """What an adapter is and is set to, in lines."""
        run = adapter.run
        async with self._adapters.lock(run):
            adapter = await self._adapters.reread(tenant, run)
            settings, progress = adapter.settings, adapter.progress
            told = await self._told(tenant, run, settings.accumulation)
            held = progress.weights
            if held is None:
                held = _held(await self._weights(tenant, adapter))
                await self._adapters.keep(run, replace(progress, weights=held))
            lane = await self._runs.lane(tenant, run)
        spec, facts = lane.run.spec, self._catalogue.get(lane.run.base_model).facts
        config = {
            "base_model_name_or_path": lane.run.base_model,
            "r": spec.rank,
            "lora_alpha": spec.alpha,
            "lora_dropout": spec.dropout,
            "use_rslora": spec.rslora,
            "target_modules": "all-linear" if spec.targets is None else list(spec.targets),
        }
        number, everything = int(held["number"]), facts.num_parameters + int(held["number"])
        lines = [
            "Adapter config:",
            orjson.dumps(config, option=orjson.OPT_INDENT_2).decode(),
            "Trainable parameters examples:",
            *held["names"],
            f"Trainable params: {number:,d} || all params: {everything:,d} || "
            f"trainable%: {100 * number / everything:.4f}",
            f"Loss: {settings.loss.name}",
        ]
        if settings.optimizer is not None:
            checked = optimizer_spec(settings.optimizer.name, settings.optimizer.settings)
            schedule = None if settings.schedule is None else settings.schedule.name
            lines += [
                f"Optimizer: {settings.optimizer.name}",
                f"Learning rate: {checked.settings['lr']}",
                f"Lr scheduler: {schedule}",
                f"Gradient accumulation steps: {settings.accumulation}",
            ]
        else:
            lines.append("Optimizer: none; call set_optimizer.")
        lines += [
            f"Optimizer steps taken: {told.steps}",
            f"Backward passes since then: {told.gradients}",
        ]
        return "\n".join(lines) + "\n"

    async def _told(self, tenant: Tenant, run: RunId, accumulation: int) -> GradientStepResult:
        """What the trainer counts, after all that was begun before, a call of no answer included.

        The progress that is kept beside the settings is written after the work is done, so it may
        be behind if the server was killed in between.
        """
        step = GradientStep(accumulation=accumulation)
        ticket = await self._training.gradient_step(tenant, run, step=step)
        return await self._tickets.take(tenant.id, ticket.id, GradientStepResult)

    async def _weights(self, tenant: Tenant, adapter: Adapter) -> dict[str, Float32Array]:
        name = f"state-dict-{secrets.token_hex(8)}"
        ticket = await self._training.save_for_sampler(
            tenant,
            adapter.run,
            seq=None,
            name=name,
            sampler_seq=None,
            ttl_s=None,
            user_metadata={},
        )
        await self._tickets.result(tenant.id, ticket.id)
        address = CheckpointAddress(run=adapter.run, kind=CheckpointKind.SAMPLER, name=name)
        try:
            record = await self._checkpoints.find(tenant.id, address)
            if record.size_bytes > 4 * MAX_NUMBERS:
                raise InvalidRequest(
                    f"The adapter has {record.size_bytes / 2**20:.0f} MiB of weights, too many for "
                    f"get_state_dict ({4 * MAX_NUMBERS / 2**20:.0f} MiB); save it with "
                    "is_sampler=True, and download the checkpoint's files."
                )
            data = await asyncio.to_thread(self._blobs.get, f"{record.path}/{_FILE}")
        finally:
            await self._checkpoints.delete(tenant, address)
        return await asyncio.to_thread(tensors.decode, data, _FILE)


def _held(weights: dict[str, Float32Array]) -> Json:
    names = sorted(weights)
    if len(names) > 2 * _SHOWN:
        names = [*names[:_SHOWN], "...", *names[-_SHOWN:]]
    return {"names": names, "number": sum(array.size for array in weights.values())}
