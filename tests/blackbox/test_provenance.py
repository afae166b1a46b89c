"""Training data that say where their tokens come from, through the official SDK."""

from dataclasses import replace

import pytest
import tinker
from tinker import types

from tests.blackbox.conftest import MODEL
from tests.blackbox.data import datum, random_tokens
from tests.blackbox.sampling import sample

PROMPT = random_tokens(6, seed=3)
NUM = 5


@pytest.fixture
def run(client: tinker.ServiceClient) -> tinker.TrainingClient:
    return client.create_lora_training_client(MODEL, rank=4, seed=1).result()


def drawn(client: tinker.ServiceClient, *, recorded: bool = True) -> types.SampledSequence:
    sampler = client.create_sampling_client(
        base_model=MODEL, record_stability_info=recorded
    ).result()
    (sequence,) = sample(sampler, PROMPT, max_tokens=NUM, stop=[]).result().sequences
    return sequence


def rollout(sequence: types.SampledSequence, name: str | None = None) -> types.Datum:
    """Prompt and answer, the answer rewarded, and where both come from."""
    name = name or sequence.sequence_id
    assert name is not None
    assert sequence.logprobs is not None
    before = [0.0] * (len(PROMPT) - 1)
    inputs = {
        "weights": None,
        "logprobs": [*before, *sequence.logprobs],
        "advantages": [*before, *([1.0] * NUM)],
    }
    return datum([*PROMPT, *sequence.tokens], **inputs).with_provenance(
        model_input=[
            types.PromptProvenanceSpan(sequence_id=name, length=len(PROMPT)),
            types.SampledProvenanceSpan(sequence_id=name, length=NUM - 1),
        ],
        loss_fn_inputs=[
            types.PromptProvenanceSpan(sequence_id=name, offset=1, length=len(PROMPT) - 1),
            types.SampledProvenanceSpan(sequence_id=name, length=NUM),
        ],
    )


@pytest.mark.parametrize("loss", ["stable_reinforce", "importance_sampling"])
def test_a_recorded_rollout_is_trained_on(
    client: tinker.ServiceClient, run: tinker.TrainingClient, loss: types.LossFnType
) -> None:
    data = [rollout(drawn(client)) for _ in range(2)]
    with_spans = run.forward_backward(data, loss).result()
    plain = [replace(one, model_input_spans=None, loss_fn_input_spans=None) for one in data]
    assert with_spans.metrics == run.forward_backward(plain, loss).result().metrics


def test_what_was_not_recorded_is_no_ground_for_stable_reinforce(
    client: tinker.ServiceClient, run: tinker.TrainingClient
) -> None:
    known, unknown = drawn(client), drawn(client, recorded=False)
    data = [rollout(known), rollout(unknown)]
    with pytest.raises(tinker.BadRequestError, match=r"Datum 1: model_input_spans\[0\] .*recorded"):
        run.forward_backward(data, "stable_reinforce").result()
    # Other losses do not rely on it, and the cookbook always says where its data come from.
    assert run.forward_backward(data, "ppo").result().metrics["loss:sum"] < 0


@pytest.mark.parametrize("loss", ["stable_reinforce", "ppo"])
def test_what_is_not_true_is_refused(
    client: tinker.ServiceClient, run: tinker.TrainingClient, loss: types.LossFnType
) -> None:
    one, other = drawn(client), drawn(client)
    assert one.tokens != other.tokens
    with pytest.raises(tinker.BadRequestError, match=r"Datum 1: .*does not hold what sequence"):
        run.forward_backward([rollout(one), rollout(other, one.sequence_id)], loss).result()
    short = rollout(one)
    spans = short.model_input_spans
    assert spans is not None
    with pytest.raises(tinker.BadRequestError, match="covers 6 positions, but there are 10"):
        run.forward_backward([replace(short, model_input_spans=spans[:1])], loss).result()
    # What was refused took its place in the order, and the run goes on.
    assert "loss:sum" in run.forward_backward([rollout(one)], loss).result().metrics


def test_another_sessions_samples_are_unknown(
    client: tinker.ServiceClient,
    other_client: tinker.ServiceClient,
    run: tinker.TrainingClient,
) -> None:
    foreign = rollout(drawn(other_client))
    with pytest.raises(tinker.BadRequestError, match="recorded in this session"):
        run.forward_backward([foreign], "stable_reinforce").result()
