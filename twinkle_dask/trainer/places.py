"""What ``residency`` knows of one run, and the line of those that wait for a place."""

from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum, auto

from twinkle_dask.trainer.paging import Paged
from twinkle_dask.trainer.run import Run
from twinkle_dask.types import LoraSpec, RunId, TenantId


class Place(Enum):
    """Where a run is; see the picture in ``residency``."""

    ACTIVE = auto()
    RESTING = auto()
    LEAVING = auto()
    OUT = auto()
    ENTERING = auto()


@dataclass(slots=True, eq=False)
class Slot:
    """A run, or the place that is kept for one to be made.

    Attributes:
        exists: False until the work that makes the run has been done.
        full_bytes: Most bytes on the device while it works.
        more_bytes: What of them is for an optimizer that remembers much.
        counted: Bytes on the device that count as its own.
        ended: Works that ended since it was admitted.
        made: The run that ``CreateRun`` will put here, made elsewhere.
    """

    spec: LoraSpec
    tenant: TenantId
    place: Place
    full_bytes: int
    exists: bool = True
    more_bytes: int = 0
    counted: int = 0
    run: Run | None = None
    paged: Paged | None = None
    made: "Future[Run] | None" = None
    ended: int = 0
    turn_is_over: bool = False


class WaitingLine:
    """Runs in the order of their coming, for each tenant apart. Pure."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[RunId, TenantId] = OrderedDict()
        self._lines: dict[TenantId, OrderedDict[RunId, None]] = {}

    def __len__(self) -> int:
        return len(self._tenants)

    def __contains__(self, name: RunId) -> bool:
        return name in self._tenants

    def add(self, name: RunId, tenant: TenantId) -> None:
        """Let a run that is not in the line stand at its end."""
        self._tenants[name] = tenant
        self._lines.setdefault(tenant, OrderedDict())[name] = None

    def remove(self, name: RunId) -> None:
        """Take a run out; nothing happens if it is not in the line."""
        tenant = self._tenants.pop(name, None)
        if tenant is not None:
            del self._lines[tenant][name]
            if not self._lines[tenant]:
                del self._lines[tenant]

    def tenant(self, name: RunId) -> TenantId:
        """Whose a waiting run is."""
        return self._tenants[name]

    def names(self) -> tuple[RunId, ...]:
        """Everybody, who came first standing first. Any thread: it is copied in one go."""
        return tuple(self._tenants)

    def first(self, used: Mapping[TenantId, int]) -> RunId | None:
        """Who came first of the tenant that uses least; of such tenants, the one here longest."""
        if not self._lines:
            return None
        tenant = min(self._lines, key=lambda tenant: used.get(tenant, 0))
        return next(iter(self._lines[tenant]))
