"""Our own light client against the real service."""

import pytest
import tinker

import twinkle_dask_client as light
from tests.blackbox.conftest import ALIAS, KEY, MODEL, OTHER_KEY
from twinkle_dask import LocalService


def test_health_capabilities_and_runs(service: LocalService, client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(MODEL, rank=3, user_metadata={"a": "b"}).result()
    with light.Service(service.url, api_key=KEY) as mine:
        mine.health()
        assert {model.name for model in mine.capabilities().models} == {MODEL, ALIAS}
        found = next(each for each in mine.iter_runs() if each.id == run.model_id)
        assert (found.base_model, found.rank) == (MODEL, 3)
        assert found.last_request_at.tzinfo is not None
    with light.Service(service.url, api_key=OTHER_KEY) as other:
        assert run.model_id not in {each.id for each in other.iter_runs()}


async def test_the_async_twin(service: LocalService) -> None:
    async with light.AsyncService(service.url, api_key=KEY) as mine:
        assert {model.name for model in (await mine.capabilities()).models} == {MODEL, ALIAS}


def test_a_wrong_key_is_told(service: LocalService) -> None:
    with (
        light.Service(service.url, api_key="tml-nobody-knows-it") as stranger,
        pytest.raises(light.NotAuthenticated, match="not known"),
    ):
        stranger.capabilities()
