"""What the gateway's answers are held against: the same server around the least there can be."""

import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

_BODY = b'{"status":"ok"}'
_START: dict[str, Any] = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"15")],
}


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Read the body, if there is one, and say ok."""
    while (await receive()).get("more_body"):
        pass
    await send(_START)
    await send({"type": "http.response.body", "body": _BODY})


@contextmanager
def bare_server() -> Generator[str]:
    """The app in a process of its own; gives its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.terminate()
        process.wait(10)
        process.stdout.close()


if __name__ == "__main__":
    import uvicorn

    from twinkle_dask_gateway.config import GatewayConfig
    from twinkle_dask_gateway.server import bind

    with bind(GatewayConfig(port=0)) as listener:
        listener.listen(2048)
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        settings = uvicorn.Config(
            app, http="httptools", lifespan="off", access_log=False, log_level="warning"
        )
        uvicorn.Server(settings).run(sockets=[listener])
