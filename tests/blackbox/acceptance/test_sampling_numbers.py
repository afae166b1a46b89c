"""What samples are worth: tokens, logprobs and when they end, against plain transformers."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from numpy.typing import NDArray
from tinker import types

from tests.blackbox.conftest import KEY, MODEL
from tests.blackbox.data import datum, logprobs, random_tokens
from tests.blackbox.sampling import ANSWER, PROMPT, QUESTION, TOLERANCE, sample, teach, tokens_of
from tests.sampler.plain import PlainModel
from twinkle_dask import LocalService

CONTEXT_LENGTH = 2048
VOCAB_SIZE = 4096
END_OF_SEQUENCE = 2  # <|im_end|>


@pytest.fixture(scope="module")
def plain(model_folder: Path) -> PlainModel:
    return PlainModel(model_folder)


@pytest.fixture(scope="module")
def shared(service: LocalService) -> Generator[tinker.ServiceClient]:
    """One session for the module."""
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
    teach(run)
    return run


@pytest.fixture(scope="module")
def tokenizer(taught_run: tinker.TrainingClient) -> Any:
    return taught_run.get_tokenizer()


@pytest.fixture(scope="module")
def taught(taught_run: tinker.TrainingClient) -> tinker.SamplingClient:
    return taught_run.save_weights_and_get_sampling_client().result()


# ---- chance


def test_61_each_of_many_samples_is_drawn_on_its_own(base: tinker.SamplingClient) -> None:
    response = sample(base, num_samples=5, max_tokens=8, stop=[]).result()
    assert len({sequence.sequence_id for sequence in response.sequences}) == 5
    assert len({tuple(sequence.tokens) for sequence in response.sequences}) == 5


def test_62_greedy_takes_the_likeliest_token(
    base: tinker.SamplingClient, plain: PlainModel
) -> None:
    likeliest = plain.greedy(PROMPT, 16)
    for _ in range(2):
        assert tokens_of(sample(base, max_tokens=16, temperature=0, stop=[])) == [likeliest]


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 + 5])
def test_63_a_seed_reproduces_its_samples_in_any_company(
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


def test_63_seed_without_one_samples_differ(base: tinker.SamplingClient) -> None:
    first = sample(base, max_tokens=8, stop=[])
    assert tokens_of(first) != tokens_of(sample(base, max_tokens=8, stop=[]))


def test_64_one_token_to_choose_from_is_greedy(
    base: tinker.SamplingClient, plain: PlainModel
) -> None:
    likeliest = plain.greedy(PROMPT, 16)
    onlies: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-6}, {"top_k": 50, "top_p": 1e-6}]
    for only in onlies:
        assert tokens_of(sample(base, max_tokens=16, stop=[], **only)) == [likeliest]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_64_top_k_and_top_p_draw_from_the_likeliest(
    base: tinker.SamplingClient, plain: PlainModel, temperature: float
) -> None:
    """The tempered distribution's nucleus, and every token of it in 1000 samples."""
    logprobs_V = plain.logprobs(PROMPT)[-1].astype(np.float64)
    order = np.argsort(-logprobs_V)
    drawn = tokens_of(sample(base, num_samples=300, max_tokens=1, stop=[], top_k=5, seed=1))
    assert {token for (token,) in drawn} == set(order[:5].tolist())
    weights = np.exp(logprobs_V[order] / temperature)
    mass = np.cumsum(weights / weights.sum())
    top_p = float(mass[3] - 1e-4)
    params: dict[str, Any] = {"max_tokens": 1, "stop": [], "seed": 2, "temperature": temperature}
    drawn = tokens_of(sample(base, num_samples=300, top_p=top_p, **params))
    assert {token for (token,) in drawn} == set(order[:4].tolist())


