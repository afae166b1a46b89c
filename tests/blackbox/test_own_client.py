"""Our own client and the commands built on it, against the real service."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

import twinkle_dask_client as light
from tests.blackbox.conftest import KEY, MODEL, OTHER_KEY
from tests.blackbox.plain import PlainRun, load
from twinkle_dask import LocalService
from twinkle_dask_client import Feature, Lora, Message, SamplingParams

pytestmark = pytest.mark.timeout(120)

PROMPT, ANSWER = [20, 21, 22, 23], [40, 41, 42]
EXAMPLE = Feature.of(PROMPT, ANSWER)
GREEDY = SamplingParams(max_tokens=3, temperature=0.0, logprobs=1)


@pytest.fixture
def mine(service: LocalService) -> Generator[light.Service]:
    with light.Service(service.url, api_key=KEY, progress=False) as connected:
        yield connected


def trained(service: light.Service, steps: int = 12) -> light.Run:
    run = service.create_run(MODEL, lora=Lora(rank=8, alpha=16))
    run.set_optimizer("AdamW", lr=1e-2)
    for _ in range(steps):
        run.forward_backward([EXAMPLE])
        run.step()
    return run


def test_a_run_learns_is_saved_sampled_and_goes_on(mine: light.Service) -> None:
    run = mine.create_run(MODEL, lora=Lora(rank=8, alpha=16))
    run.set_template("Template", max_length=128)
    run.set_loss("CrossEntropyLoss")
    run.set_optimizer("AdamW", lr=1e-2)
    run.set_lr_scheduler("LinearLR", start_factor=1.0, end_factor=0.1, total_iters=12)
    losses: list[float] = []
    for _ in range(12):
        loss = run.forward_backward([EXAMPLE]).loss
        assert loss is not None
        losses.append(loss)
        run.step()
    # The random model's final norm keeps its logits small, so the loss cannot come near 0.
    assert losses[-1] < losses[0] - 2
    assert "loss" in run.metrics()
    assert "AdamW" in run.configuration()

    saved = run.save("half")
    for_sampler = run.save_for_sampler()
    (plain,) = mine.sampler(MODEL).sample([Feature(input_ids=PROMPT)], GREEDY)
    sampler = mine.sampler(MODEL, checkpoint=for_sampler.address)
    (learned,) = sampler.sample([Feature(input_ids=PROMPT)], GREEDY)
    assert list(learned.sequences[0].tokens) == ANSWER
    assert list(plain.sequences[0].tokens) != ANSWER

    again = mine.create_run(MODEL, name="again", lora=Lora(rank=8, alpha=16))
    again.load(saved.address)
    here, there = (each.forward([EXAMPLE]).logprobs for each in (run, again))
    assert here == there


class LosingAnswers(httpx.HTTPTransport):
    """The service does what it is asked, and some of its answers never come."""

    def __init__(self) -> None:
        super().__init__()
        self.lose: str = ""
        self.asked: Counter[str] = Counter()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send it; once for each ``lose`` the connection breaks when the answer comes."""
        response = super().handle_request(request)
        operation = request.url.path.rpartition("/")[2]
        self.asked[operation] += 1
        if operation == self.lose:
            self.lose = ""
            response.read()
            raise httpx.ReadError("the connection broke", request=request)
        return response


def test_nothing_is_done_twice_where_an_answer_is_lost(service: LocalService) -> None:
    answers = LosingAnswers()
    with light.Service(service.url, api_key=KEY, progress=False, transport=answers) as mine:

        def counts(run: light.Run) -> list[str]:
            return re.findall(r"(?:steps taken|passes since then): (\d+)", run.configuration())

        run = mine.create_run(MODEL, lora=Lora(rank=4), gradient_accumulation_steps=2)
        answers.lose = "set_optimizer"
        run.set_optimizer("AdamW", lr=1e-2)  # may be done twice
        assert answers.asked["set_optimizer"] == 2
        answers.lose = "forward_backward"
        with pytest.raises(light.Unreachable):
            run.forward_backward([EXAMPLE])
        assert counts(run) == ["0", "1"]  # it was counted, so it is not to be repeated
        run.forward_backward([EXAMPLE])
        answers.lose = "clip_grad_and_step"
        with pytest.raises(light.Unreachable):
            run.step()
        assert counts(run) == ["1", "0"]
        assert (answers.asked["forward_backward"], answers.asked["clip_grad_and_step"]) == (2, 1)
        answers.lose = "save"
        run.save("kept")  # takes the place of the first
        checkpoints = mine.checkpoints(run.id)
        assert [one.id for one in checkpoints] == ["weights/kept"]


def test_a_taken_name_leaves_the_first_run_as_it_is(mine: light.Service) -> None:
    run = trained(mine, steps=1)
    before = run.forward([EXAMPLE]).logprobs
    with pytest.raises(light.Conflict, match="default"):
        mine.create_run(MODEL)
    assert run.forward([EXAMPLE]).logprobs == before


