"""The command ``twinkle-dask``."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from twinkle_dask import cli_keys, cli_user
from twinkle_dask.errors import StartupError, TwinkleDaskError

app = typer.Typer(
    help="Train and sample LoRA adapters of one shared base model over HTTP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.add_typer(cli_keys.app, name="keys")
cli_user.add_commands(app)

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="NAME=SOURCE",
        help="Serve SOURCE (Hugging Face folder, GGUF file or folder, hub id) as NAME; repeatable.",
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with the same settings.")
]


@app.command()
def serve(
    model: Models = None,
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one [8000].")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of everything durable [twinkle-data].")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(metavar="tml-...", help="An API key; each is a tenant; repeatable."),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="tcp://...", help="Use this Dask cluster's workers that carry GPU."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the base weights: auto, float32 or bfloat16 [auto].")
    ] = None,
    dashboard: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Show the embedded cluster's Dask dashboard here."),
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option(help="Make a run's results independent of who else trains, bit for bit."),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    until_stdin_closes: Annotated[
        bool, typer.Option(help="Stop when standard input ends (for programs that start us).")
    ] = False,
) -> None:
    """Serve until SIGTERM. Prints ``READY http://HOST:PORT`` when requests can be served."""
    flags = {
        "models": _models(model),
        "host": host,
        "port": port,
        "data_dir": data_dir,
        "api_keys": api_key or None,
        "scheduler": scheduler,
        "dtype": dtype,
        "dashboard": dashboard,
        "engine": None if deterministic is None else {"deterministic": deterministic},
        "log_level": log_level,
    }
    loaded = _load(config, flags)
    from twinkle_dask import logs
    from twinkle_dask.event_loops import loop_factory
    from twinkle_dask_gateway.serve import serve as run

    logs.configure(loaded.log_level)

    def ready(url: str) -> None:
        print(f"READY {url}", flush=True)

    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(run(loaded, ready=ready, until_stdin_closes=until_stdin_closes))
    except TwinkleDaskError as error:  # StorageFailed too: a database that cannot be reached
        _fail(error)


@app.command()
def check_config(model: Models = None, config: ConfigFile = None) -> None:
    """Read the configuration as ``serve`` would, and say what is wrong or print the result."""
    loaded = _load(config, {"models": _models(model)})
    from twinkle_dask.operations.tenants import key_hint
    from twinkle_dask_gateway.serve import check

    try:
        check(loaded)
    except StartupError as error:
        _fail(error)
    shown = loaded.model_dump(mode="json")
    shown["api_keys"] = [f"...{key_hint(key)}" for key in loaded.api_keys]
    import yaml

    print(yaml.safe_dump(shown, sort_keys=False), end="")


@app.command()
def doctor(
    data_dir: Annotated[Path, typer.Option(help="Where the service would keep its data.")] = Path(
        "twinkle-data"
    ),
) -> None:
    """Say what this machine has and what it lacks. Exit code 1 if ``serve`` could not work."""
    from twinkle_dask.doctor import examine, show

    findings = examine(data_dir)
    show(findings)
    if any(finding.fatal for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="twinkle-dask")


def _load(file: Path | None, flags: dict[str, Any]) -> Any:
    # Imported late, as are the others: the bare install has the command but not the server.
    try:
        from twinkle_dask.config import load_config
    except ModuleNotFoundError as error:
        _fail(
            StartupError(
                f"The server needs {error.name}: pip install 'twinkle-dask[server]'. "
                "Run 'twinkle-dask doctor' for more."
            )
        )
    try:
        return load_config(file, flags)
    except StartupError as error:
        _fail(error)


def _models(pairs: list[str] | None) -> dict[str, str] | None:
    if not pairs:
        return None
    models: dict[str, str] = {}
    for pair in pairs:
        name, separator, source = pair.partition("=")
        if not (name and separator and source):
            _fail(StartupError(f"--model takes NAME=SOURCE, not {pair!r}."))
        models[name] = source
    return models


def _fail(error: TwinkleDaskError) -> NoReturn:
    print(f"twinkle-dask: {error.message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