# ---- when a sample ends


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        pytest.param("small", "? I am a small", id="string"),
        pytest.param(["tests", "model"], "? I am a small model", id="strings"),
        pytest.param("am a s", "? I am a s", id="across tokens"),
        pytest.param(["never"], ANSWER, id="absent string"),
    ],
)
def test_65_a_stop_string_ends_a_sample(
    taught: tinker.SamplingClient, tokenizer: Any, stop: str | list[str], text: str
) -> None:
    future = sample(taught, tokenizer.encode(QUESTION), temperature=0, stop=stop, max_tokens=40)
    sequence = future.result().sequences[0]
    said = tokenizer.decode(sequence.tokens)
    # The tokens up to and including the one that completes it, which may say a little more.
    assert said.startswith(text)
    assert not tokenizer.decode(sequence.tokens[:-1]).startswith(text)
    assert sequence.stop_reason == "stop"


def test_65_a_stop_token_is_the_last_token(taught: tinker.SamplingClient, tokenizer: Any) -> None:
    question, answer = tokenizer.encode(QUESTION), tokenizer.encode(ANSWER)
    stops = [answer[9], answer[4]]
    end = min(answer.index(stop) for stop in stops)
    sequence = sample(taught, question, temperature=0, stop=stops).result().sequences[0]
    assert sequence.tokens == answer[: end + 1]
    assert sequence.stop_reason == "stop"
    assert sequence.logprobs is not None
    assert len(sequence.logprobs) == len(sequence.tokens)


def test_66_an_empty_stop_runs_past_the_end_of_sequence(
    taught: tinker.SamplingClient, tokenizer: Any
) -> None:
    question, answer = tokenizer.encode(QUESTION), tokenizer.encode(ANSWER)
    future = sample(taught, question, temperature=0, stop=[], max_tokens=30)
    sequence = future.result().sequences[0]
    assert sequence.tokens[: len(answer)] == answer
    assert (len(sequence.tokens), sequence.stop_reason) == (30, "length")


def test_67_without_max_tokens_a_sample_ends_with_its_sequence(
    taught: tinker.SamplingClient, tokenizer: Any
) -> None:
    sequence = sample(taught, tokenizer.encode(QUESTION), temperature=0).result().sequences[0]
    assert tokenizer.decode(sequence.tokens) == ANSWER
    assert sequence.tokens.count(END_OF_SEQUENCE) == 1
    assert sequence.stop_reason == "stop"


def test_67_a_sample_ends_where_the_context_does(base: tinker.SamplingClient) -> None:
    prompt = random_tokens(CONTEXT_LENGTH - 5, seed=11)
    for max_tokens in (None, 100):
        sequence = sample(base, prompt, stop=[], max_tokens=max_tokens).result().sequences[0]
        assert (len(sequence.tokens), sequence.stop_reason) == (5, "length")


