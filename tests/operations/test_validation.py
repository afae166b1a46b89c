"""Bounds of what a tenant may send, and where large batches are looked at."""

import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from twinkle_dask.config import LimitConfig
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.losses import LOSSES, loss_spec
from twinkle_dask.operations import validation
from twinkle_dask.operations.tenants import key_hint
from twinkle_dask.operations.training import Training
from twinkle_dask.operations.values import LoraRequest, ServedModel, Tenant
from twinkle_dask.types import (
    CsrLayout,
    Datum,
    Embed,
    ForwardBackward,
    LoraSpec,
    LossName,
    LossSpec,
    ModelFacts,
    RunId,
    SampleRequest,
    SamplingParams,
    Stop,
    TargetTokens,
    TenantId,
)

MODEL = ServedModel(
    name="m",
    source="s",
    tokenizer_id="t",
    facts=ModelFacts(
        architecture="a",
        vocab_size=100,
        context_length=50,
        num_parameters=1,
        dtype="float32",
        eos_token_ids=(0,),
        max_rank=8,
        has_tokenizer=True,
        linear_names=("model.layers.0.q_proj", "model.layers.0.v_proj", "lm_head"),
    ),
)
LIMITS = LimitConfig(max_data=600)
DATUM = Datum(
    tokens=np.array([1, 2], np.int32), target_tokens=np.array([2, 3], np.int64), loss_inputs={}
)
SAMPLE = SampleRequest(prompt=np.array([1], np.int32), params=SamplingParams(max_tokens=1))


def batch_of(num: int, datum: Datum = DATUM) -> ForwardBackward:
    return ForwardBackward(data=(datum,) * num, loss=LossSpec(name=LossName.CROSS_ENTROPY))


def test_a_batch_has_so_many_data_and_no_more() -> None:
    validation.batch(batch_of(600), MODEL, LIMITS)
    with pytest.raises(InvalidRequest, match="601 data; send at most 600"):
        validation.batch(batch_of(601), MODEL, LIMITS)


def rollout(loss: str, config: dict[str, float] | None = None, **inputs: Any) -> ForwardBackward:
    """Two data for a policy loss, sound but for these inputs of the second; None drops one."""
    spec = loss_spec(loss, config or {})
    sound = {
        "logprobs": np.array([-1.0, -2.0], np.float32),
        "advantages": np.array([1.0, -1.0], np.float32),
    }
    if LOSSES[spec.name].sequence_level:
        sound["sequence_ratio_mask"] = np.array([0.0, 1.0], np.float32)
    changed = {
        name: np.asarray(values, np.float32)
        for name, values in (sound | inputs).items()
        if values is not None
    }
    data = (replace(DATUM, loss_inputs=sound), replace(DATUM, loss_inputs=changed))
    return ForwardBackward(data=data, loss=spec)


