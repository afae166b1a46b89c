"""Starting and stopping the server, rightly and wrongly."""

import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import tinker

from tests.blackbox.conftest import MODEL
from tests.blackbox.data import batch, train_one_step
from tests.blackbox.servers import COMMAND, family, gone, run, serve
from twinkle_dask import local_service
from twinkle_dask.errors import StartupError

pytestmark = pytest.mark.timeout(120)  # starts with model loading on busy cores

KEY = "tml-test-of-serving"


def arguments(model: Path, data_dir: Path, *more: str) -> list[str]:
    return ["--model", f"{MODEL}={model}", "--data-dir", str(data_dir), "--port", "0", *more]


def test_sigterm_ends_everything_within_5_s(model_folder: Path, tmp_path: Path) -> None:
    with serve(*arguments(model_folder, tmp_path), log=tmp_path / "log") as server:
        processes = family(server.pid)
        assert len(processes) > 1
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0
        assert gone(processes, 1)
        assert server.process.stdout is not None
        assert server.process.stdout.read() == b""


def test_sigterm_during_the_start(model_folder: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "serve", *arguments(model_folder, tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stderr is not None
        while len(processes := family(process.pid)) < 2:
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert gone(processes, 1)


def test_sigterm_under_load(model_folder: Path, tmp_path: Path) -> None:
    """Training and held polls do not keep the server from ending in time."""
    options = arguments(model_folder, tmp_path, "--api-key", KEY)
    with serve(*options, log=tmp_path / "log") as server:
        client = tinker.ServiceClient(base_url=server.url, api_key=KEY)
        run_ = client.create_lora_training_client(MODEL, rank=4).result()
        for _ in range(5):
            run_.forward_backward(batch(num=100, length=200), "cross_entropy")
        processes = family(server.pid)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0
        assert gone(processes, 1)


def test_a_key_is_made_and_shown_once(model_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serve(*arguments(model_folder, tmp_path), log=log) as server:
        lines = [line for line in log.read_text().splitlines() if "tml-" in line]
        assert len(lines) == 1
        key = lines[0].split()[-1]
        answer = httpx.get(f"{server.url}/api/v1/training_runs", headers={"x-api-key": key})
        assert answer.status_code == 200
        # Only its hash is kept.
        stored = [path.read_bytes() for path in tmp_path.glob("*.sqlite3*")]
        assert stored
        assert not any(key.encode() in content for content in stored)
        # The same folder cannot be used twice.
        second = run("serve", *arguments(model_folder, tmp_path))
        assert second.returncode == 2
        assert "another server" in second.stderr.lower()


def test_an_open_address_needs_a_key(model_folder: Path, tmp_path: Path) -> None:
    ended = run("serve", *arguments(model_folder, tmp_path, "--host", "0.0.0.0"))
    assert ended.returncode == 2
    assert "--api-key" in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("source", "told"),
    [("/nowhere/at/all", "does not exist"), ("{tmp}/empty", "config.json"), ("{tmp}/bad", "")],
)
def test_a_model_that_is_none(tmp_path: Path, source: str, told: str) -> None:
    (tmp_path / "empty").mkdir()
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text('{"model_type": "qwen3"}')
    (bad / "model.safetensors").write_bytes(b"not tensors at all")
    source = source.format(tmp=tmp_path)
    ended = run("serve", "--model", f"x={source}", "--port", "0", "--data-dir", str(tmp_path / "d"))
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("twinkle-dask: ")
    assert told in ended.stderr
    assert Path(source).name in ended.stderr
    assert ended.stdout == ""


def test_a_data_folder_that_cannot_be_written(model_folder: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    ended = run("serve", *arguments(model_folder, blocked / "data"))
    assert ended.returncode == 2
    assert str(blocked) in ended.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model", "no-separator"], "NAME=SOURCE"),
        ([], "models"),
        (["--model", "a=b", "--api-key", "short"], "tml-"),
        (["--model", "a=b", "--dtype", "int3"], "dtype"),
        (["--model", "a=b", "--dashboard", "127.0.0.1:1", "--scheduler", "tcp://h:1"], "dashboard"),
    ],
)
def test_wrong_flags_are_named(options: list[str], told: str) -> None:
    ended = run("serve", *options)
    assert ended.returncode == 2
    assert told in ended.stderr


def test_check_config_tells_the_nearest_known_setting(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("models: {a: /m}\nprot: 1\n")
    ended = run("check-config", "--config", str(file))
    assert ended.returncode == 2
    assert "'port'" in ended.stderr


def test_check_config_refuses_what_serve_would(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("models: {a: /m}\nurl_prefix: no-slash\n")
    for command in ("check-config", "serve"):
        ended = run(command, "--config", str(file))
        assert ended.returncode == 2
        assert "url_prefix" in ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_database_that_cannot_be_reached_is_told(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("database_url: postgresql://nobody@127.0.0.1:1/none\n")
    ended = run("serve", *arguments(model_folder, tmp_path / "d", "--config", str(file)))
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines()[-1].startswith("twinkle-dask: ")
    assert "Traceback" not in ended.stderr


def test_configured_trainers_and_samplers_are_started(model_folder: Path, tmp_path: Path) -> None:
    """The embedded cluster has as many workers as the configuration asks for."""
    file = tmp_path / "c.yaml"
    file.write_text(
        f"models: {{{MODEL}: {{source: {model_folder}, trainers: 1, samplers: 2}}}}\n"
        "start_timeout_s: 60\n"
    )
    options = ["--config", str(file), "--data-dir", str(tmp_path / "d"), "--port", "0"]
    options += ["--api-key", KEY, "--dtype", "float32"]
    log = tmp_path / "log"
    with (
        serve(*options, log=log) as server,
        tinker.ServiceClient(base_url=server.url, api_key=KEY) as client,
    ):
        assert log.read_text().count('"event": "host_ready"') == 3
        run_ = client.create_lora_training_client(MODEL, rank=1).result()
        train_one_step(run_, batch())
        sampler = run_.save_weights_and_get_sampling_client().result()
        params = tinker.SamplingParams(max_tokens=2)
        reply = sampler.sample(tinker.ModelInput.from_ints([1, 2]), 1, params).result()
        assert len(reply.sequences) == 1


def test_doctor_finds_this_machine_fit(tmp_path: Path) -> None:
    ended = run("doctor", "--data-dir", str(tmp_path))
    assert ended.returncode == 0, ended.stdout
    assert "torch" in ended.stdout


def _small_files() -> None:
    # Beyond this size a write fails as on a full disk; the signal that comes with it is ignored.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 2**20, 3 * 2**20))


def test_a_full_disk_fails_the_checkpoint_and_not_the_run(
    model_folder: Path, tmp_path: Path
) -> None:
    options = arguments(model_folder, tmp_path, "--api-key", KEY, "--dtype", "float32")
    log = tmp_path / "log"
    with (
        serve(*options, log=log, before_exec=_small_files) as server,
        tinker.ServiceClient(base_url=server.url, api_key=KEY) as client,
    ):
        run_ = client.create_lora_training_client(MODEL, rank=128).result()
        data = batch()
        train_one_step(run_, data)
        with pytest.raises(tinker.RequestFailedError, match=r"(?i)disk|space|large"):
            run_.save_state("too-big").result()
        listed = (
            tinker.RestClient(base_url=server.url, api_key=KEY)
            .list_checkpoints(run_.model_id)
            .result()
        )
        assert listed.checkpoints == []
        train_one_step(run_, data)
        small = client.create_lora_training_client(MODEL, rank=1).result()
        assert small.save_state("fits").result().path.endswith("/weights/fits")


def test_local_service_leaves_nothing_behind(model_folder: Path) -> None:
    with local_service({MODEL: str(model_folder)}) as service:
        processes = family(service.pid)
        folder = service.data_dir
        rest = tinker.RestClient(base_url=service.url, api_key=service.api_key)
        served = rest.get_server_capabilities().result().supported_models
        assert [model.model_name for model in served] == [MODEL]
    assert gone(processes, 1)
    assert not folder.exists()


def test_local_service_tells_why_it_did_not_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="does not exist"), local_service({"x": "/no/where/x"}):
        pass


def test_local_service_ends_with_its_program(model_folder: Path, tmp_path: Path) -> None:
    """Even when the program is killed."""
    program = (
        "import sys, time\n"
        "from twinkle_dask import local_service\n"
        f"with local_service({{'m': {str(model_folder)!r}}}, data_dir={str(tmp_path)!r}) as s:\n"
        "    print(s.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=dict(os.environ)
    ) as process:
        assert process.stdout is not None
        processes = family(int(process.stdout.readline()))
        process.kill()
        assert gone(processes, 10)


def test_a_taken_port_is_refused(model_folder: Path, tmp_path: Path) -> None:
    """Before any model is loaded."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = run("serve", *arguments(model_folder, tmp_path, "--port", port))
    assert ended.returncode == 2
    assert port in ended.stderr
    assert "Loaded" not in ended.stderr