# ---- logprobs of what was drawn


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_68_logprobs_are_of_the_unmodified_distribution(
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


def test_68_an_adapters_logprobs_are_those_of_its_trainer(
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


# ---- logprobs of the prompt


def test_69_prompt_logprobs_begin_with_nothing(
    base: tinker.SamplingClient, plain: PlainModel
) -> None:
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


def test_69_logprobs_of_a_prompt_of_one_token(
    base: tinker.SamplingClient, plain: PlainModel
) -> None:
    one = [PROMPT[0]]
    assert base.compute_logprobs(types.ModelInput.from_ints(one)).result() == [None]
    expected = plain.greedy(one, 3)
    assert tokens_of(sample(base, one, max_tokens=3, temperature=0, stop=[])) == [expected]


def test_69_logprobs_of_an_adapter_are_those_of_its_trainer(
    taught_run: tinker.TrainingClient, taught: tinker.SamplingClient
) -> None:
    tokens = random_tokens(300, seed=3)
    (trained,) = logprobs(taught_run.forward([datum(tokens)], "cross_entropy").result())
    _, *scored = taught.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
    np.testing.assert_allclose(np.asarray(scored, np.float32), trained, atol=TOLERANCE)


def check_likeliest(rows: list[Any], logprobs_NV: NDArray[np.float32], width: int) -> None:
    """That each row lists its likeliest tokens in order."""
    assert len(rows) == len(logprobs_NV)
    for row, logprobs_V in zip(rows, logprobs_NV, strict=True):
        tokens, found = [token for token, _ in row], [logprob for _, logprob in row]
        assert len(set(tokens)) == width
        np.testing.assert_allclose(found, logprobs_V[tokens], atol=TOLERANCE)
        np.testing.assert_allclose(found, -np.sort(-logprobs_V)[:width], atol=TOLERANCE)


@pytest.mark.parametrize("width", [1, 20, 1024])
def test_70_topk_prompt_logprobs(
    base: tinker.SamplingClient, plain: PlainModel, width: int
) -> None:
    response = sample(base, max_tokens=1, topk_prompt_logprobs=width).result()
    dense = response.topk_prompt_logprobs_np
    assert dense is not None
    assert dense.token_ids.shape == dense.logprobs.shape == (len(PROMPT), width)
    assert response.topk_prompt_logprobs is not None
    first, *rest = response.topk_prompt_logprobs
    assert first is None
    check_likeliest(rest, plain.logprobs(PROMPT)[:-1], width)
    assert response.prompt_logprobs is None
    assert sample(base, max_tokens=1).result().topk_prompt_logprobs is None


def test_71_topk_sample_logprobs(base: tinker.SamplingClient, plain: PlainModel) -> None:
    """Also in company of samples that ask for another number, or for nothing."""
    params: dict[str, Any] = {"max_tokens": 8, "stop": [], "seed": 4, "top_k": 40}
    widths = (0, 3, 7)
    futures = [sample(base, num_samples=2, topk_sample_logprobs=k, **params) for k in widths]
    for width, future in zip(widths, futures, strict=True):
        for sequence in future.result().sequences:
            if not width:
                assert sequence.topk_logprobs is None
                continue
            assert sequence.topk_logprobs is not None
            whole = [*PROMPT, *sequence.tokens]
            expected_NV = plain.logprobs(whole)[len(PROMPT) - 1 : -1]
            check_likeliest(sequence.topk_logprobs, expected_NV, width)
    assert len({str(tokens_of(future)) for future in futures}) == 1


def test_71_topk_sample_logprobs_of_an_adapter(taught: tinker.SamplingClient) -> None:
    future = sample(taught, max_tokens=5, stop=[], temperature=0, topk_sample_logprobs=2)
    sequence = future.result().sequences[0]
    assert sequence.topk_logprobs is not None
    assert sequence.logprobs is not None
    likeliest = [row[0] for row in sequence.topk_logprobs if row is not None]
    assert likeliest == list(zip(sequence.tokens, sequence.logprobs, strict=True))


def targets(rows: int, columns: int) -> torch.Tensor:
    """Tokens with holes; nothing at all in some rows."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB_SIZE, (rows, columns))
    tokens[rng.random(tokens.shape) < 0.6] = -1
    tokens[1], tokens[2, 0] = -1, 0
    return torch.tensor(tokens)


def test_72_target_prompt_logprobs_dense(base: tinker.SamplingClient, plain: PlainModel) -> None:
    tokens = targets(len(PROMPT) - 1, 3)
    wish = types.TensorData.from_torch(tokens)
    found = sample(base, max_tokens=1, target_prompt_logprobs=wish).result().target_prompt_logprobs
    assert found is not None
    assert (found.dtype, found.shape) == ("float32", list(tokens.shape))
    assert found.sparse_crow_indices is None
    expected = np.take_along_axis(plain.logprobs(PROMPT)[:-1], tokens.clamp(min=0).numpy(), axis=1)
    expected = np.where(tokens.numpy() < 0, 0, expected)
    np.testing.assert_allclose(found.to_numpy(), expected, atol=TOLERANCE)
    assert (found.to_numpy()[tokens.numpy() < 0] == 0).all()
    assert sample(base, max_tokens=1).result().target_prompt_logprobs is None


def test_72_target_prompt_logprobs_sparse(base: tinker.SamplingClient) -> None:
    """The same numbers in the layout in which they were asked for."""
    prompt = random_tokens(40, seed=1)
    tokens = targets(len(prompt) - 1, 12)
    tokens[:, 4:] = -1
    wish = types.TensorData.from_torch_sparse(tokens, pad_value=-1)
    assert wish.sparse_crow_indices is not None
    futures = [
        sample(base, prompt, max_tokens=1, target_prompt_logprobs=asked)
        for asked in (wish, types.TensorData.from_torch(tokens))
    ]
    sparse, dense = (future.result().target_prompt_logprobs for future in futures)
    assert sparse is not None
    assert dense is not None
    assert (sparse.dtype, sparse.shape) == ("float32", list(tokens.shape))
    assert sparse.sparse_crow_indices == wish.sparse_crow_indices
    assert sparse.sparse_col_indices == wish.sparse_col_indices
    np.testing.assert_allclose(sparse.to_numpy(), dense.to_numpy(), atol=TOLERANCE)


def test_72_target_prompt_logprobs_are_those_of_the_trainer(
    taught_run: tinker.TrainingClient, taught: tinker.SamplingClient
) -> None:
    """As distillation uses them: the likeliest tokens of one model scored by another."""
    prompt = random_tokens(30, seed=2)
    likeliest = sample(taught, prompt, max_tokens=1, topk_prompt_logprobs=4).result()
    assert likeliest.topk_prompt_logprobs_np is not None
    tokens = likeliest.topk_prompt_logprobs_np.token_ids[1:].astype(np.int64)
    wish = types.TensorData.from_numpy(tokens)
    found = sample(taught, prompt, max_tokens=1, target_prompt_logprobs=wish).result()
    inputs = {
        "target_tokens": wish,
        "weights": types.TensorData.from_numpy(np.ones(tokens.shape, np.float32)),
    }
    whole = types.Datum(model_input=types.ModelInput.from_ints(prompt[:-1]), loss_fn_inputs=inputs)
    trained = taught_run.forward([whole], "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    assert found.target_prompt_logprobs is not None
    scored = found.target_prompt_logprobs.to_numpy()
    np.testing.assert_allclose(scored, trained.to_numpy(), atol=TOLERANCE)
    top = likeliest.topk_prompt_logprobs_np.logprobs[1:]
    np.testing.assert_allclose(scored, top, atol=TOLERANCE)


def test_73_prompt_alt_tokens(base: tinker.SamplingClient, plain: PlainModel) -> None:
    params: dict[str, Any] = {"max_tokens": 1, "prompt_alt_tokens_k": 6, "temperature": 0.5}
    responses = [sample(base, seed=seed, **params).result() for seed in (3, 3, 4)]
    drawn: list[NDArray[Any]] = []
    for response in responses:
        alternatives = response.prompt_alt_tokens
        assert alternatives is not None
        tokens = alternatives.tokens.to_numpy()
        assert (alternatives.tokens.dtype, alternatives.logprobs.dtype) == ("int64", "float32")
        assert tokens.shape == (len(PROMPT) - 1, 6)
        expected = np.take_along_axis(plain.logprobs(PROMPT)[:-1], tokens, axis=1)
        np.testing.assert_allclose(alternatives.logprobs.to_numpy(), expected, atol=TOLERANCE)
        drawn.append(tokens)
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    greedy = sample(base, max_tokens=1, prompt_alt_tokens_k=2, temperature=0).result()
    assert greedy.prompt_alt_tokens is not None
    likeliest = plain.logprobs(PROMPT)[:-1].argmax(axis=1, keepdims=True)
    assert (greedy.prompt_alt_tokens.tokens.to_numpy() == likeliest).all()


def test_73_prompt_alt_tokens_have_their_distribution(
    base: tinker.SamplingClient, plain: PlainModel
) -> None:
    """1000 draws at a place, from the tempered distribution over all of the vocabulary."""
    params: dict[str, Any] = {"max_tokens": 1, "temperature": 0.25, "seed": 1}
    response = sample(base, PROMPT[:4], prompt_alt_tokens_k=1000, top_k=1, **params).result()
    assert response.prompt_alt_tokens is not None
    logits_NV = plain.logprobs(PROMPT[:4])[:-1].astype(np.float64) / 0.25
    weights_NV = np.exp(logits_NV - logits_NV.max(axis=1, keepdims=True))
    probs_NV = weights_NV / weights_NV.sum(axis=1, keepdims=True)
    for tokens, probs in zip(response.prompt_alt_tokens.tokens.to_numpy(), probs_NV, strict=True):
        shares = np.bincount(tokens, minlength=VOCAB_SIZE) / 1000
        assert (np.abs(shares - probs) < 6 * np.sqrt(probs / 1000) + 2e-3).all()


@pytest.mark.parametrize("last_n", [1, 4, len(PROMPT) - 1])
def test_74_prompt_logprobs_last_n(
    base: tinker.SamplingClient, plain: PlainModel, last_n: int
) -> None:
    prompt = types.ModelInput.from_ints(PROMPT)
    scored = base.compute_logprobs(prompt, prompt_logprobs_last_n=last_n).result()
    assert scored[:-last_n] == [None] * (len(PROMPT) - last_n)
    expected = plain.of_tokens(PROMPT[:1], PROMPT[1:])[-last_n:]
    np.testing.assert_allclose(np.asarray(scored[-last_n:], np.float32), expected, atol=TOLERANCE)
    response = sample(
        base,
        max_tokens=1,
        include_prompt_logprobs=True,
        prompt_logprobs_last_n=last_n,
        topk_prompt_logprobs=2,
        prompt_alt_tokens_k=2,
    ).result()
    rows = response.topk_prompt_logprobs
    assert rows is not None
    assert rows[:-last_n] == [None] * (len(PROMPT) - last_n)
    check_likeliest(rows[-last_n:], plain.logprobs(PROMPT)[:-1][-last_n:], 2)
    assert response.prompt_alt_tokens is not None
    assert not np.isnan(response.prompt_alt_tokens.logprobs.to_numpy()).any()


# ---- what is refused


@pytest.mark.parametrize("too_many", [0, 1, 500])
def test_75_a_prompt_that_leaves_no_room_is_refused(
    base: tinker.SamplingClient, too_many: int
) -> None:
    prompt = random_tokens(CONTEXT_LENGTH + too_many, seed=12)
    with pytest.raises(tinker.BadRequestError, match=str(CONTEXT_LENGTH)):
        sample(base, prompt, max_tokens=1).result()


ROWS = len(PROMPT) - 1
_tensor = types.TensorData.from_numpy


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"topk_prompt_logprobs": 1025}, "topk_prompt_logprobs must be from 0 to 1024"),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs must be from 0 to 1024"),
        ({"topk_sample_logprobs": 1025}, "topk_sample_logprobs must be from 0 to 1024"),
        ({"prompt_alt_tokens_k": 1025}, "prompt_alt_tokens_k must be from 0 to 1024"),
        ({"topk_sample_logprobs": 1000, "num_samples": 9, "max_tokens": None}, "Ask for fewer"),
        (
            {"include_prompt_logprobs": True, "prompt_logprobs_last_n": len(PROMPT)},
            f"must be from 1 to {ROWS}",
        ),
        ({"target_prompt_logprobs": _tensor(np.full((ROWS + 1, 1), 1))}, r"takes \[8, K\]"),
        ({"target_prompt_logprobs": _tensor(np.full((ROWS, 1), -1))}, "names no token"),
        ({"target_prompt_logprobs": _tensor(np.full((ROWS, 1), VOCAB_SIZE))}, "runs from 0 to"),
        ({"target_prompt_logprobs": _tensor(np.full((ROWS, 1), -2))}, "has token -2"),
    ],
    ids=lambda value: "" if isinstance(value, str) else list(value)[-1],
)
def test_75_too_much_to_ask_of_a_prompt_is_refused(
    base: tinker.SamplingClient, wish: dict[str, Any], says: str
) -> None:
    params: dict[str, Any] = {"max_tokens": 1} | wish
    with pytest.raises(tinker.BadRequestError, match=says):
        sample(base, **params).result()


# ---- the base model


def test_80_a_base_model_is_sampled_without_training(
    client: tinker.ServiceClient, plain: PlainModel
) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result()
    assert sampler.get_base_model() == MODEL
    drawn = tokens_of(sample(sampler, max_tokens=4, temperature=0, stop=[]))
    assert drawn == [plain.greedy(PROMPT, 4)]
