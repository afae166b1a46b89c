"""Image chunks: a model that sees learns from them and answers them; all else is told why not."""

import base64
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.blackbox.conftest import KEY, MODEL
from tests.blackbox.data import logprobs
from tests.blackbox.test_recovery import workers_of
from tests.blackbox.wire import Wire
from tests.models import encoded_image, tiny_seeing
from twinkle_dask import LocalService, local_service

SEEING = "tiny/llava"
POSITIONS = 16  # of every image
CATS, DOGS = encoded_image(1, (40, 30)), encoded_image(2, (64, 64), "JPEG")
BEFORE, QUESTION = [20, 21], [30, 31, 32]
CAT, DOG = 200, 300  # the answers

# A start with model loading, on busy cores.
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Generator[LocalService]:
    folder = tiny_seeing(tmp_path_factory.mktemp("seeing") / "llava", tokenizer=True)
    with local_service(
        {SEEING: str(folder)},
        api_keys=[KEY],
        dtype="float32",
        data_dir=tmp_path_factory.mktemp("data"),
        limits={"max_image_bytes": 100_000},
    ) as service:
        yield service


@pytest.fixture(scope="module")
def connected(seeing: LocalService) -> Generator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=seeing.url, api_key=KEY) as client:
        yield client


def chunk(data: bytes, expected: int | None = POSITIONS) -> types.ImageChunk:
    format_: Any = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return types.ImageChunk(data=data, format=format_, expected_tokens=expected)


def prompt(image: Any) -> types.ModelInput:
    parts: list[Any] = [types.EncodedTextChunk(tokens=BEFORE), image]
    return types.ModelInput(chunks=[*parts, types.EncodedTextChunk(tokens=QUESTION)])


def datum(image: Any, answer: int) -> types.Datum:
    """The answer follows the question's last token; nothing else is learnt."""
    length = len(BEFORE) + POSITIONS + len(QUESTION)
    targets, weights = np.zeros(length, np.int64), np.zeros(length, np.float32)
    targets[-1], weights[-1] = answer, 1
    inputs = {"target_tokens": targets, "weights": weights}
    return types.Datum(
        model_input=prompt(image),
        loss_fn_inputs={k: types.TensorData.from_numpy(v) for k, v in inputs.items()},
    )


DATA = [datum(chunk(CATS), CAT), datum(chunk(DOGS), DOG)]
# Of a model that cannot tell the images apart, however well it knows the answers.
BLIND_LOSS = 2 * np.log(2)


def step(run: tinker.TrainingClient) -> float:
    pending = run.forward_backward(DATA, "cross_entropy")
    run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return pending.result().metrics["loss:sum"]


@pytest.fixture(scope="module")
def taught(connected: tinker.ServiceClient) -> tuple[tinker.TrainingClient, list[float]]:
    """A run that has learnt which image gets which answer, and its losses on the way."""
    run = connected.create_lora_training_client(SEEING, rank=8, seed=1).result()
    losses = [step(run)]
    while losses[-1] > 0.05 and len(losses) < 80:
        losses.append(step(run))
    return run, losses


def test_42_images_are_learnt_from(taught: tuple[tinker.TrainingClient, list[float]]) -> None:
    run, losses = taught
    assert losses[0] > 8
    assert losses[-1] < 0.05 < BLIND_LOSS
    found = logprobs(run.forward(DATA, "cross_entropy").result())
    assert [array.shape for array in found] == [(21,), (21,)]


def test_42_images_are_sampled_from(taught: tuple[tinker.TrainingClient, list[float]]) -> None:
    sampler = taught[0].save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=1, temperature=0.0)
    for data, answer in ((CATS, CAT), (DOGS, DOG)):
        got = sampler.sample(prompt(chunk(data)), 2, params).result()
        assert [sequence.tokens for sequence in got.sequences] == [[answer]] * 2
        assert got.sequences[0].logprobs is not None
        assert got.sequences[0].logprobs[0] > np.log(0.9)


def test_42_prompt_logprobs_are_as_long_as_what_the_model_reads(
    connected: tinker.ServiceClient,
) -> None:
    sampler = connected.create_sampling_client(base_model=SEEING).result()
    found = sampler.compute_logprobs(prompt(chunk(CATS))).result()
    # Nothing stands where the image is that could be likely or not.
    nothing = [i for i, logprob in enumerate(found) if logprob is None]
    assert len(found) == 21
    assert nothing == [0, *range(2, 2 + POSITIONS)]


def test_42_expected_tokens_may_be_left_out_and_old_clients_write_json(
    connected: tinker.ServiceClient, seeing: LocalService
) -> None:
    run = connected.create_lora_training_client(SEEING, rank=4, seed=2).result()
    expected = run.forward(DATA[:1], "cross_entropy").result().metrics["loss:sum"]
    chunks = [
        {"tokens": BEFORE},
        {"data": base64.b64encode(CATS).decode(), "format": "png"},
        {"tokens": QUESTION},
    ]
    inputs = {
        name: {"data": tensor.tolist(), "dtype": tensor.dtype}
        for name, tensor in DATA[0].loss_fn_inputs.items()
    }
    body = {"data": [{"model_input": {"chunks": chunks}, "loss_fn_inputs": inputs}]}
    with Wire(seeing.url, KEY) as wire:
        promise = wire.promise(
            "forward",
            {
                "model_id": run.model_id,
                "seq_id": 2,
                "forward_input": body | {"loss_fn": "cross_entropy"},
            },
        )
        assert wire.metrics(promise)["loss:sum"] == pytest.approx(expected, rel=1e-6)


