"""The commands ``twinkle-dask keys``: they work on the database, beside a running server too."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer

from twinkle_dask.errors import StartupError, TwinkleDaskError

if TYPE_CHECKING:
    from twinkle_dask.store.store import Store

T = TypeVar("T")

app = typer.Typer(
    help="Make, list and revoke API keys. A running server knows within seconds.",
    no_args_is_help=True,
)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="The server's YAML file, to find its database.")
]
DataDir = Annotated[
    Path | None, typer.Option(help="The server's data folder, to find its database [twinkle-data].")
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is called, for example 'laptop'.")],
    tenant: Annotated[
        str | None,
        typer.Option(help="Whose it is: keys of one tenant share everything [the key's name]."),
    ] = None,
    note: Annotated[str | None, typer.Option(help="Whatever helps to remember.")] = None,
    email: Annotated[
        str | None, typer.Option(help="Of the holder; 'tinker auth whoami' shows it.")
    ] = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    from twinkle_dask.operations.tenants import create_key

    def work(store: "Store") -> Awaitable[str]:
        return create_key(store, tenant=tenant or name, name=name, note=note, email=email)

    print(_with_store(config, data_dir, work))


@app.command("list")
def list_keys(config: ConfigFile = None, data_dir: DataDir = None) -> None:
    """List the keys, oldest first; never the keys themselves."""
    from rich.console import Console
    from rich.table import Table

    keys = _with_store(config, data_dir, lambda store: store.keys.all())
    table = Table("id", "tenant", "name", "ends in", "from", "made", "revoked", "note")
    for key in keys:
        table.add_row(
            str(key.key_id),
            key.tenant_id,
            key.name,
            key.hint,
            key.origin or "configured",
            f"{key.created_at:%Y-%m-%d %H:%M}",
            "" if key.revoked_at is None else f"{key.revoked_at:%Y-%m-%d %H:%M}",
            key.note or "",
        )
    # Into a pipe a table is written as wide as it is.
    Console(width=None if sys.stdout.isatty() else 300).print(table)


@app.command()
def revoke(
    key_id: Annotated[int, typer.Argument(help="From 'twinkle-dask keys list'.")],
    config: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """End a key and all tokens that were given for it. What its tenant has stays."""
    from twinkle_dask.operations.tenants import revoke_key

    key = _with_store(config, data_dir, lambda store: revoke_key(store, key_id))
    print(f"Revoked key {key.key_id} ({key.name}) of tenant {key.tenant}.")


def _with_store(
    config: Path | None, data_dir: Path | None, work: "Callable[[Store], Awaitable[T]]"
) -> T:
    """Do something with the records of the service that is configured so."""
    try:
        from twinkle_dask.config import load_places
        from twinkle_dask.store.data_dir import database_url_of
        from twinkle_dask.store.store import Store
    except ModuleNotFoundError as error:
        _fail(StartupError(f"Keys need {error.name}: pip install 'twinkle-dask[server]'."))

    async def run() -> T:
        store = await Store.open(url)
        try:
            return await work(store)
        finally:
            await store.close()

    try:
        places = load_places(config, {"data_dir": data_dir})
        url = places.database_url or database_url_of(places.data_dir)
        return asyncio.run(run())
    except TwinkleDaskError as error:
        _fail(error)


def _fail(error: TwinkleDaskError) -> NoReturn:
    print(f"twinkle-dask: {error.message}", file=sys.stderr, flush=True)
    raise SystemExit(2)