def test_refusals_are_clear(mine: light.Service, service: LocalService) -> None:
    run = trained(mine, steps=1)
    with pytest.raises(light.InvalidRequest, match="NoSuchLoss"):
        run.set_loss("NoSuchLoss")
    with pytest.raises(light.InvalidRequest):
        run.forward_backward([])
    with pytest.raises(light.NotFound):
        mine.create_run("no/such-model")
    address = run.save_for_sampler().address
    with (
        light.Service(service.url, api_key=OTHER_KEY) as other,
        pytest.raises(light.NotFound),
    ):
        other.sampler(MODEL, checkpoint=address).sample([Feature(input_ids=[5])], GREEDY)


def test_a_stream_says_what_a_sample_says(mine: light.Service) -> None:
    sampler = mine.sampler(MODEL)
    sampler.set_template()
    prompt = light.Conversation(messages=[Message(role="user", content="hello world")])
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    (whole,) = sampler.sample([prompt], params)
    assert "".join(sampler.stream(prompt, params)) == whole.sequences[0].text


def test_rows_become_batches_that_train(mine: light.Service) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"question {i}"}, _answer(i)]} for i in range(5)
    ]
    data = mine.dataset(rows=rows)
    data.set_template(MODEL, max_length=64)
    data.encode()
    assert len(data) == 5
    assert "input_ids" in data[0]
    with pytest.raises(IndexError):
        data[5]
    run = mine.create_run(MODEL, lora=Lora(rank=4))
    sizes: list[int] = []
    for batch in data.batches(2):
        sizes.append(len(batch))
        assert run.forward_backward(batch).loss is not None
    assert sum(sizes) == 5


def _answer(number: int) -> dict[str, str]:
    return {"role": "assistant", "content": f"answer {number}"}


async def test_the_async_twins(service: LocalService) -> None:
    async with light.AsyncService(service.url, api_key=KEY, progress=False) as mine:
        run = await mine.create_run(MODEL, lora=Lora(rank=4))
        await run.set_optimizer("SGD", lr=0.1)
        first = (await run.forward_backward([EXAMPLE])).loss
        await run.step()
        second = (await run.forward([EXAMPLE])).logprobs
        assert first is not None
        assert second
        saved = await run.save_for_sampler("frozen")
        sampler = mine.sampler(MODEL, checkpoint=saved.address)
        (sample,) = await sampler.sample([Feature(input_ids=PROMPT)], GREEDY)
        assert len(sample.sequences[0].tokens) == 3
        data = await mine.dataset(rows=[{"a": 1}, {"a": 2}])
        assert await data.count() == 2
        assert (await data.row(1))["a"] == 2


def test_the_tinker_sdk_sees_the_same_things(
    mine: light.Service, service: LocalService, client: tinker.ServiceClient
) -> None:
    run = trained(mine, steps=1)
    saved = run.save("shared")
    rest = tinker.RestClient(base_url=service.url, api_key=KEY)
    assert rest.get_training_run(run.id).result().base_model == MODEL
    listed = {each.checkpoint_id for each in rest.list_checkpoints(run.id).result().checkpoints}
    assert "weights/shared" in listed
    theirs = client.create_training_client_from_state(
        saved.address.replace("twinkle://", "tinker://")
    ).result()
    assert theirs.get_info().model_data.model_name == MODEL
    assert mine.run_info(run.id).rank == 8
    assert [each.id for each in mine.checkpoints(run.id)] == ["weights/shared"]


def cli(service: LocalService, *arguments: str, folder: Path) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "twinkle_dask.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=folder,
        env={
            "TWINKLE_DASK_URL": service.url,
            "TWINKLE_DASK_API_KEY": KEY,
            "PYTHONPATH": ":".join(sys.path),
            "COLUMNS": "300",
        },
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_commands_for_users(
    mine: light.Service, service: LocalService, model_folder: Path, tmp_path: Path
) -> None:
    run = trained(mine)
    saved = run.save("kept")
    address = run.save_for_sampler("frozen").address
    assert run.id in cli(service, "runs", folder=tmp_path)
    listed = cli(service, "checkpoints", "list", run.id, folder=tmp_path)
    assert "weights/kept" in listed
    assert "sampler_weights" in listed

    said = cli(
        service, "sample", "hello", "--model", MODEL, "--checkpoint", address,
        "--max-tokens", "5", "--temperature", "0", folder=tmp_path,
    )  # fmt: skip
    assert said.strip() or said  # random weights may say white space

    shown = cli(service, "download", saved.address, "--to", "adapter", folder=tmp_path)
    assert "adapter_model.safetensors" in shown
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(EXAMPLE.input_ids),
        loss_fn_inputs={"target_tokens": np.array([0, 0, 0, *ANSWER, 0])},  # type: ignore[dict-item]
    )
    theirs = PlainRun(load(model_folder), tmp_path / "adapter").logprobs(datum).detach().numpy()
    ours = run.forward([EXAMPLE]).logprobs[0]
    # Float32 on both sides, summed in another order.
    assert ours[3:6] == pytest.approx(theirs[3:6], abs=1e-3)  # pyright: ignore[reportUnknownMemberType]

    cli(service, "checkpoints", "delete", saved.address, "--yes", folder=tmp_path)
    assert "weights/kept" not in cli(service, "checkpoints", "list", run.id, folder=tmp_path)


def test_a_command_that_fails_says_why(service: LocalService, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "twinkle_dask.cli", "runs", "--url", service.url, "--api-key", "no"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert ended.returncode == 1
    assert re.search(r"API key", ended.stderr)
    assert "Traceback" not in ended.stderr