WHOLE = encoded_image(3, (300, 300))
BOMB = CATS[:16] + (60_000).to_bytes(4, "big") * 2 + CATS[24:]
BAD_IMAGES: dict[str, tuple[types.ImageChunk, str]] = {
    "wrong expected_tokens": (chunk(CATS, 4), "takes 16 tokens .* expected_tokens says 4"),
    "too many pixels": (chunk(BOMB), "60000 x 60000 pixels; send at most 4194304"),
    "too many bytes": (chunk(CATS + bytes(100_000)), "send at most 100000"),
    "another format": (
        types.ImageChunk(data=CATS, format="jpeg", expected_tokens=POSITIONS),
        "said to be jpeg and is not",
    ),
    "no image": (chunk(b"\x89PNG"), "said to be png and is not"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_42_a_bad_image_is_refused(
    case: str, taught: tuple[tinker.TrainingClient, list[float]], connected: tinker.ServiceClient
) -> None:
    bad, says = BAD_IMAGES[case]
    with pytest.raises(tinker.BadRequestError, match=f"Datum 1: image 0 .*{says}"):
        taught[0].forward([DATA[0], datum(bad, CAT)], "cross_entropy").result()
    sampler = connected.create_sampling_client(base_model=SEEING).result()
    params = types.SamplingParams(max_tokens=1)
    with pytest.raises(tinker.BadRequestError, match=f"The prompt: image 0 .*{says}"):
        sampler.sample(prompt(bad), 1, params).result()


def test_42_a_damaged_image_fails_for_its_sender(
    taught: tuple[tinker.TrainingClient, list[float]], connected: tinker.ServiceClient
) -> None:
    """It shows only where it is decoded, when the request has its ticket already."""
    damaged = chunk(WHOLE[: len(WHOLE) // 2])
    sampler = connected.create_sampling_client(base_model=SEEING).result()
    params = types.SamplingParams(max_tokens=1)
    for ask in (
        lambda: taught[0].forward([datum(damaged, CAT)], "cross_entropy").result(),
        lambda: sampler.sample(prompt(damaged), 1, params).result(),
    ):
        with pytest.raises(tinker.RequestFailedError, match="cannot be decoded") as failed:
            ask()
        assert failed.value.category == types.RequestErrorCategory.User


def test_42_a_text_model_says_so(client: tinker.ServiceClient) -> None:
    says = f"has an image, but '{MODEL}' reads text alone"
    run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
    with pytest.raises(tinker.BadRequestError, match=f"Datum 0 {says}"):
        run.forward_backward([DATA[0]], "cross_entropy").result()
    sampler = client.create_sampling_client(base_model=MODEL).result()
    params = types.SamplingParams(max_tokens=1)
    with pytest.raises(tinker.BadRequestError, match=f"The prompt {says}"):
        sampler.sample(prompt(chunk(CATS)), 1, params).result()
    run.optim_step(types.AdamParams(learning_rate=1e-3)).result()


@pytest.mark.parametrize("which", ["text", "seeing"])
def test_42_audio_and_pointers_are_refused(
    which: str, service: LocalService, seeing: LocalService
) -> None:
    pointer = types.ImageAssetPointerChunk(
        location="https://example.org/cat.png", format="png", expected_tokens=POSITIONS
    )
    url, model = (service.url, MODEL) if which == "text" else (seeing.url, SEEING)
    with tinker.ServiceClient(base_url=url, api_key=KEY) as client, Wire(url, KEY) as wire:
        sampler = client.create_sampling_client(base_model=model).result()
        params = types.SamplingParams(max_tokens=1)
        with pytest.raises(tinker.BadRequestError, match="fetches nothing from elsewhere"):
            sampler.sample(prompt(pointer), 1, params).result()
        # The SDK cannot make audio without its own tensors, nor send a pointer in training.
        run = client.create_lora_training_client(model, rank=4, seed=1).result()
        for seq, part, says in (
            (1, {"type": "dmel", "dmel": "AAAA"}, "'dmel' are not supported: no model here hears"),
            (2, pointer.model_dump(), "fetches nothing from elsewhere"),
        ):
            body = {
                "data": [{"model_input": {"chunks": [part]}, "loss_fn_inputs": {}}],
                "loss_fn": "cross_entropy",
            }
            answer = wire.post(
                "forward_backward",
                {"model_id": run.model_id, "seq_id": seq, "forward_backward_input": body},
            )
            assert answer.status_code == 400
            assert f"Datum 0: chunks of kind '{part['type']}'" in answer.json()["detail"]
            assert says in answer.json()["detail"]


def test_42_a_lost_host_sees_the_images_again(
    connected: tinker.ServiceClient, seeing: LocalService
) -> None:
    """They are in the journal with the rest of a request."""
    twin, run = (
        connected.create_lora_training_client(SEEING, rank=4, seed=5).result() for _ in range(2)
    )
    step(run)
    run.forward_backward(DATA, "cross_entropy").result()
    step(twin)
    step(twin)
    expected = twin.forward(DATA, "cross_entropy").result().metrics["loss:sum"]
    for worker in workers_of(seeing.pid):
        worker.kill()
    run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    found = run.forward(DATA, "cross_entropy").result().metrics["loss:sum"]
    assert found == pytest.approx(expected, rel=1e-5)
