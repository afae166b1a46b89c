"""Samples: what they are worth in numbers, when they end, and that they disturb nobody."""

import pickle
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.blackbox.conftest import KEY, MODEL
from tests.blackbox.data import batch, datum, logprobs, random_tokens, train_one_step
from tests.blackbox.wire import Wire
from tests.sampler.plain import PlainModel
from twinkle_dask import LocalService

# Float32 on both sides; sums are ordered differently.
TOLERANCE = 2e-4
CONTEXT_LENGTH = 2048
PROMPT = random_tokens(9, seed=7)
END_OF_SEQUENCE = 2  # <|im_end|>
QUESTION = "Who are you"
ANSWER = "? I am a small model, made for tests.<|im_end|>"


@pytest.fixture(scope="module")
def plain(model_folder: Path) -> PlainModel:
    return PlainModel(model_folder)


@pytest.fixture(scope="module")
def shared(service: LocalService) -> Generator[tinker.ServiceClient]:
    """One session for the module; a test that ends its session takes ``client``."""
    with tinker.ServiceClient(base_url=service.url, api_key=KEY) as connected:
        yield connected


@pytest.fixture(scope="module")
def base(shared: tinker.ServiceClient) -> tinker.SamplingClient:
    """A sampler of the untouched model."""
    return shared.create_sampling_client(base_model=MODEL).result()


@pytest.fixture(scope="module")
def taught_run(shared: tinker.ServiceClient) -> tinker.TrainingClient:
    """A run that has learnt one sentence by heart; no test trains it further."""
    run = shared.create_lora_training_client(MODEL, rank=8, seed=1).result()
    tokenizer: Any = run.get_tokenizer()
    lesson = [datum(tokenizer.encode(QUESTION + ANSWER))]
    for _ in range(40):
        run.forward_backward(lesson, "cross_entropy")
        run.optim_step(types.AdamParams(learning_rate=3e-3))
    return run


@pytest.fixture(scope="module")
def tokenizer(taught_run: tinker.TrainingClient) -> Any:
    return taught_run.get_tokenizer()


@pytest.fixture(scope="module")
def taught(taught_run: tinker.TrainingClient) -> tinker.SamplingClient:
    return taught_run.save_weights_and_get_sampling_client().result()


def sample(
    client: tinker.SamplingClient,
    prompt: Sequence[int] = PROMPT,
    *,
    num_samples: int = 1,
    include_prompt_logprobs: bool = False,
    **params: Any,
) -> tinker.APIFuture[types.SampleResponse]:
    return client.sample(
        types.ModelInput.from_ints(list(prompt)),
        num_samples,
        types.SamplingParams.model_validate(params),
        include_prompt_logprobs,
    )


def tokens_of(future: tinker.APIFuture[types.SampleResponse]) -> list[list[int]]:
    return [sequence.tokens for sequence in future.result().sequences]


# ---- numbers


def test_greedy_takes_the_likeliest_token(base: tinker.SamplingClient, plain: PlainModel) -> None:
    likeliest = plain.greedy(PROMPT, 16)
    assert tokens_of(sample(base, max_tokens=16, temperature=0, stop=[])) == [likeliest]
    assert tokens_of(sample(base, max_tokens=16, temperature=0, stop=[])) == [likeliest]
    # Other ways to leave one token to choose from.
    assert tokens_of(sample(base, max_tokens=16, top_k=1, stop=[])) == [likeliest]
    assert tokens_of(sample(base, max_tokens=16, top_p=1e-6, stop=[])) == [likeliest]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_of_the_unmodified_distribution(
    base: tinker.SamplingClient, plain: PlainModel, temperature: float
) -> None:
    params: dict[str, Any] = {
        "max_tokens": 12,
        "temperature": temperature,
        "top_k": 50,
        "seed": 3,
        "stop": [],
    }
    response = sample(base, num_samples=2, **params).result()
    for sequence in response.sequences:
        assert sequence.logprobs is not None
        assert len(sequence.logprobs) == len(sequence.tokens) == 12
        expected = plain.of_tokens(PROMPT, sequence.tokens)
        np.testing.assert_allclose(sequence.logprobs, expected, atol=TOLERANCE)


def test_an_adapters_logprobs_are_those_of_its_trainer(
    taught_run: tinker.TrainingClient, taught: tinker.SamplingClient
) -> None:
    params: dict[str, Any] = {
        "max_tokens": 20,
        "temperature": 1,
        "top_p": 0.99,
        "seed": 5,
        "stop": [],
    }
    sequence = sample(taught, **params).result().sequences[0]
    whole = datum([*PROMPT, *sequence.tokens])
    trained = logprobs(taught_run.forward([whole], "cross_entropy").result())[0]
    assert sequence.logprobs is not None
    np.testing.assert_allclose(sequence.logprobs, trained[len(PROMPT) - 1 :], atol=TOLERANCE)


