"""What an adapter is set to and how far it has got, as JSON and back."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.adapter_metrics import (
    Measured,
    accumulated,
    calculated,
    known_arguments,
    with_metric,
)
from twinkle_dask.operations.adapter_settings import (
    AdapterSettings,
    Named,
    Progress,
    accumulation_of,
    finite,
    progress_of,
    settings_of,
)
from twinkle_dask.operations.adapters import run_of
from twinkle_dask.types import SessionId

values = st.dictionaries(
    st.text(max_size=5), st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5)
)
named = st.builds(Named, name=st.text(max_size=9), settings=values)


@given(
    st.builds(
        AdapterSettings,
        adapter=st.text(max_size=9),
        accumulation=st.integers(1, 9),
        save_dir=st.none() | st.text(),
        template=st.none() | named,
        processor=st.none() | named,
        loss=named,
        optimizer=st.none() | named,
        schedule=st.none() | named,
        train_metrics=st.lists(named, max_size=3).map(tuple),
        eval_metrics=st.lists(named, max_size=3).map(tuple),
    )
)
def test_settings_survive_their_row(settings: AdapterSettings) -> None:
    assert settings_of(json.loads(json.dumps(settings.json()))) == settings


@given(
    st.builds(
        Progress,
        gradients=st.integers(0, 9),
        steps=st.integers(0, 9),
        learning_rate=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        grad_norm=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        train=st.lists(values, max_size=3).map(tuple),
        eval=st.lists(values, max_size=3).map(tuple),
        weights=st.none() | values,
    )
)
def test_progress_survives_its_row(progress: Progress) -> None:
    assert progress_of(json.loads(json.dumps(progress.json()))) == progress


def test_a_row_holds_numbers_alone() -> None:
    row = Progress(grad_norm=math.nan, train=({"a": [math.inf, 1.0]},)).json()
    assert (row["grad_norm"], row["train"]) == (None, [{"a": [None, 1.0]}])
    assert finite({"x": "nan", "y": (1, -math.inf)}) == {"x": "nan", "y": [1, None]}


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2", None, 10**9])
def test_accumulation_is_a_whole_number(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="gradient_accumulation_steps"):
        accumulation_of(value)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a..b", "é", "x" * 65, "a b", "a\n"])
def test_names_that_are_not_usable(name: str) -> None:
    with pytest.raises(InvalidRequest, match="not usable"):
        run_of(SessionId("s"), name)


def test_a_name_becomes_a_run() -> None:
    assert run_of(SessionId("s"), "my.Adapter_1-x") == "s-my.Adapter_1-x"


def measured(loss: float | None, *, targets: int = 2) -> Measured:
    return Measured(
        labels=(np.asarray([1] * targets + [-100]),),
        logprobs=(np.zeros(targets + 1, np.float32),),
        correct=(np.asarray([True] + [False] * targets),),
        embeddings=None,
        loss=loss,
        num_counted=targets,
        arguments="{}",
    )


class TestMetrics:
    def test_training_and_evaluation_gather_apart(self) -> None:
        settings, progress = AdapterSettings(adapter="a"), Progress(grad_norm=0.5)
        progress = accumulated(settings, progress, measured(4.0), training=True)
        progress = accumulated(settings, progress, measured(6.0, targets=1), training=False)
        trained, progress = calculated(settings, progress, training=True)
        evaluated, progress = calculated(settings, progress, training=False)
        # The default loss is a sum, told for a token.
        assert (trained["loss"], evaluated["loss"]) == ("2.0000", "6.0000")
        assert (trained["total_tokens"], evaluated["total_tokens"]) == (2, 1)
        assert trained["grad_norm"] == "0.500000"

    def test_the_learning_rate_is_that_of_the_moment(self) -> None:
        settings = AdapterSettings(adapter="a")
        progress = accumulated(settings, Progress(learning_rate=1.0), measured(1.0), training=True)
        progress = progress_of({**progress.json(), "learning_rate": 0.5})
        told, _ = calculated(settings, progress, training=True)
        assert told["learning rate"] == f"{0.5:.6e}"

    def test_what_was_told_is_not_told_again(self) -> None:
        settings = AdapterSettings(adapter="a")
        progress = accumulated(settings, Progress(), measured(1.0), training=True)
        _, progress = calculated(settings, progress, training=True)
        told, _ = calculated(settings, progress, training=True)
        assert "total_tokens" not in told

    def test_a_metric_that_is_added_later_begins_then(self) -> None:
        settings = AdapterSettings(adapter="a")
        progress = accumulated(settings, Progress(), measured(1.0), training=True)
        more = with_metric(Named(name="CompletionRewardMetric"), True)(settings)
        assert len(more.train_metrics) == len(more.eval_metrics) + 1
        progress = accumulated(more, progress, measured(1.0), training=True)
        assert len(progress.train) == len(more.train_metrics)

    def test_for_both_unless_one_is_named(self) -> None:
        settings = AdapterSettings(adapter="a")
        both = with_metric(Named(name="GRPOMetric"), None)(settings)
        assert len(both.train_metrics) == len(both.eval_metrics) == 4
        one = with_metric(Named(name="GRPOMetric"), False)(settings)
        assert (len(one.train_metrics), len(one.eval_metrics)) == (3, 4)

    def test_there_are_not_any_number_of_them(self) -> None:
        settings = AdapterSettings(adapter="a")
        add = with_metric(Named(name="GRPOMetric"), None)
        for _ in range(29):
            settings = add(settings)
        assert len(settings.train_metrics) == 32
        with pytest.raises(InvalidRequest, match="32 metrics"):
            add(settings)

    def test_arguments_that_no_metric_knows_are_not_kept(self) -> None:
        assert json.loads(known_arguments({"advantages": [1.0], "other": "x" * 99})) == {
            "advantages": [1.0]
        }
