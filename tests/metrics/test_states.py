"""States of metrics are JSON, and what is not there is refused."""

import json

import numpy as np
import pytest

from twinkle_dask import metrics
from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.metrics import Facts
from twinkle_dask.types import Json

LABELS = [np.array([-100, 3, 4]), np.array([5, -100])]
NAN = [np.full(3, np.nan, np.float32), np.full(2, np.nan, np.float32)]


@pytest.mark.parametrize("name", sorted(metrics.METRICS))
def test_states_are_json_whatever_a_pass_gives(name: str) -> None:
    state = metrics.new(name, {}, 0.0)
    facts = Facts(
        labels=LABELS,
        loss=float("nan"),
        logprobs=NAN,
        grad_norm=float("inf"),
        learning_rates=[1e-3],
        arguments={"old_logps": [[-1.0, -1e30], [-2.0]], "advantages": [1.0, -1.0]},
    )
    if name == "EmbeddingMetric":
        labels = [np.array([1]), np.array([0])]
        facts = Facts(labels=labels, embeddings=np.full((2, 3), np.nan, np.float32))
    for _ in range(2):
        metrics.check(state, facts.labels, facts.arguments)
        state = json.loads(json.dumps(metrics.accumulate(state, facts), allow_nan=False))
    assert (
        metrics.result(state, 1.0).keys() >= metrics.result(metrics.reset(state, 1.0), 1.0).keys()
    )


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("Perplexity", {}, "Unknown metric 'Perplexity'.*Accuracy"),
        ("DPOMetric", {"gamma": 1}, "no setting 'gamma'.*beta"),
        ("GRPOMetric", {"temperature": 0}, "above 0"),
        ("LossMetric", {"x": 1}, "no settings"),
    ],
)
def test_what_is_set_is_checked(name: str, settings: Json, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        metrics.new(name, settings, 0.0)


def test_a_value_head_is_not_measured() -> None:
    with pytest.raises(NotSupported, match="value head"):
        metrics.new("PPOValueMetric", {}, 0.0)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("GRPOMetric", {"old_logps": [[], [-1.0]]}, "Row 0: old_logps has 0"),
        ("DPOMetric", {"ref_outputs": {"logps": [[-1.0, float("nan")], [-1.0]]}}, "Row 0"),
        ("CompletionRewardMetric", {"rewards": [1.0]}, "mapping"),
        ("CompletionRewardMetric", {"rewards": {"a": ["b"]}}, "must be numbers"),
        ("CompletionRewardMetric", {"generate_time": float("inf")}, "infinity"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_pass(
    name: str, arguments: Json, words: str
) -> None:
    state = metrics.new(name, {}, 0.0)
    with pytest.raises(InvalidRequest, match=words):
        metrics.check(state, LABELS, arguments)