def test_prompt_logprobs_begin_with_nothing(base: tinker.SamplingClient, plain: PlainModel) -> None:
    expected = plain.of_tokens(PROMPT[:1], PROMPT[1:])
    response = sample(base, max_tokens=2, include_prompt_logprobs=True).result()
    scored = response.prompt_logprobs_np
    assert scored is not None
    assert scored.shape == (len(PROMPT),)
    assert np.isnan(scored[0])
    np.testing.assert_allclose(scored[1:], expected, atol=TOLERANCE)
    assert sample(base, max_tokens=2).result().prompt_logprobs_np is None

    first, *rest = base.compute_logprobs(types.ModelInput.from_ints(PROMPT)).result()
    assert first is None
    np.testing.assert_allclose(np.asarray(rest, np.float32), expected, atol=TOLERANCE)


def test_a_prompt_of_one_token(base: tinker.SamplingClient, plain: PlainModel) -> None:
    one = [PROMPT[0]]
    assert base.compute_logprobs(types.ModelInput.from_ints(one)).result() == [None]
    expected = plain.greedy(one, 3)
    assert tokens_of(sample(base, one, max_tokens=3, temperature=0, stop=[])) == [expected]


# ---- chance


def test_each_of_many_samples_is_drawn_on_its_own(base: tinker.SamplingClient) -> None:
    response = sample(base, num_samples=5, max_tokens=8, stop=[]).result()
    assert len({sequence.sequence_id for sequence in response.sequences}) == 5
    assert len({tuple(sequence.tokens) for sequence in response.sequences}) == 5


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 + 5])
def test_a_seed_reproduces_its_samples_in_any_company(
    base: tinker.SamplingClient, taught: tinker.SamplingClient, seed: int
) -> None:
    params: dict[str, Any] = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.95, "stop": []}
    alone = tokens_of(sample(base, num_samples=2, seed=seed, **params))
    company = [
        sample(client, random_tokens(3 + i, seed=i), num_samples=2, seed=i, **params)
        for i in range(4)
        for client in (base, taught)
    ]
    amid = tokens_of(sample(base, num_samples=2, seed=seed, **params))
    assert amid == alone
    for future in company:
        future.result()
    assert tokens_of(sample(base, num_samples=2, seed=seed + 1, **params)) != alone


def test_without_a_seed_samples_differ(base: tinker.SamplingClient) -> None:
    first = sample(base, max_tokens=8, stop=[])
    assert tokens_of(first) != tokens_of(sample(base, max_tokens=8, stop=[]))


# ---- when a sample ends


def test_a_sample_ends_with_the_end_of_sequence(
    taught: tinker.SamplingClient, tokenizer: Any
) -> None:
    question = tokenizer.encode(QUESTION)
    # max_tokens is left out: the context is the only other limit.
    sequence = sample(taught, question, temperature=0).result().sequences[0]
    assert tokenizer.decode(sequence.tokens) == ANSWER
    assert sequence.tokens.count(END_OF_SEQUENCE) == 1
    assert sequence.stop_reason == "stop"
    assert sequence.logprobs is not None
    assert len(sequence.logprobs) == len(sequence.tokens)

    # An empty list stops nowhere, not even there.
    beyond = sample(taught, question, temperature=0, stop=[], max_tokens=30).result().sequences[0]
    assert beyond.tokens[: len(sequence.tokens)] == sequence.tokens
    assert (len(beyond.tokens), beyond.stop_reason) == (30, "length")


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        pytest.param("small", "? I am a small", id="string"),
        pytest.param(["tests", "model"], "? I am a small model", id="strings"),
        pytest.param("am a s", "? I am a s", id="across tokens"),
        pytest.param(["never"], ANSWER, id="absent string"),
    ],
)
def test_a_stop_string_ends_a_sample(
    taught: tinker.SamplingClient, tokenizer: Any, stop: str | list[str], text: str
) -> None:
    future = sample(taught, tokenizer.encode(QUESTION), temperature=0, stop=stop, max_tokens=40)
    sequence = future.result().sequences[0]
    said = tokenizer.decode(sequence.tokens)
    # The tokens up to and including the one that completes it, which may say a little more.
    assert said.startswith(text)
    assert not tokenizer.decode(sequence.tokens[:-1]).startswith(text)
    assert sequence.stop_reason == "stop"


def test_a_stop_token_is_the_last_token(taught: tinker.SamplingClient, tokenizer: Any) -> None:
    question, answer = tokenizer.encode(QUESTION), tokenizer.encode(ANSWER)
    stops = [answer[9], answer[4]]
    end = min(answer.index(stop) for stop in stops)
    sequence = sample(taught, question, temperature=0, stop=stops).result().sequences[0]
    assert sequence.tokens == answer[: end + 1]
    assert sequence.stop_reason == "stop"


def test_a_sample_ends_where_the_context_does(base: tinker.SamplingClient) -> None:
    prompt = random_tokens(CONTEXT_LENGTH - 5, seed=11)
    for max_tokens in (None, 100):
        sequence = sample(base, prompt, stop=[], max_tokens=max_tokens).result().sequences[0]
        assert (len(sequence.tokens), sequence.stop_reason) == (5, "length")


