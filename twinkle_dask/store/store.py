"""The durable records of the service, family by family."""

from dataclasses import dataclass
from pathlib import Path

from twinkle_dask.store.audit import AuditEvents
from twinkle_dask.store.checkpoints import Checkpoints
from twinkle_dask.store.copies import Copies
from twinkle_dask.store.custom_losses import CustomLosses
from twinkle_dask.store.database import Database
from twinkle_dask.store.inflight import InflightWeights
from twinkle_dask.store.journal import Journal
from twinkle_dask.store.keys import Keys
from twinkle_dask.store.processors import Processors
from twinkle_dask.store.recorded import RecordedSamples
from twinkle_dask.store.run_settings import RunSettings
from twinkle_dask.store.runs import Runs
from twinkle_dask.store.sampler_settings import SamplerSettings
from twinkle_dask.store.samplers import Samplers
from twinkle_dask.store.searches import Searches
from twinkle_dask.store.secrets import Secrets
from twinkle_dask.store.sessions import Sessions
from twinkle_dask.store.sharing import Sharing
from twinkle_dask.store.uploads import Uploads
from twinkle_dask.store.usage import Usage


def sqlite_url(file: Path) -> str:
    """The URL of a SQLite database in ``file``."""
    return f"sqlite:///{file}"


@dataclass(frozen=True, slots=True)
class Store:
    """Records in one database; every method of its parts returns only when its write is durable.

    Writes of all callers go through one group-committing writer in the order of the calls, so
    several may be awaited together at the price of about one. A store belongs to the event loop
    that opened it.
    """

    keys: Keys
    sessions: Sessions
    runs: Runs
    run_settings: RunSettings
    samplers: Samplers
    sampler_settings: SamplerSettings
    inflight: InflightWeights
    recorded: RecordedSamples
    journal: Journal
    checkpoints: Checkpoints
    copies: Copies
    custom_losses: CustomLosses
    processors: Processors
    secrets: Secrets
    audit: AuditEvents
    usage: Usage
    searches: Searches
    sharing: Sharing
    uploads: Uploads
    _database: Database

    @classmethod
    async def open(cls, url: str) -> "Store":
        """Connect and bring the schema up to date.

        Args:
            url: ``sqlite:///<file>`` (see ``sqlite_url``) or ``postgresql://user@host/database``.

        Raises:
            StartupError: The URL is unusable, or a newer version made the database.
            StorageFailed: The database cannot be reached or written.
        """
        database = await Database.open(url)
        return cls(
            keys=Keys(database),
            sessions=Sessions(database),
            runs=Runs(database),
            run_settings=RunSettings(database),
            samplers=Samplers(database),
            sampler_settings=SamplerSettings(database),
            inflight=InflightWeights(database),
            recorded=RecordedSamples(database),
            journal=Journal(database),
            checkpoints=Checkpoints(database),
            copies=Copies(database),
            custom_losses=CustomLosses(database),
            processors=Processors(database),
            secrets=Secrets(database),
            audit=AuditEvents(database),
            usage=Usage(database),
            searches=Searches(database),
            sharing=Sharing(database),
            uploads=Uploads(database),
            _database=database,
        )

    async def close(self) -> None:
        """Finish the writes under way and close every connection. Repeating it is harmless."""
        await self._database.close()
