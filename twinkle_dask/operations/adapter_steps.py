"""Optimizer steps of adapters, by the optimizer and schedule that are kept with them.

Calls on one adapter are done in the order of their arrival.
"""

from dataclasses import replace

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.adapter_settings import AdapterSettings, Named
from twinkle_dask.operations.adapters import Adapters
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.operations.training import Training
from twinkle_dask.operations.values import Tenant
from twinkle_dask.store.store import Store
from twinkle_dask.types import ClipGradient, GradientStep, GradientStepResult, RunId


class AdapterSteps:
    """What spends gradients. Each call waits until its work is done."""

    def __init__(
        self, *, adapters: Adapters, training: Training, tickets: TicketBoard, store: Store
    ) -> None:
        self._adapters = adapters
        self._training = training
        self._tickets = tickets
        self._store = store

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
            optimizer = settings.optimizer_spec
            request = GradientStep(
                clip=clip,
                step=optimizer if step else None,
                optimizer=optimizer,
                schedule=settings.schedule_spec,
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

    async def learning_rate(
        self, tenant: Tenant, run: RunId, settings: AdapterSettings
    ) -> float | None:
        """What the next step will use, asked of the host; None without an optimizer.

        The caller holds the adapter's lock.
        """
        if settings.optimizer is None:
            return None
        # Asked for anew: a checkpoint may have been loaded meanwhile.
        request = GradientStep(
            optimizer=settings.optimizer_spec,
            schedule=settings.schedule_spec,
            accumulation=settings.accumulation,
        )
        return (await self._stepped(tenant, run, request)).learning_rate

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
                optimizer=settings.optimizer_spec,
                schedule=settings.schedule_spec,
                fresh_optimizer=optimizer is not None,
                fresh_schedule=True,
                accumulation=settings.accumulation,
            )
            result = await self._stepped(tenant, run, request)
            # Written last: until here the former settings were in force.
            await self._store.run_settings.set_settings(run, settings.json())
            progress = replace(adapter.progress, learning_rate=result.learning_rate)
            await self._adapters.keep(run, progress)

    async def _stepped(
        self, tenant: Tenant, run: RunId, request: GradientStep
    ) -> GradientStepResult:
        ticket = await self._training.gradient_step(tenant, run, step=request)
        return await self._tickets.take(tenant.id, ticket.id, GradientStepResult)
