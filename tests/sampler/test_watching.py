"""Following a request while it is drawn: every token once, in order, before the outcome."""

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from tests.sampler.conftest import MakeDriver
from tests.sampler.driver import prompt, request
from twinkle_dask.cluster.parts import Parts
from twinkle_dask.sampler.interface import SampleWork
from twinkle_dask.sampler.text_stream import TextStream
from twinkle_dask.types import SampleResult, TenantId

HALF = "\ufffd"


def test_parts_are_the_result_in_pieces(make: MakeDriver) -> None:
    """With so little memory that sequences lose their places and go on later."""
    driver, woken = make(max_kv_bytes=2**17), list[None]()
    parts = Parts(lambda: woken.append(None))
    asked = request(prompt(20), 30, num_samples=6, topk_sample_logprobs=2)
    watch = parts.watch("it", lambda: TextStream(driver.sampler.tokenizer, prompt(20)))
    driver.sampler.submit(SampleWork("it", TenantId("t"), asked, None, watch))
    driver.submit(request(prompt(10), 20))  # nobody follows this one
    tokens, logprobs, top = defaultdict[int, list[int]](list), list[float](), list[int]()
    texts = defaultdict[int, str](str)
    pieces, tokenizer = 0, driver.sampler.tokenizer
    assert tokenizer is not None
    while "it" not in driver.outcomes:
        driver.step(3)
        before = len(woken)
        for part in parts.take():
            assert part.id == "it"
            assert before
            pieces += 1
            drawn = part.drawn
            tokens[drawn.index] += drawn.tokens.tolist()
            logprobs += drawn.logprobs.tolist()
            assert len(drawn.texts) == len(drawn.tokens)
            texts[drawn.index] += "".join(drawn.texts)
            assert drawn.topk_logprobs is not None
            assert drawn.topk_logprobs.tokens.shape == (len(drawn.tokens), 2)
            top += drawn.topk_logprobs.tokens[:, 0].tolist()
        woken.clear()
    result = driver.outcomes["it"]
    assert isinstance(result, SampleResult)
    for index, sequence in enumerate(result.sequences):
        assert tokens[index] == sequence.tokens.tolist()
        whole: str = tokenizer.decode(tokens[index], skip_special_tokens=True)
        assert texts[index].replace(HALF, "") == whole.replace(HALF, "")
    assert len(logprobs) == len(top) == 180
    assert np.isclose(sum(logprobs), sum(s.logprobs.sum() for s in result.sequences), atol=1e-3)
    assert pieces > 30
    assert not parts.take()


@pytest.mark.parametrize(
    "text", ["plain words, and more", "ein Märchen: 日本語 👩‍👩‍👧 …", "\n\n a  b"]
)
def test_text_grows_to_what_all_tokens_say(make: MakeDriver, text: str) -> None:
    tokenizer: Any = make().sampler.tokenizer
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, tokenizer.encode("before ", add_special_tokens=False))
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces) == text
    assert HALF not in "".join(pieces)
