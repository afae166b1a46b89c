"""Puts the whole service together in one event loop, and takes it down again."""

import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from twinkle_dask.config import ServiceConfig
from twinkle_dask.model.source import check_source
from twinkle_dask.operations.service import Service, open_service
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.data_dir import DataDir, open_data_dir
from twinkle_dask.store.store import Store
from twinkle_dask_gateway.app import create_app
from twinkle_dask_gateway.config import GatewayConfig
from twinkle_dask_gateway.server import bind, serve_http

log = structlog.stdlib.get_logger(__name__)


def check(config: ServiceConfig) -> None:
    """Look for what would stop the service, as far as that shows without starting it.

    Raises:
        StartupError: A model source that cannot be one.
    """
    for model in config.models.values():
        check_source(model.source)


async def serve(
    config: ServiceConfig, *, ready: Callable[[str], None], until_stdin_closes: bool
) -> None:
    """Run the service until SIGTERM or SIGINT.

    Args:
        config: Of the whole service.
        ready: Called once with the URL, when requests can be served.
        until_stdin_closes: Also stop when standard input ends.

    Raises:
        StartupError: The service cannot start; nothing is left running.
    """
    check(config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if until_stdin_closes:
        loop.add_reader(sys.stdin.fileno(), _on_stdin, loop, stop)
    gateway = _gateway(config)
    # Whatever can be refused is refused before a model is loaded.
    with open_data_dir(config.data_dir) as data_dir, bind(gateway) as listener:
        begun = asyncio.Event()
        http = _Http(config=gateway, listener=listener, ready=ready, begun=begun, stop=stop)
        serving = asyncio.create_task(_serve(config, data_dir, http))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not begun.is_set():
            # A start that is under way; a large model loads for minutes.
            serving.cancel()
        try:
            await serving
        except asyncio.CancelledError:
            log.info("start_cancelled")
    log.info("stopped")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Http:
    """What HTTP serving needs besides the service."""

    config: GatewayConfig
    listener: socket.socket
    ready: Callable[[str], None]
    begun: asyncio.Event
    stop: asyncio.Event


async def _serve(config: ServiceConfig, data_dir: DataDir, http: _Http) -> None:
    blobs = BlobStore(config.blob_url or data_dir.blobs_dir)
    # On a separate cluster a worker may be in the middle of writing for a gateway before us.
    age_s = 3600.0 if config.scheduler else 0.0
    await asyncio.to_thread(blobs.clean_temporary, older_than_s=age_s)
    store = await Store.open(config.database_url or data_dir.database_url)
    try:
        async with open_service(config, store, blobs) as service:
            _tell_key(service)
            host = f"[{config.host}]" if ":" in config.host else config.host

            def started(port: int) -> None:
                http.begun.set()
                http.ready(f"http://{host}:{port}{config.url_prefix}")

            app = create_app(service, http.config)
            # What is there by now stays. Looked through by the collector now and then, some 200,000
            # objects would stop the loop for a tenth of a second each time.
            gc.collect()
            gc.freeze()
            await serve_http(app, http.config, http.listener, started=started, stop=http.stop)
    finally:
        await store.close()


def _tell_key(service: Service) -> None:
    if service.made_key is not None:
        # On standard error beside the log, as plain text, since a person is to copy it.
        print(f"API key (shown once): {service.made_key}", file=sys.stderr, flush=True)


def _gateway(config: ServiceConfig) -> GatewayConfig:
    return GatewayConfig(
        host=config.host,
        port=config.port,
        url_prefix=config.url_prefix,
        public_url=config.public_url,
        max_body_bytes=config.limits.max_body_bytes,
        max_decoded_bytes=config.limits.max_body_bytes,
        max_data=config.limits.max_data,
        compress_forward_backward=config.compress_uploads,
        custom_losses=config.custom_losses,
        multiplex_polls=config.multiplex_polls,
        tokens=config.tokens.enabled,
        token_lifetime_s=config.tokens.lifetime_s,
        info_message=config.notices.info,
        warning_message=config.notices.warning,
        error_message=config.notices.error,
    )


def _on_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        loop.remove_reader(sys.stdin.fileno())
        stop.set()
