"""Adapters for other programs: two files, encrypted for whoever was named."""

from pathlib import Path
from typing import Any

import numpy as np
import pyrage  # pyright: ignore[reportMissingTypeStubs]
import pytest

from twinkle_dask.checkpoints import encryption
from twinkle_dask.checkpoints.exports import ADAPTER_FILES, write_export
from twinkle_dask.checkpoints.folders import write_state
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.types import AdapterState, LoraSpec, RunState

_age: Any = pyrage

ADAPTER = AdapterState(
    spec=LoraSpec(rank=2, seed=1),
    weights={
        "model.layers.0.q_proj.lora_A.weight": np.ones((2, 8), np.float32),
        "model.layers.0.q_proj.lora_B.weight": np.zeros((4, 2), np.float32),
    },
)
SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGPkUnSOyrm0PQIsi+EXFFTOPyk2RrDgDbZM9tQgM+P/ someone"


@pytest.fixture(params=["local", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path if request.param == "local" else f"memory://{tmp_path.name}")


def test_an_export_is_the_adapter_of_a_checkpoint(blobs: BlobStore) -> None:
    write_state(blobs, "state", RunState(adapter=ADAPTER), base_model="tiny")
    write_export(blobs, "export", ADAPTER, base_model="tiny")
    size = write_export(blobs, "export", ADAPTER, base_model="tiny")  # a repeat changes nothing
    names = blobs.names("export")
    assert set(names) <= ADAPTER_FILES
    assert size == sum(blobs.size(f"export/{name}") for name in names)
    for name in names:
        assert blobs.get(f"export/{name}") == blobs.get(f"state/{name}")


def test_an_encrypted_export_is_for_its_recipients(blobs: BlobStore) -> None:
    write_export(blobs, "plain", ADAPTER, base_model="tiny")
    identities = [_age.x25519.Identity.generate() for _ in range(2)]
    recipients = [f" {identity.to_public()}\n" for identity in identities]
    size = write_export(
        blobs, "secret", ADAPTER, base_model="tiny", recipients=[*recipients, SSH_KEY]
    )
    names = blobs.names("secret")
    assert set(names) <= ADAPTER_FILES
    assert size == sum(blobs.size(f"secret/{name}") for name in names)
    for name in names:
        for identity in identities:
            plain = _age.decrypt(blobs.get(f"secret/{name}"), [identity])
            assert plain == blobs.get(f"plain/{name.removesuffix('.age')}")


@pytest.mark.parametrize(
    "text",
    ["", "age1", "age1" + "q" * 58, "AGE-SECRET-KEY-1QQ", "ssh-ed25519", "ssh-dss AAAA", "é"],
)
def test_what_is_no_recipient_is_named_by_its_place(text: str) -> None:
    good = str(_age.x25519.Identity.generate().to_public())
    with pytest.raises(InvalidRequest, match=r"Recipient 1 is no public key"):
        encryption.parse([good, text])