POLICY_LOSSES = [name for name in LossName if LOSSES[name].off_policy]
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_inputs_that_each_loss_takes(loss: str) -> None:
    validation.batch(rollout(loss), MODEL, LIMITS)
    optional: dict[str, Any] = {name: [1.0, 1.0] for name in LOSSES[LossName(loss)].optional}
    validation.batch(rollout(loss, **optional), MODEL, LIMITS)
    # What a token of weight 0 holds besides is never used.
    validation.batch(rollout(loss, logprobs=[NAN, -1], weights=[0, 1]), MODEL, LIMITS)
    validation.batch(rollout(loss, advantages=[INFINITY, 1], weights=[0, 0.5]), MODEL, LIMITS)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (lambda: rollout("ppo", advantages=None), "loss 'ppo' needs 'advantages'"),
        (lambda: rollout("gspo", sequence_ratio_mask=None), "needs 'sequence_ratio_mask'"),
        (lambda: rollout("gspo", sequence_ratio_mask=[0, 0]), "0 everywhere.*was sampled"),
        (lambda: rollout("gspo", sequence_ratio_mask=[1, NAN]), "'sequence_ratio_mask'.*NaN"),
        (
            lambda: rollout("gspo", logprobs=[-1, NAN], weights=[1, 0]),  # still in the ratio
            "'logprobs' has values that are NaN",
        ),
        (lambda: rollout("dro", logprobs=[-1, NAN]), "NaN or infinite; only a token whose"),
        (lambda: rollout("dro", weights=[1, INFINITY]), "'weights' has values"),
        (lambda: rollout("cispo", logprobs=[-1]), r"'logprobs' has shape \(1,\).*must agree"),
        (lambda: rollout("ppo", mask=[1, 1]), "no input 'mask'; it takes:.*weight of 0 leaves"),
        (lambda: rollout("dro", clip_low_threshold=[1, 1]), "no input 'clip_low_threshold'"),
        (lambda: rollout("stable_reinforce", clip_low_threshold=[1, 1]), "clip_low_threshold"),
        (lambda: rollout("ppo", clip_low_threshold=[0.5, 1.3]), "around 1.*as in the loss's"),
        (
            lambda: rollout("ppo", {"clip_low_threshold": 0.9}, clip_high_threshold=[1, 0.8]),
            "bounds of the ratio",
        ),
        (lambda: rollout("cispo", clip_low_threshold=[-0.1, 0]), "at least 0"),
        (lambda: rollout("stable_reinforce", clip_high_threshold=[2, 0]), "above 0"),
    ],
)
def test_a_refused_input_is_named_with_its_datum(
    body: Callable[[], ForwardBackward], says: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^Datum 1: .*{says}"):
        validation.batch(body(), MODEL, LIMITS)


def test_a_policy_loss_takes_one_target_a_position() -> None:
    many = replace(DATUM, target_tokens=np.ones((2, 3), np.int64))
    body = rollout("gspo")
    with pytest.raises(InvalidRequest, match="one target a position"):
        validation.batch(replace(body, data=(many,)), MODEL, LIMITS)


@pytest.mark.parametrize(
    ("stop", "says"),
    [
        (Stop(strings=("x",) * 65), "64 stop"),
        (Stop(tokens=(1,) * 65), "64 stop"),
        (Stop(strings=("x" * 1025,)), "may have 1024"),
        (Stop(strings=("ok", "")), "must not be empty"),
    ],
)
def test_stops_are_few_and_short(stop: Stop, says: str) -> None:
    fits = Stop(strings=("x" * 1024,) * 64, tokens=(1,) * 64)
    for request in (fits, Stop()):
        params = replace(SAMPLE.params, stop=request)
        validation.sample(replace(SAMPLE, params=params), MODEL, LIMITS)
    with pytest.raises(InvalidRequest, match=says):
        validation.sample(replace(SAMPLE, params=replace(SAMPLE.params, stop=stop)), MODEL, LIMITS)


PROMPT = np.arange(1, 6, dtype=np.int32)
CSR = CsrLayout(crow=np.array([0, 1, 1, 2, 2]), col=np.array([0, 10**6]), num_columns=10**6 + 1)


def named(tokens: list[list[int]]) -> TargetTokens:
    return TargetTokens(tokens=np.array(tokens, np.int64).reshape(len(tokens), -1))


@pytest.mark.parametrize(
    "asked",
    [
        {"topk_prompt_logprobs": 7, "topk_sample_logprobs": 7, "prompt_alt_tokens_k": 7},
        {"prompt_logprobs": True, "prompt_logprobs_last_n": 4},
        {"prompt_logprobs": True, "prompt_logprobs_last_n": 1},
        {"target_prompt_logprobs": named([[-1, 99], [0, -1], [-1, -1], [-1, -1]])},
        {"target_prompt_logprobs": TargetTokens(tokens=np.array([-1, 5]), layout=CSR)},
    ],
    ids=str,
)
def test_what_may_be_asked_of_a_prompt(asked: dict[str, Any]) -> None:
    limits = LimitConfig(max_alternatives=7)
    validation.sample(replace(SAMPLE, prompt=PROMPT, **asked), MODEL, limits)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"topk_prompt_logprobs": 101}, "topk_prompt_logprobs must be from 0 to 100, not 101"),
        ({"topk_sample_logprobs": -1}, "topk_sample_logprobs must be from 0 to 100, not -1"),
        ({"prompt_alt_tokens_k": 10**9}, "prompt_alt_tokens_k must be from 0 to 100"),
        ({"prompt_logprobs_last_n": 2}, "needs prompt_logprobs"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 5}, "must be from 1 to 4, not 5"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 0}, "must be from 1 to 4, not 0"),
        (
            {"prompt": PROMPT[:1], "prompt_logprobs": True, "prompt_logprobs_last_n": 1},
            "left out for a prompt of one token",
        ),
        ({"target_prompt_logprobs": named([[1]])}, r"shape \[1, 1\].* takes \[4, K\]"),
        ({"target_prompt_logprobs": TargetTokens(tokens=np.arange(4))}, r"shape \[4\]"),
        ({"target_prompt_logprobs": named([[1], [-2], [1], [1]])}, "has token -2"),
        ({"target_prompt_logprobs": named([[1], [100], [1], [1]])}, "has token 100"),
        ({"target_prompt_logprobs": named([[-1]] * 4)}, "names no token"),
        ({"target_prompt_logprobs": named([[]] * 4)}, "names no token"),
        (
            {"target_prompt_logprobs": TargetTokens(tokens=np.array([-1, -1]), layout=CSR)},
            "names no token",
        ),
        (
            {
                "prompt": PROMPT[:1],
                "target_prompt_logprobs": TargetTokens(tokens=np.ones((0, 1), np.int64)),
            },
            "names no token",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_asked_of_a_prompt(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        validation.sample(replace(SAMPLE, **({"prompt": PROMPT} | asked)), MODEL, LIMITS)


@pytest.mark.parametrize(
    ("asked", "num_bytes"),
    [
        ({"topk_prompt_logprobs": 10}, 5 * 10 * 8),
        ({"topk_prompt_logprobs": 10, "prompt_alt_tokens_k": 3}, 5 * 13 * 8),
        ({"topk_sample_logprobs": 10, "num_samples": 6}, 6 * 10 * 8),
        (
            {"topk_sample_logprobs": 2, "num_samples": 2, "params": SamplingParams()},
            2 * 45 * 2 * 8,
        ),
        (
            {"topk_sample_logprobs": 2, "params": SamplingParams(max_tokens=10**9)},
            45 * 2 * 8,
        ),
        ({"target_prompt_logprobs": named([[1] * 30] * 4)}, 4 * 30 * 4),
        (
            {"target_prompt_logprobs": TargetTokens(tokens=np.array([3, 5]), layout=CSR)},
            2 * 4 + 5 * 8 + 2 * 8,
        ),
    ],
)
def test_an_answer_is_bounded_before_it_is_computed(asked: dict[str, Any], num_bytes: int) -> None:
    request = replace(SAMPLE, prompt=PROMPT, **asked)
    validation.sample(request, MODEL, LimitConfig(max_answer_bytes=num_bytes))
    with pytest.raises(InvalidRequest, match="Ask for fewer"):
        validation.sample(request, MODEL, LimitConfig(max_answer_bytes=num_bytes - 1))


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tags": ("x",) * 65}, "64 tags, not 65"),
        ({"tags": ("x" * 257,)}, "A tag may have 256"),
        ({"tags": ("a\0b",)}, "A tag must not"),
        ({"labels": {"display_name": "x" * 257}}, "display_name may have 256"),
        ({"user_metadata": {"a": "x" * 70_000}}, "A session's metadata may have 64 KiB"),
        ({"user_metadata": nested(1000)}, "nested too deeply"),
    ],
)
def test_what_a_session_says_of_itself_is_short(change: dict[str, Any], says: str) -> None:
    fits: dict[str, Any] = {
        "tags": ("x" * 256,) * 64,
        "user_metadata": {"a": "x" * 60_000, "b": nested(100)},
        "labels": {"display_name": "x" * 256, "project_id": None},
    }
    validation.session(**fits)
    with pytest.raises(InvalidRequest, match=says):
        validation.session(**fits | change)


