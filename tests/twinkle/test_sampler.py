"""Checks 68 to 77: the sampler service."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from transformers import AutoTokenizer
from twinkle_client import init_twinkle_client
from twinkle_client.manager import TwinkleClient
from twinkle_client.model import MultiLoraTransformersModel
from twinkle_client.sampler import vLLMSampler

from tests.twinkle.conftest import KEY, MODEL, OTHER_KEY
from tests.twinkle.speaking import row, teach
from twinkle_dask.local import LocalService

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [40]]
FEATURES = [{"input_ids": prompt} for prompt in PROMPTS]
CONTEXT = 2048  # of the tiny model
SAID = " hello world, this is the answer."


@pytest.fixture
def sampler(client: TwinkleClient) -> vLLMSampler:
    return vLLMSampler(MODEL)


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def question(tokenizer: Any) -> list[int]:
    messages = [{"role": "user", "content": "question"}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@pytest.fixture(scope="module")
def speaker(service: LocalService, tokenizer: Any, question: list[int]) -> str:
    """The address of weights that answer the question with ``SAID`` and the end of the turn."""
    connected = init_twinkle_client(base_url=service.url, api_key=KEY)
    answer = tokenizer.encode(SAID + "<|im_end|>")
    address = teach(MultiLoraTransformersModel(MODEL), [row((question, False), (answer, True))])
    connected.close()
    return address


def refused(status: int, call: Callable[..., Any], *args: Any, **named: Any) -> str:
    with pytest.raises(requests.HTTPError) as info:
        call(*args, **named)
    assert info.value.response.status_code == status, str(info.value)
    return str(info.value)


def greedy(**more: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": 8, **more}


def texts(samples: list[Any]) -> list[str]:
    return [sample.sequences[0].decoded for sample in samples]


def post(
    service: LocalService, client: TwinkleClient, operation: str, body: Any, **more: Any
) -> requests.Response:
    return requests.post(
        f"{service.url}/api/v1/sampler/{MODEL}/twinkle/{operation}",
        json=body,
        headers={"Authorization": f"Bearer {KEY}", "X-Twinkle-Session-Id": client._session_id},
        timeout=60,
        **more,
    )


def test_68_one_answer_for_each_input_in_order(sampler: vLLMSampler) -> None:
    together = sampler.sample(FEATURES, greedy())
    alone = [sampler.sample([feature], greedy())[0] for feature in FEATURES]
    assert [s.sequences[0].tokens for s in together] == [s.sequences[0].tokens for s in alone]
    for prompt, sample in zip(PROMPTS, together, strict=True):
        (sequence,) = sample.sequences
        assert len(sequence.tokens) == 8
        assert sequence.stop_reason == "length"
        assert sequence.new_input_feature["input_ids"] == prompt + sequence.tokens
    (single,) = sampler.sample(FEATURES[1], greedy())
    assert single.sequences[0].tokens == together[1].sequences[0].tokens


def test_68_padding_and_packing_do_not_reach_the_model(sampler: vLLMSampler) -> None:
    plain = sampler.sample([FEATURES[0]], greedy())[0].sequences[0]
    padded = {"input_ids": [[0, 0, 5, 6, 7]], "attention_mask": [[0, 0, 1, 1, 1]]}
    found = sampler.sample([padded], greedy())[0].sequences[0]
    assert found.tokens == plain.tokens
    assert found.new_input_feature["input_ids"] == [5, 6, 7, *plain.tokens]
    message = refused(400, sampler.sample, [FEATURES[0], {"input_ids": [[1, 2], [3, 4]]}])
    assert "inputs[1]" in message


def test_69_trajectories_after_set_template(
    sampler: vLLMSampler, speaker: str, question: list[int]
) -> None:
    assert sampler.set_template("Template", model_id=f"ms://{MODEL}").status == "ok"
    messages = [{"role": "user", "content": "question"}]
    mixed = [{"messages": messages, "user_data": [["id", "7"]]}, {"input_ids": question}]
    first, second = sampler.sample(mixed, greedy(max_tokens=64), adapter_uri=speaker)
    assert first.sequences[0].decoded == second.sequences[0].decoded == SAID + "<|im_end|>"
    feature = first.sequences[0].new_input_feature
    assert feature["messages"][-1] == {"role": "assistant", "content": SAID}
    assert feature["user_data"] == [["id", "7"]]
    assert "messages" not in second.sequences[0].new_input_feature


def test_69_templates_belong_to_a_session_and_a_name(
    sampler: vLLMSampler, service: LocalService, client: TwinkleClient
) -> None:
    ask = [{"messages": [{"role": "user", "content": "hi"}]}]
    plain = sampler.sample(ask, greedy())[0].sequences[0].new_input_feature["messages"]
    sampler.set_template("Template", default_system="system")
    system = sampler.sample(ask, greedy())[0].sequences[0].new_input_feature["messages"]
    assert [m["role"] for m in plain] == ["user", "assistant"]
    assert [m["role"] for m in system] == ["system", "user", "assistant"]
    init_twinkle_client(base_url=service.url, api_key=KEY).close()
    other = init_twinkle_client(base_url=service.url, api_key=KEY)
    theirs = vLLMSampler(MODEL).sample(ask, greedy())[0].sequences[0].new_input_feature
    assert [m["role"] for m in theirs["messages"]] == ["user", "assistant"]
    other.close()


def test_69_unknown_templates_are_refused(sampler: vLLMSampler) -> None:
    assert "NoTemplate" in refused(400, sampler.set_template, "NoTemplate")


def test_70_num_samples_within_and_beside(sampler: vLLMSampler) -> None:
    params = {"max_tokens": 4, "seed": 3}
    within = sampler.sample(FEATURES[:2], {**params, "num_samples": 3})
    beside = sampler.sample(FEATURES[:2], params, num_samples=3)
    for one, other in zip(within, beside, strict=True):
        assert len(one.sequences) == 3
        assert [s.tokens for s in one.sequences] == [s.tokens for s in other.sequences]
        assert len({tuple(s.tokens) for s in one.sequences}) == 3
    message = refused(400, sampler.sample, FEATURES, {"num_samples": 2}, num_samples=3)
    assert "num_samples" in message


def test_71_seeds_repeat_and_temperature_0_is_greedy(sampler: vLLMSampler) -> None:
    def drawn(**params: Any) -> list[list[int]]:
        found = sampler.sample(FEATURES, {"max_tokens": 6, **params})
        return [sample.sequences[0].tokens for sample in found]

    assert drawn(seed=11) == drawn(seed=11) != drawn(seed=12)
    assert drawn(temperature=0, seed=1) == drawn(temperature=0.0) == drawn(top_k=1)
    assert drawn() != drawn()
    penalised = drawn(temperature=0, repetition_penalty=5.0, max_new_tokens=6)
    assert all(len(set(tokens)) == len(tokens) for tokens in penalised)


def test_72_stop_strings_and_ids(
    sampler: vLLMSampler, speaker: str, question: list[int], tokenizer: Any
) -> None:
    def said(stop: Any) -> tuple[str, str]:
        params = greedy(max_tokens=64, stop=stop)
        (sample,) = sampler.sample([{"input_ids": question}], params, adapter_uri=speaker)
        return sample.sequences[0].decoded, sample.sequences[0].stop_reason

    assert said(None) == said([]) == (SAID + "<|im_end|>", "stop")
    text, reason = said("world")
    assert (text[: text.index("world") + 5], reason) == (" hello world", "stop")
    assert len(text) < len(SAID)
    assert said(["nothing", "world"]) == said("world")
    comma = tokenizer.encode(SAID)[4]
    tokens, reason = said([comma])
    assert reason == "stop"
    assert tokens == tokenizer.decode(
        tokenizer.encode(SAID)[: tokenizer.encode(SAID).index(comma) + 1]
    )
    params = greedy(max_tokens=2)
    (short,) = sampler.sample([{"input_ids": question}], params, adapter_uri=speaker)
    assert short.sequences[0].stop_reason == "length"
    assert "stop" in refused(400, sampler.sample, FEATURES, {"stop": [1.5]})


def test_73_logprobs_are_those_of_forward_only(
    sampler: vLLMSampler, model: MultiLoraTransformersModel
) -> None:
    sampled_with = teach(model, [row(([5, 6, 7], False), ([50, 51, 52], True))])
    params = {"max_tokens": 6, "seed": 5, "temperature": 1.3, "top_k": 50, "logprobs": 1}
    (sample,) = sampler.sample([FEATURES[0]], params, adapter_uri=sampled_with)
    (sequence,) = sample.sequences
    assert [len(pairs) for pairs in sequence.logprobs] == [1] * 6
    assert [pairs[0][0] for pairs in sequence.logprobs] == sequence.tokens
    trained = model.forward_only(inputs=[sequence.new_input_feature]).result["logps"][0]
    told = [pairs[0][1] for pairs in sequence.logprobs]
    assert told == pytest.approx(trained[2:8], abs=1e-3)


def test_73_several_logprobs_begin_with_the_token_drawn(sampler: vLLMSampler) -> None:
    params = {"max_tokens": 5, "seed": 1, "logprobs": 4}
    sequence = sampler.sample([FEATURES[0]], params)[0].sequences[0]
    for token, pairs in zip(sequence.tokens, sequence.logprobs, strict=True):
        assert pairs[0][0] == token
        assert len({t for t, _ in pairs}) == 4
        others = [lp for _, lp in pairs[1:]]
        assert others == sorted(others, reverse=True)
    for nothing in (None, 0):
        quiet = sampler.sample([FEATURES[0]], {**params, "logprobs": nothing})[0].sequences[0]
        assert quiet.logprobs is None
        assert quiet.tokens == sequence.tokens


def test_74_what_was_sampled_trains_as_it_is(
    sampler: vLLMSampler, model: MultiLoraTransformersModel
) -> None:
    teach(model, [row(([5, 6, 7], False), ([50, 51, 52], True))])
    sampler.set_template("Template")
    inputs = [*FEATURES[:2], {"messages": [{"role": "user", "content": "hi"}]}]
    samples = sampler.sample(inputs, {"max_tokens": 5, "seed": 2, "logprobs": 1})
    features = [sample.sequences[0].new_input_feature for sample in samples]
    for sample, feature in zip(samples, features, strict=True):
        tokens, labels = feature["input_ids"], feature["labels"]
        drawn = sample.sequences[0].tokens
        assert tokens[-5:] == drawn
        assert [label for label in labels if label != -100] == drawn
        assert labels[-6:] == [*drawn, -100]
    result = model.forward_backward(inputs=features).result
    assert result["loss"] > 0
    assert len(result["logps"]) == 3


def test_74_a_second_round_keeps_the_first_ones_labels(sampler: vLLMSampler) -> None:
    first = sampler.sample([FEATURES[0]], {"max_tokens": 3, "seed": 2})[0].sequences[0]
    then = sampler.sample([first.new_input_feature], {"max_tokens": 2, "seed": 2})[0].sequences[0]
    labels = then.new_input_feature["labels"]
    assert [label for label in labels if label != -100] == first.tokens + then.tokens


def test_75_saved_weights_change_what_is_sampled(
    sampler: vLLMSampler, model: MultiLoraTransformersModel
) -> None:
    uri = teach(model, [row(([5, 6, 7], False), ([50, 51, 52, 53], True))])
    params = greedy(max_tokens=4)

    def drawn(**which: Any) -> list[int]:
        return sampler.sample([FEATURES[0]], params, **which)[0].sequences[0].tokens

    assert drawn(adapter_uri=uri) == [50, 51, 52, 53] != drawn()
    assert drawn(adapter_uri=uri.replace("twinkle://", "tinker://")) == [50, 51, 52, 53]
    # A name alone is the newest that the session's adapter of this name has saved.
    assert drawn(adapter_name=model.adapter_name) == [50, 51, 52, 53]
    sampler.add_adapter_to_sampler("mine", {"r": 16}, adapter_uri=uri)
    assert drawn(adapter_name="mine") == [50, 51, 52, 53]


def test_76_unknown_weights_are_an_error_and_never_the_base_model(
    sampler: vLLMSampler, service: LocalService, speaker: str
) -> None:
    known = speaker.rsplit("/", 1)[0]
    assert "none" in refused(404, sampler.sample, FEATURES, adapter_uri=f"{known}/none")
    refused(404, sampler.sample, FEATURES, adapter_name="nobody")
    refused(400, sampler.sample, FEATURES, adapter_uri="/etc/passwd")
    refused(404, sampler.add_adapter_to_sampler, "new", {"r": 4})
    other = init_twinkle_client(base_url=service.url, api_key=OTHER_KEY)
    message = refused(404, vLLMSampler(MODEL).sample, FEATURES, adapter_uri=speaker)
    assert "spoken" in message
    other.close()


def test_77_max_tokens_0_scores(sampler: vLLMSampler) -> None:
    (sample,) = sampler.sample([FEATURES[2]], {"max_tokens": 0, "prompt_logprobs": 2})
    (sequence,) = sample.sequences
    assert sequence.tokens == []
    assert sequence.new_input_feature["input_ids"] == PROMPTS[2]
    assert len(sample.prompt_logprobs) == 4
    assert sample.prompt_logprobs[0] is None
    assert all(logprob < 0 for logprob in sample.prompt_logprobs[1:])
    assert [pairs and len(pairs) for pairs in sample.topk_prompt_logprobs] == [None, 2, 2, 2]
    (drawn,) = sampler.sample([FEATURES[2]], {"max_tokens": 3, "prompt_logprobs": 0})
    assert len(drawn.sequences[0].tokens) == 3
    assert drawn.prompt_logprobs == sample.prompt_logprobs
    (plain,) = sampler.sample([FEATURES[2]], {"max_tokens": 3})
    assert plain.prompt_logprobs is None


def test_77_a_prompt_that_fills_the_context_can_be_scored(sampler: vLLMSampler) -> None:
    full = [{"input_ids": [5, 6] * (CONTEXT // 2)}]
    (sample,) = sampler.sample(full, {"max_tokens": 0})
    assert len(sample.prompt_logprobs) == CONTEXT
    assert sample.sequences[0].tokens == []
    assert "fills the context" in refused(400, sampler.sample, full, {"max_tokens": 1})
    longer = [{"input_ids": [5] * (CONTEXT + 1)}]
    assert str(CONTEXT) in refused(400, sampler.sample, longer, {"max_tokens": 0})


@pytest.mark.parametrize(
    "params",
    [
        {"max_token": 3},
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_k": 0},
        {"repetition_penalty": 0},
        {"num_samples": 0},
        {"max_tokens": -1},
        {"max_tokens": 1, "max_new_tokens": 2},
        {"seed": 1.5},
        {"logprobs": -1},
    ],
)
def test_77_what_is_not_understood_is_refused(sampler: vLLMSampler, params: Any) -> None:
    message = refused(400, sampler.sample, FEATURES, params)
    assert next(iter(params)) in message


def test_77_empty_inputs_and_wrong_tokens_are_refused(sampler: vLLMSampler) -> None:
    for inputs in ([], [[1, 2]], [{"input_ids": []}], [{"input_ids": [10**6]}]):
        refused(400, sampler.sample, inputs)
    refused(404, vLLMSampler, "no/such-model")


def test_sampling_belongs_to_a_session(service: LocalService, client: TwinkleClient) -> None:
    url = f"{service.url}/api/v1/sampler/{MODEL}/twinkle/sample"
    body = {"inputs": FEATURES}
    theirs = {"Authorization": f"Bearer {OTHER_KEY}", "X-Twinkle-Session-Id": client._session_id}
    assert requests.post(url, json=body, headers=theirs, timeout=60).status_code == 404
    nobodys = {"Authorization": f"Bearer {KEY}"}
    assert requests.post(url, json=body, headers=nobodys, timeout=60).status_code == 400
    assert post(service, client, "sample", {**body, "what": 1}).status_code == 400
    assert post(service, client, "apply_patch", {"patch_cls": "os.system"}).status_code == 400


# ---- sample_stream


def test_a_stream_is_the_sample_in_pieces(
    sampler: vLLMSampler,
    service: LocalService,
    client: TwinkleClient,
    speaker: str,
    question: list[int],
) -> None:
    body = {
        "inputs": [{"input_ids": question}],
        "adapter_uri": speaker,
        "sampling_params": {"max_tokens": 40, "temperature": 0, "logprobs": 2, "num_samples": 2},
    }
    whole = post(service, client, "sample", body).json()["samples"][0]["sequences"]
    with post(service, client, "sample_stream", body, stream=True) as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in answer.iter_lines()]
    for index, sequence in enumerate(whole):
        mine = [line for line in lines if line["index"] == index]
        assert len(mine) > 3
        assert "".join(line["delta"] for line in mine) == SAID
        assert [t for line in mine for t in line["tokens"]] == sequence["tokens"]
        told = [pairs for line in mine for pairs in line.get("logprobs", [])]
        assert told == sequence["logprobs"]
        assert [line["finish_reason"] for line in mine] == [None] * (len(mine) - 1) + ["stop"]


def test_streams_of_many_inputs_or_none_are_refused(
    service: LocalService, client: TwinkleClient
) -> None:
    for inputs in (FEATURES, []):
        assert post(service, client, "sample_stream", {"inputs": inputs}).status_code == 400
    score = {"inputs": FEATURES[:1], "sampling_params": {"max_tokens": 0}}
    assert post(service, client, "sample_stream", score).status_code == 400


def test_leaving_a_stream_or_a_sample_frees_the_sampler(
    service: LocalService, client: TwinkleClient, sampler: vLLMSampler
) -> None:
    """With the default of samples in flight nothing would show; so they are counted."""
    # Of many, one at least does not happen to draw the end of the text before the client leaves.
    sampling_params = {"max_tokens": 2000, "stop": [4095], "num_samples": 16}
    body = {"inputs": FEATURES[:1], "sampling_params": sampling_params}
    with post(service, client, "sample_stream", body, stream=True) as answer:
        next(answer.iter_lines())
    with pytest.raises(requests.ReadTimeout):
        requests.post(
            f"{service.url}/api/v1/sampler/{MODEL}/twinkle/sample",
            json=body,
            headers={"Authorization": f"Bearer {KEY}", "X-Twinkle-Session-Id": client._session_id},
            timeout=0.5,
        )
    gone = threading.Event()
    for _ in range(100):
        pending = requests.get(
            f"{service.url}/api/v1/twinkle/status",
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=60,
        ).json()["resources"]["futures"]
        if pending == 0:
            break
        gone.wait(0.1)
    assert pending == 0
    # Nobody was told anything, and nobody should look for a fault of the server's.
    lines = (service.data_dir / "server.log").read_text().splitlines()
    left = [line for line in lines if '"status": 499' in line and "/sample" in line]
    assert left
