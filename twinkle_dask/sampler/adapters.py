"""The adapters a sampler can use: immutable copies on the device, the least recently used evicted.

Adapters in use are never evicted, so the bound on memory is exceeded rather than a request failed;
the host's queue limits by how much.
"""

import logging
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

from twinkle_dask.errors import InvalidRequest, NotFound, Saturated, TwinkleDaskError
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.lora import LoraTensors
from twinkle_dask.types import AdapterState

# Rows of one pass may be multiplied with each other's adapters and the result by zero, which only
# finite numbers survive. Far beyond any adapter that works, and far from overflow.
_LARGEST = 1e15

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    """An adapter, or why there is none."""

    adapter: LoraTensors | None
    error: TwinkleDaskError | None
    num_bytes: int
    users: int = 0


class AdapterStore:
    """Adapters by key."""

    def __init__(self, base: BaseModel, *, max_bytes: int) -> None:
        self._base = base
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first

    @property
    def num_bytes(self) -> int:
        """Bytes of all adapters on the device."""
        return sum(entry.num_bytes for entry in self._entries.values())

    def __contains__(self, key: str) -> bool:
        entry = self._entries.get(key)
        return entry is not None and entry.error is None

    def add(self, key: str, state: AdapterState) -> None:
        """Copy an adapter in, if there is none of that key.

        One that does not fit the base model is remembered as such, for whoever asks for it.
        """
        if key in self:
            return
        self._entries.pop(key, None)
        self._make_room(state.num_bytes)
        try:
            self._check(state)
            adapter = self._load(state)
        except InvalidRequest as error:
            self._entries[key] = _Entry(None, error, 0)
        except (torch.OutOfMemoryError, MemoryError):
            log.warning("No memory for an adapter of %d bytes", state.num_bytes)
            error = Saturated("There is no memory for this adapter at the moment.")
            self._entries[key] = _Entry(None, error, 0)
        else:
            num_bytes = sum(tensor.nbytes for tensor in adapter.master.values())
            self._entries[key] = _Entry(adapter, None, num_bytes)

    def take(self, key: str) -> LoraTensors:
        """The adapter, which stays until it is given back as often as it was taken.

        Raises:
            NotFound: There is none of this key.
            InvalidRequest: What was added under this key does not fit the base model.
            Saturated: There was no memory for it.
        """
        entry = self._entries.get(key)
        if entry is None:
            raise NotFound("The sampler's weights are not loaded; ask for them again.")
        self._entries.move_to_end(key)
        if entry.adapter is None:
            raise entry.error or NotFound("The sampler's weights are not loaded.")
        entry.users += 1
        return entry.adapter

    def give_back(self, key: str) -> None:
        """End one use."""
        self._entries[key].users -= 1

    def _make_room(self, num_bytes: int) -> None:
        self._entries = OrderedDict((k, e) for k, e in self._entries.items() if e.adapter)
        total = self.num_bytes + num_bytes
        for key, entry in list(self._entries.items()):
            if total <= self._max_bytes:
                return
            if entry.users == 0:
                total -= entry.num_bytes
                del self._entries[key]
        if total > self._max_bytes:
            log.warning("Adapters in use take %d bytes, over the bound", total)

    def _load(self, state: AdapterState) -> LoraTensors:
        # No optimizer here, so no float32 masters: they are what is computed with.
        on_device = LoraTensors.from_state(state, device=self._base.device, dtype=self._base.dtype)
        weights = {name: value.to(self._base.dtype) for name, value in on_device.master.items()}
        return LoraTensors(state.spec, weights, dtype=self._base.dtype)

    def _check(self, state: AdapterState) -> None:
        rank = state.spec.rank
        expected: dict[str, tuple[int, int]] = {}
        for target in self._base.targets(state.spec):
            expected |= target.shapes(rank)
        found = {name: array.shape for name, array in state.weights.items()}
        if found != expected:
            wrong = sorted(
                name for name in found | expected if found.get(name) != expected.get(name)
            )
            raise InvalidRequest(
                "This adapter does not fit the base model: "
                f"{len(wrong)} of its weights differ in name or shape, for example {wrong[0]}."
            )
        if not all((np.abs(array) <= _LARGEST).all() for array in state.weights.values()):
            raise InvalidRequest(
                "This adapter has weights that are not finite or too large to compute with; its "
                "training has probably diverged."
            )