def test_a_short_key_is_not_hinted_at() -> None:
    assert key_hint("tml-0123456789abcdef") == "cdef"
    assert key_hint("tml-0123456789abcde") == ""


class FakeRuns:
    """Takes whatever ``make`` gives, and knows in which thread that was."""

    taken: ForwardBackward | Embed | None = None
    threads: list[str]
    spec = LoraSpec(rank=1, seed=0)

    async def lane(self, _tenant: Tenant, _run: RunId) -> Any:
        return SimpleNamespace(run=SimpleNamespace(base_model="m", spec=self.spec))

    async def submit(
        self, tenant: Tenant, run: RunId, *, seq: int | None, make: Any, rated: bool = True
    ) -> None:
        self.taken = make(await self.lane(tenant, run), MODEL)


def training_of(runs: FakeRuns) -> Training:
    catalogue = SimpleNamespace(get={"m": MODEL}.__getitem__)
    nothing = cast(Any, None)
    return Training(cast(Any, runs), nothing, nothing, cast(Any, catalogue), LIMITS, nothing)


ME = Tenant(id=TenantId("me"), name="me", key_hint="")
LONG = Datum(tokens=np.ones(50, np.int32), target_tokens=np.ones(50, np.int64), loss_inputs={})


@pytest.mark.parametrize(
    ("batch", "aside"),
    [
        (batch_of(512), False),
        (batch_of(513), True),
        (batch_of(401, LONG), True),
        (batch_of(1, replace(DATUM, target_tokens=np.ones((2, 100_001), np.int64))), True),
    ],
    ids=["small", "many data", "many tokens", "many targets"],
)
async def test_a_large_batch_is_checked_off_the_loop(
    batch: ForwardBackward, aside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[bool] = []
    check = validation.batch

    def watched(*arguments: Any) -> ForwardBackward:
        threads.append(threading.current_thread() is not threading.main_thread())
        return check(*arguments)

    monkeypatch.setattr(validation, "batch", watched)
    runs = FakeRuns()
    training = training_of(runs)
    await training.forward_backward(ME, RunId("r"), seq=1, batch=batch)
    assert runs.taken is batch
    assert threads == [aside]


async def test_a_large_batch_that_is_wrong_is_not_submitted() -> None:
    runs = FakeRuns()
    with pytest.raises(InvalidRequest, match="601 data"):
        await training_of(runs).forward_backward(ME, RunId("r"), seq=1, batch=batch_of(601))
    assert runs.taken is None


async def test_whoever_says_no_seed_gets_one_where_there_is_dropout() -> None:
    """It is in the journal then, so that a replay leaves out the same."""
    rows = Embed(rows=(DATUM.tokens,), slopes=(np.ones(4, np.float32),))

    async def seed_of(spec: LoraSpec, batch: ForwardBackward | Embed) -> int | None:
        runs = FakeRuns()
        runs.spec = spec
        if isinstance(batch, Embed):
            await training_of(runs).embed(ME, RunId("r"), batch=batch)
        else:
            await training_of(runs).forward_backward(ME, RunId("r"), seq=1, batch=batch)
        assert runs.taken is not None
        return runs.taken.dropout_seed

    spec = LoraSpec(rank=1, seed=0, dropout=0.1)
    for batch in (batch_of(1), rows):
        first, second = await seed_of(spec, batch), await seed_of(spec, batch)
        assert first is not None
        assert first != second
        assert await seed_of(spec, replace(batch, dropout_seed=7)) == 7
        assert await seed_of(LoraSpec(rank=1, seed=0), batch) is None
    assert await seed_of(spec, replace(batch_of(1), backward=False)) is None
    assert await seed_of(spec, replace(rows, slopes=None)) is None


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"temperature": float("inf")}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"adapter": False}, "base model alone has no gradient"),
        ({"dropout_seed": -1}, "dropout seed"),
        ({"dropout_seed": 2**63}, "dropout seed"),
        ({"num_counted": -1.0}, "number of at least 0"),
        ({"num_counted": float("nan")}, "number of at least 0"),
    ],
)
def test_what_is_asked_of_a_pass_is_checked(change: dict[str, Any], what: str) -> None:
    with pytest.raises(InvalidRequest, match=what):
        validation.batch(replace(batch_of(1), **change), MODEL, LIMITS)


