"""What a tenant does from a terminal: look at runs and checkpoints, sample, download.

Works with the light install alone.
"""

import contextlib
import sys
from collections.abc import Generator
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from twinkle_dask_client import (
    Capabilities,
    Checkpoint,
    ClientError,
    Conversation,
    Message,
    NotConfigured,
    RunInfo,
    SamplingParams,
    Service,
)

Url = Annotated[
    str | None,
    typer.Option(
        "--url", envvar="TWINKLE_DASK_URL", help="Address of the service [http://127.0.0.1:8000]."
    ),
]
Key = Annotated[
    str | None, typer.Option("--api-key", envvar="TWINKLE_DASK_API_KEY", help="Your API key.")
]
Address = Annotated[str, typer.Argument(metavar="twinkle://RUN/KIND/NAME")]

checkpoints_app = typer.Typer(
    help="List or delete checkpoints.", no_args_is_help=True, add_completion=False
)


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to the program's."""
    app.command()(runs)
    app.add_typer(checkpoints_app, name="checkpoints")
    app.command()(sample)
    app.command()(download)


def runs(
    limit: Annotated[int, typer.Option(help="Show so many, the newest first.", min=1)] = 20,
    url: Url = None,
    api_key: Key = None,
) -> None:
    """List your runs, the newest first."""
    with _service(url, api_key) as service:
        page = service.runs(limit=limit)
    table = Table("run", "base model", "rank", "last request", "last checkpoint")
    for run in page.runs:
        table.add_row(*_row(run))
    _print(table)
    if page.next_offset is not None:
        print(f"{page.cursor.total} runs in all; --limit shows more.", file=sys.stderr)


@checkpoints_app.command("list")
def list_checkpoints(
    run: Annotated[str, typer.Argument(help="The run's id, as `runs` shows it.")],
    url: Url = None,
    api_key: Key = None,
) -> None:
    """List a run's checkpoints, oldest first."""
    with _service(url, api_key) as service:
        found = service.checkpoints(run)
    table = Table("address", "kind", "saved", "size", "expires")
    for each in found:
        table.add_row(*_checkpoint_row(each))
    _print(table)


@checkpoints_app.command("delete")
def delete_checkpoint(
    address: Address,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = None,
    api_key: Key = None,
) -> None:
    """Delete a checkpoint for good."""
    if not yes:
        typer.confirm(f"Delete {address}? It cannot be brought back", abort=True)
    with _service(url, api_key) as service:
        service.delete_checkpoint(address)
    print(f"deleted {address}")


def sample(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    model: Annotated[
        str | None, typer.Option(help="A served base model; may be left out if there is one.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="twinkle://...", help="Sample with these weights.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message before it.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.7,
    seed: Annotated[int | None, typer.Option(help="Draw the same again.")] = None,
    url: Url = None,
    api_key: Key = None,
) -> None:
    """Say something to a base model or to what you trained, and print its answer as it comes."""
    messages = [Message(role="user", content=prompt)]
    if system is not None:
        messages.insert(0, Message(role="system", content=system))
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with _service(url, api_key) as service:
        name = model or _only(service.capabilities())
        sampler = service.sampler(name, checkpoint=checkpoint)
        sampler.set_template()
        for text in sampler.stream(Conversation(messages=messages), params):
            print(text, end="", flush=True)
    print()


def download(
    address: Address,
    to: Annotated[
        Path | None, typer.Option("--to", "-o", help="Folder to write [named after it].")
    ] = None,
    url: Url = None,
    api_key: Key = None,
) -> None:
    """Download a checkpoint's adapter: what PEFT loads."""
    folder = to or Path(address.rstrip("/").rsplit("/", 1)[-1])
    with _service(url, api_key) as service:
        try:
            files = service.download(address, folder)
        except (FileExistsError, ValueError) as error:
            raise NotConfigured(str(error)) from error
    for file in files:
        print(file)


@contextlib.contextmanager
def _service(url: str | None, api_key: str | None) -> Generator[Service]:
    """A service, whose failures end the program with a sentence and exit code 1."""
    try:
        with Service(url, api_key=api_key) as service:
            yield service
    except (ClientError, ValueError) as error:
        print(f"twinkle-dask: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _print(table: Table) -> None:
    """As wide as it must be: an id or address that is cut off is of no use to anybody."""
    console = Console()
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    Console(width=max(console.width, needed)).print(table)


def _only(capabilities: Capabilities) -> str:
    names = [model.name for model in capabilities.models]
    if len(names) != 1:
        raise ValueError(f"Name a base model with --model: {', '.join(names)}.")
    return names[0]


def _row(run: RunInfo) -> tuple[str, ...]:
    last = run.last_checkpoint or run.last_sampler_checkpoint
    rank = "" if run.rank is None else str(run.rank)
    name = "" if last is None else last.id
    return run.id, run.base_model, rank, _when(run.last_request_at), name


def _checkpoint_row(checkpoint: Checkpoint) -> tuple[str, ...]:
    size = "" if checkpoint.size_bytes is None else f"{checkpoint.size_bytes / 2**20:.1f} MiB"
    expires = "" if checkpoint.expires_at is None else _when(checkpoint.expires_at)
    kind, saved = checkpoint.kind, _when(checkpoint.created_at)
    return checkpoint.address, kind, saved, size, expires


def _when(time: datetime) -> str:
    return f"{time.astimezone():%Y-%m-%d %H:%M}"
