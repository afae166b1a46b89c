"""Who can reach what."""

import psutil
import pytest

from tests.blackbox.servers import family
from twinkle_dask import LocalService

pytestmark = pytest.mark.timeout(120)


def test_everything_listens_on_loopback_only(service: LocalService) -> None:
    """The gateway, Dask's scheduler with its HTTP server, the workers and their nannies."""
    listening = [
        connection.laddr
        for process in family(service.pid)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 5
    assert {address.ip for address in listening} <= {"127.0.0.1", "::1"}