def test_the_base_model_alone_may_be_asked_forward() -> None:
    request = replace(batch_of(1), adapter=False, backward=False, temperature=0.5)
    assert validation.batch(request, MODEL, LIMITS) is request


def test_logits_are_for_linear_losses_and_so_many() -> None:
    with pytest.raises(InvalidRequest, match="Raw scores are logits"):
        validation.batch(replace(rollout("ppo"), raw_scores=True), MODEL, LIMITS)
    targets = np.ones((2, 50_000), np.int64)
    request = replace(batch_of(40, replace(DATUM, target_tokens=targets)), raw_scores=True)
    assert validation.batch(request, MODEL, LIMITS) is request
    with pytest.raises(InvalidRequest, match="4,100,000 logits"):
        validation.batch(replace(request, data=request.data + request.data[:1]), MODEL, LIMITS)


ROW, SLOPE = DATUM.tokens, np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (Embed(rows=()), "empty"),
        (Embed(rows=(ROW,) * 601), "601 rows"),
        (Embed(rows=(ROW, ROW[:0])), "Row 1 has no tokens"),
        (Embed(rows=(np.array([100], np.int32),)), "Row 0 has token 100"),
        (Embed(rows=(np.ones(51, np.int32),)), "51 tokens"),
        (Embed(rows=(ROW, ROW), slopes=(SLOPE,)), "one slope for each row"),
        (Embed(rows=(ROW, ROW), slopes=(SLOPE, SLOPE[:3])), "all of one length"),
        (Embed(rows=(ROW,), slopes=(SLOPE[None],)), "all of one length"),
        (Embed(rows=(ROW,), slopes=(SLOPE * np.float32(np.nan),)), "NaN"),
        (Embed(rows=(ROW,), slopes=(SLOPE,), adapter=False), "no gradient"),
    ],
)
def test_rows_to_embed_are_checked(rows: Embed, what: str) -> None:
    with pytest.raises(InvalidRequest, match=what):
        validation.embed(rows, MODEL, LIMITS)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"alpha": 0.0}, "lora_alpha"),
        ({"alpha": float("inf")}, "lora_alpha"),
        ({"dropout": 1.0}, "lora_dropout"),
        ({"dropout": -0.1}, "lora_dropout"),
        ({"dropout": float("nan")}, "lora_dropout"),
        ({"targets": ()}, "Name 1 to 4096"),
        ({"targets": ("k_proj",)}, "lm_head, q_proj, v_proj"),
        ({"target_pattern": "k_proj"}, "matches from end to end"),
        ({"target_pattern": "(?i)q"}, "not understood"),
    ],
)
def test_an_adapter_is_one_that_can_be(change: dict[str, Any], what: str) -> None:
    with pytest.raises(InvalidRequest, match=what):
        validation.lora(LoraRequest(rank=1, **change), MODEL)


def test_targets_are_names_or_become_paths() -> None:
    named = validation.lora(LoraRequest(rank=1, targets=("v_proj", "q_proj", "v_proj")), MODEL)
    assert named.targets == ("q_proj", "v_proj")
    by_pattern = validation.lora(LoraRequest(rank=1, target_pattern=r".*\.[qv]_proj"), MODEL)
    assert by_pattern.targets == ("model.layers.0.q_proj", "model.layers.0.v_proj")
    assert by_pattern.target_pattern is None
