import inspect

import httpx
import pytest

from twinkle_dask_client import AsyncService, NotConfigured, Service


def echo(seen: list[httpx.Request]) -> httpx.MockTransport:
    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"status": "ok"})

    return httpx.MockTransport(answer)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TWINKLE_DASK_URL", raising=False)
    monkeypatch.delenv("TWINKLE_DASK_API_KEY", raising=False)


def test_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_DASK_URL", "https://example.test:1234")
    monkeypatch.setenv("TWINKLE_DASK_API_KEY", "tml-from-environment")
    seen: list[httpx.Request] = []
    with Service(transport=echo(seen)) as service:
        service.health()
    assert str(seen[0].url) == "https://example.test:1234/api/v1/healthz"
    assert seen[0].headers["x-api-key"] == "tml-from-environment"


def test_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_DASK_URL", "https://example.test")
    monkeypatch.setenv("TWINKLE_DASK_API_KEY", "tml-from-environment")
    seen: list[httpx.Request] = []
    with Service("http://other.test", api_key="tml-other", transport=echo(seen)) as service:
        service.health()
    assert seen[0].url.host == "other.test"
    assert seen[0].headers["x-api-key"] == "tml-other"


def test_without_anything_it_is_the_local_service_without_a_key() -> None:
    seen: list[httpx.Request] = []
    with Service(transport=echo(seen)) as service:
        service.health()
    assert str(seen[0].url) == "http://127.0.0.1:8000/api/v1/healthz"
    assert "x-api-key" not in seen[0].headers


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://a", "http://", "http://a:port", "nonsense"]
)
@pytest.mark.parametrize("service", [Service, AsyncService])
def test_an_unusable_address_is_told_at_once(
    url: str, service: type[Service] | type[AsyncService]
) -> None:
    with pytest.raises(NotConfigured, match="address"):
        service(url)


@pytest.mark.parametrize("key", ["tml-ü", "tml-a\nb"])
def test_an_unusable_key_is_told_and_not_shown(key: str) -> None:
    with pytest.raises(NotConfigured) as caught:
        Service(api_key=key)
    assert key not in str(caught.value)


def public_methods(service: type) -> dict[str, list[str]]:
    methods = inspect.getmembers(service, inspect.isfunction)
    return {
        name: list(inspect.signature(method).parameters)
        for name, method in methods
        if not name.startswith("_")
    }


def test_the_twins_take_the_same() -> None:
    assert public_methods(Service) == public_methods(AsyncService)
    ours, theirs = (inspect.signature(each).parameters for each in (Service, AsyncService))
    assert list(ours) == list(theirs)


async def test_async_service_closes_with_its_block() -> None:
    seen: list[httpx.Request] = []
    async with AsyncService(transport=echo(seen)) as service:
        await service.health()
    assert len(seen) == 1
    with pytest.raises(RuntimeError, match="closed"):
        await service.health()
