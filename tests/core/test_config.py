"""Settings: where they come from, and what is said about wrong ones."""

from pathlib import Path

import pytest

from twinkle_dask.config import load_config
from twinkle_dask.errors import StartupError


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("models: {a: /m}\nport: 1\nhost: 10.0.0.1\nlimits: {max_rank: 8}\n")
    environment = {
        "TWINKLE_DASK_PORT": "2",
        "TWINKLE_DASK_HOST": "10.0.0.2",
        "TWINKLE_DASK_LIMITS__MAX_SAMPLES": "3",
        "PORT": "9",
    }
    config = load_config(file, {"port": 3, "host": None}, environment)
    assert (config.port, config.host) == (3, "10.0.0.2")
    assert (config.limits.max_rank, config.limits.max_samples) == (8, 3)
    assert config.models["a"].source == "/m"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"modles": {}}, "'models'"),
        ({"models": {"a": "/m"}, "limits": {"max_ranc": 1}}, "'max_rank'"),
        ({"models": {"a": "/m"}, "port": "x"}, "'port'"),
        ({"models": {"a": "/m"}, "port": 70000}, "'port'"),
        ({"models": {"a": {"source": "/m", "trainers": 1}}}, "neither"),
        ({"models": {"a": "/m"}, "api_keys": ["secret"]}, "tml-"),
        ({"models": {"a": "/m"}, "dtype": "int4"}, "'dtype'"),
        ({"models": {}}, "'models'"),
        ({"models": {"a": "/m"}, "engine": {"adapter_bytes": 0}}, "'engine.adapter_bytes'"),
        ({"models": {"a": "/m"}, "engine": {"deterministic": 7}}, "'engine.deterministic'"),
        ({"models": {"a": "/m"}, "url_prefix": "a"}, "'url_prefix'"),
        ({"models": {"a": "/m"}, "url_prefix": "/a/"}, "'/a/b'"),
        ({"models": {"a": "/m"}, "url_prefix": "/a?b"}, "'url_prefix'"),
        ({"models": {"a": "/m"}, "dashboard": ":8787"}, "HOST:PORT"),
        (
            {"models": {"a": "/m"}, "dashboard": "127.0.0.1:1", "scheduler": "tcp://h:1"},
            "'dashboard' is for the embedded cluster",
        ),
        ({}, "'models' is missing"),
    ],
)
def test_wrong_settings_are_named(flags: dict[str, object], told: str) -> None:
    with pytest.raises(StartupError, match=told):
        load_config(None, flags, {})


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", ""])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(StartupError, match=r"config\.yaml"):
        load_config(file, {}, {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml", {}, {})


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("10.1.1.1", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert load_config(None, {"models": {"a": "/m"}, "host": host}, {}).loopback is loopback