@pytest.mark.parametrize("too_many", [0, 1, 500])
def test_a_prompt_that_leaves_no_room_is_refused(
    base: tinker.SamplingClient, too_many: int
) -> None:
    prompt = random_tokens(CONTEXT_LENGTH + too_many, seed=12)
    with pytest.raises(tinker.BadRequestError, match=str(CONTEXT_LENGTH)):
        sample(base, prompt, max_tokens=1).result()


# ---- many at a time


def test_hundreds_of_samples_at_a_time(base: tinker.SamplingClient, plain: PlainModel) -> None:
    prompts = [random_tokens(3 + i % 5, seed=i) for i in range(300)]
    futures = [sample(base, p, max_tokens=3, temperature=0, stop=[]) for p in prompts]
    drawn = [tokens_of(future)[0] for future in futures]
    assert [len(tokens) for tokens in drawn] == [3] * len(prompts)
    for i in range(0, len(prompts), 60):
        assert drawn[i] == plain.greedy(prompts[i], 3)


def test_adapters_together_give_what_each_gives_alone(shared: tinker.ServiceClient) -> None:
    samplers = [shared.create_sampling_client(base_model=MODEL).result()]
    for seed in range(3):
        run = shared.create_lora_training_client(MODEL, rank=4 * (seed + 1), seed=seed).result()
        for _ in range(3):
            train_one_step(run, batch(seed=seed), lr=3e-2)
        samplers.append(run.save_weights_and_get_sampling_client().result())
    params: dict[str, Any] = {"max_tokens": 16, "stop": [], "seed": 2}
    alone = [tokens_of(sample(client, **params)) for client in samplers]
    assert len({str(tokens) for tokens in alone}) == len(samplers)
    together = [sample(client, **params) for client in samplers * 4]
    assert [tokens_of(future) for future in together] == alone * 4


def test_a_long_sample_lets_its_run_train_on(shared: tinker.ServiceClient) -> None:
    run = shared.create_lora_training_client(MODEL, rank=8).result()
    train_one_step(run, batch())
    sampler = run.save_weights_and_get_sampling_client().result()
    params: dict[str, Any] = {"seed": 4, "stop": []}
    before = tokens_of(sample(sampler, max_tokens=20, **params))
    long = sample(sampler, max_tokens=1000, **params)
    train_one_step(run, batch())
    assert not long.future().done()
    # The sampler holds the weights as they were.
    assert tokens_of(long)[0][:20] == before[0]
    newer = run.save_weights_and_get_sampling_client().result()
    assert tokens_of(sample(newer, max_tokens=20, **params)) != before
    assert tokens_of(sample(sampler, max_tokens=20, **params)) == before


def test_long_training_lets_samples_through(
    shared: tinker.ServiceClient, base: tinker.SamplingClient
) -> None:
    run = shared.create_lora_training_client(MODEL, rank=8).result()
    work = [datum(random_tokens(513, seed=i)) for i in range(4)]
    training = [run.forward_backward(work, "cross_entropy") for _ in range(12)]
    training[0].result()
    sample(base, max_tokens=4).result()
    with pytest.raises(TimeoutError):
        training[-1].result(timeout=0)
    training[-1].result()


# ---- copies, cancelling


def test_copies_of_a_client_do_not_collide(taught: tinker.SamplingClient) -> None:
    copies = [
        taught,
        pickle.loads(pickle.dumps(taught)),
        pickle.loads(pickle.dumps(taught)),
        tinker.SamplingClient.from_sampler_handle(taught.get_sampler_handle(), api_key=KEY),
    ]
    prompts = [random_tokens(5, seed=i) for i in range(3 * len(copies))]
    expected = [tokens_of(sample(taught, p, max_tokens=6, temperature=0)) for p in prompts]
    futures = [
        sample(copies[i % len(copies)], prompt, max_tokens=6, temperature=0)
        for i, prompt in enumerate(prompts)
    ]
    assert [tokens_of(future) for future in futures] == expected
    ids = {sequence.sequence_id for f in futures for sequence in f.result().sequences}
    assert len(ids) == len(prompts)


def test_a_cancelled_sample_is_given_up(base: tinker.SamplingClient, wire: Wire) -> None:
    session = wire.post("create_session", {}).json()["session_id"]
    request = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = wire.post("create_sampling_session", request).json()["sampling_session_id"]
    long: dict[str, Any] = {
        "sampling_session_id": sampler,
        "seq_id": 0,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]},
        "sampling_params": {"max_tokens": 1900, "stop": []},
        "num_samples": 8,
    }
    ticket = wire.promise("asample", long)
    for _ in range(2):  # once more, and nothing is left to do
        assert wire.post("cancel_future", {"request_id": ticket}).status_code == 200
    outcome = wire.result(ticket)
    assert outcome["category"] == "user"
    assert "cancelled" in outcome["error"]

    abandoned = sample(base, num_samples=8, max_tokens=1900, stop=[])
    assert abandoned.future().cancel()
    with pytest.raises(CancelledError):
        abandoned.result()
    assert len(tokens_of(sample(base, max_tokens=3, stop=[]))[0]) == 3
