"""When sequences end: the rule by itself with a real tokenizer, and through the engine."""

from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny_qwen3
from tests.sampler.conftest import MakeDriver
from tests.sampler.driver import ON_AND_ON, Driver, prompt, request
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.loading import load_base
from twinkle_dask.sampler.engine import TorchSampler
from twinkle_dask.sampler.stopping import StopRule, TextWatch
from twinkle_dask.types import Stop, StopReason

EOS = (2, 0)


def rule(stop: Stop, max_tokens: int = 100, tokenizer: Any = None) -> StopRule:
    return StopRule(
        stop, max_tokens=max_tokens, end_of_sequence_ids=EOS, prompt=[], tokenizer=tokenizer
    )


def test_end_of_sequence_tokens() -> None:
    assert rule(Stop()).after(2) is StopReason.STOP
    assert rule(Stop()).after(0) is StopReason.STOP
    assert rule(ON_AND_ON).after(2) is None


def test_stop_tokens_come_beside_the_end_of_sequence() -> None:
    assert rule(Stop(tokens=(9,))).after(9) is StopReason.STOP
    assert rule(Stop(tokens=(9,))).after(2) is StopReason.STOP
    assert rule(Stop(tokens=(9,), end_of_sequence=False)).after(2) is None


def test_length_and_a_stop_at_the_last_token() -> None:
    stop = rule(Stop(tokens=(9,)), max_tokens=2)
    assert stop.after(5) is None
    assert stop.after(5) is StopReason.LENGTH
    stop = rule(Stop(tokens=(9,)), max_tokens=1)
    assert stop.after(9) is StopReason.STOP


@pytest.mark.parametrize(
    ("text", "strings"),
    [
        ("Who are you? I am a small model", ["you?"]),
        ("the lazy dog while", ["y dog w"]),
        ("a\n\nb", ["\n\n"]),
        ("naïve café 你好 🎉 done", ["é"]),
        ("naïve café 你好 🎉 done", ["你好"]),
        ("naïve café 你好 🎉 done", ["🎉 d"]),
        ("one<|im_end|>two", ["<|im_end|>"]),
        ("aaaaaaaaab", ["aaab", "never"]),
    ],
)
def test_strings_stop_at_the_token_that_completes_them(
    base: BaseModel, text: str, strings: list[str]
) -> None:
    tokenizer: Any = base.tokenizer
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    watch = TextWatch(tokenizer, strings, prompt=tokenizer.encode("The quick"))
    ended = next(i for i, token in enumerate(tokens) if watch.completes(token))
    before, upto = tokenizer.decode(tokens[:ended]), tokenizer.decode(tokens[: ended + 1])
    assert any(string in upto for string in strings)
    assert not any(string in before for string in strings)


def test_strings_that_are_not_there_and_bytes_that_are_no_text(base: BaseModel) -> None:
    tokenizer: Any = base.tokenizer
    half = tokenizer.encode("🎉", add_special_tokens=False)[:1]
    watch = TextWatch(tokenizer, ["dog"], prompt=half)
    tokens = tokenizer.encode("the lazy cat", add_special_tokens=False)
    assert not any(watch.completes(token) for token in [*half * 50, *tokens])
    assert any(watch.completes(token) for token in tokenizer.encode(" dogs"))


def test_the_prompt_does_not_count(base: BaseModel) -> None:
    tokenizer: Any = base.tokenizer
    watch = TextWatch(tokenizer, ["dog"], prompt=tokenizer.encode("lazy do"))
    assert not any(watch.completes(token) for token in tokenizer.encode("g"))


def text_of(base: BaseModel, tokens: Any) -> str:
    tokenizer: Any = base.tokenizer
    return tokenizer.decode(tokens.tolist())


def test_engine_returns_the_stop_token(make: MakeDriver) -> None:
    free = make().sample(request(prompt(6), 30))
    token = int(free.tokens[7])
    first = free.tokens.tolist().index(token)
    found = make().sample(request(prompt(6), 30, stop=Stop(tokens=(token,), end_of_sequence=False)))
    assert found.tokens.tolist() == free.tokens[: first + 1].tolist()
    assert len(found.logprobs) == first + 1
    assert found.stop_reason is StopReason.STOP
    assert free.stop_reason is StopReason.LENGTH


def test_engine_stops_at_strings(make: MakeDriver, base: BaseModel) -> None:
    free = make().sample(request(prompt(6), 40))
    text = text_of(base, free.tokens)
    string = next(text[i : i + 3] for i in range(20, len(text)) if "\ufffd" not in text[i : i + 3])
    found = make().sample(request(prompt(6), 40, stop=Stop(strings=("\x00\x01", string))))
    assert found.stop_reason is StopReason.STOP
    assert string in text_of(base, found.tokens)
    assert string not in text_of(base, found.tokens[:-1])
    assert found.tokens.tolist() == free.tokens[: len(found.tokens)].tolist()


def test_engine_stops_at_the_end_of_sequence_unless_told_otherwise(make: MakeDriver) -> None:
    many: dict[str, Any] = {"num_samples": 64, "temperature": 2.0, "top_k": -1}
    driver = make()
    ended = driver.result(driver.submit(request(prompt(3), 60, stop=Stop(), **many))).sequences
    went_on = driver.result(driver.submit(request(prompt(3), 60, **many))).sequences
    assert {s.stop_reason for s in went_on} == {StopReason.LENGTH}
    assert any(token in EOS for s in went_on for token in s.tokens[:-1])
    assert {s.stop_reason for s in ended} == {StopReason.LENGTH, StopReason.STOP}
    for s in ended:
        inside = [token in EOS for token in s.tokens]
        assert not any(inside[:-1])
        assert inside[-1] == (s.stop_reason is StopReason.STOP)


def test_without_max_tokens_it_goes_on_to_the_context_limit(tmp_path: Path) -> None:
    folder = tiny_qwen3(
        tmp_path / "m", vocab_size=512, hidden=64, layers=1, max_position_embeddings=96
    )
    driver = Driver(TorchSampler(load_base(str(folder), "float32", max_rank=8)))
    for length in (90, 95, 96):
        found = driver.sample(request(prompt(length), None))
        assert found.stop_reason is StopReason.LENGTH
        assert len(found.tokens) == max(1, 96 - length)
    assert len(driver.sample(request(prompt(90), 1000)).tokens) == 6
    driver.failure(driver.submit(request(prompt(97), 1)), InvalidRequest)


def test_strings_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    folder = tiny_qwen3(tmp_path / "m", vocab_size=64, hidden=32, layers=1, tokenizer=False)
    driver = Driver(TorchSampler(load_base(str(folder), "float32", max_rank=8)))
    error = driver.failure(driver.submit(request([1], stop=Stop(strings=("a",)))), InvalidRequest)
    assert "tokenizer" in error.message


def test_empty_string_is_refused(make: MakeDriver) -> None:
    driver = make()
    driver.failure(driver.submit(request([1], stop=Stop(strings=("",)))), InvalidRequest)
