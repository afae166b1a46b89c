"""Checks 80 to 94 of the protocol: data sets, loaders and other processors of the service."""

import json
import math
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from twinkle.dataset import DatasetMeta
from twinkle_client import init_twinkle_client
from twinkle_client.dataloader import DataLoader
from twinkle_client.dataset import (
    Dataset,
    IterableDataset,
    IterablePackingDataset,
    LazyDataset,
    PackingDataset,
)
from twinkle_client.http import get_base_url, http_post
from twinkle_client.manager import TwinkleClient
from twinkle_client.processor.base import InputProcessor

from tests.twinkle.conftest import KEY, MODEL, OTHER_KEY, PLAIN_KEY
from twinkle_dask.local import LocalService

QUERIES = [
    {"query": f"Who are you, {{{{NAME}}}} {i}?", "response": "By {{AUTHOR}}."} for i in range(6)
]


@pytest.fixture(autouse=True)
def own_session(service: LocalService, client: TwinkleClient) -> Generator[None]:
    """Processors count per tenant: each test ends its session, and with it what it made."""
    yield
    client.close()
    end_session(service, client._session_id)


def end_session(service: LocalService, session: str, key: str = KEY) -> None:
    answer = requests.post(
        f"{service.url}/api/v1/sessions/{session}/finish",
        json={"reason": {"type": "success"}},
        headers={"X-API-Key": key},
    )
    assert answer.status_code == 200, answer.text


@contextmanager
def another_client(service: LocalService, key: str) -> Generator[TwinkleClient]:
    """A client with a session of its own, in place of the first one from here on."""
    made = init_twinkle_client(base_url=service.url, api_key=key)
    try:
        yield made
    finally:
        made.close()
        end_session(service, made._session_id, key)


def rows(number: int) -> list[dict[str, Any]]:
    return [{"n": i, "text": f"row {i}"} for i in range(number)]


def memory(data: Any, **more: Any) -> DatasetMeta:
    return DatasetMeta(data=data, **more)


def raw(processor: Any, function: str, **arguments: Any) -> requests.Response:
    pid = processor if isinstance(processor, str) else processor.processor_id
    return post("call", processor_id=pid, function=function, **arguments)


def create(processor_type: str, class_type: str, **arguments: Any) -> requests.Response:
    return post("create", processor_type=processor_type, class_type=class_type, **arguments)


def post(what: str, **body: Any) -> requests.Response:
    """What the client cannot send by itself, with its headers; refusals are answers here."""
    try:
        return http_post(f"{get_base_url()}/processor/twinkle/{what}", json_data=body)
    except requests.HTTPError as error:
        return error.response


def refused(call: Callable[[], Any]) -> tuple[int, str]:
    """Status and message of a call that must be refused."""
    with pytest.raises(requests.HTTPError) as caught:
        call()
    return caught.value.response.status_code, caught.value.response.json()["detail"]


def trajectories(*texts: str) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": f"{text}!"},
            ]
        }
        for text in texts
    ]


def encoded(cls: Any, data: Any, **template: Any) -> Any:
    dataset = cls(memory(data))
    dataset.set_template("Template", model_id=f"ms://{MODEL}", **template)
    dataset.encode()
    return dataset


def test_80_local_jsonl_with_a_range_slice(client: TwinkleClient, data_root: Path) -> None:
    file = data_root / "numbers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(10)))
    dataset = Dataset(DatasetMeta(str(file), data_slice=range(2, 8, 2)))
    assert len(dataset) == 3
    assert dataset[1] == {"n": 4, "text": "row 4"}
    assert dataset[-1]["n"] == 6
    # What is out of range ends the sequence protocol, so a plain loop works.
    assert [row["n"] for row in dataset] == [2, 4, 6]


@pytest.mark.parametrize("kind", ["json", "csv", "txt", "parquet"])
def test_80_other_formats(client: TwinkleClient, data_root: Path, kind: str) -> None:
    import pandas as pd

    file = data_root / f"numbers.{kind}"
    frame = pd.DataFrame(rows(3))
    match kind:
        case "json":
            frame.to_json(file, orient="records")
        case "csv":
            frame.to_csv(file, index=False)
        case "parquet":
            frame.to_parquet(file)
        case _:
            file.write_text("\n".join(frame["text"]))
    dataset = Dataset(DatasetMeta(f"numbers.{kind}"))
    assert [row["text"] for row in dataset] == ["row 0", "row 1", "row 2"]


def test_80_files_outside_of_the_data_roots(
    client: TwinkleClient, data_root: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "secret.jsonl"
    outside.write_text('{"a": 1}\n')
    link = data_root / "link.jsonl"
    link.unlink(missing_ok=True)
    os.symlink(outside, link)
    for name in (str(outside), "link.jsonl", f"{data_root}/../{outside}", "/etc/passwd", "absent"):
        status, detail = refused(lambda name=name: Dataset(DatasetMeta(name)))
        assert status == 404
        assert "no data set" in detail


def test_81_in_memory_rows_and_columns(client: TwinkleClient) -> None:
    assert list(Dataset(memory(rows(3)))) == rows(3)
    columns = Dataset(memory({"a": [1, 2], "b": ["x", None]}))
    assert list(columns) == [{"a": 1, "b": "x"}, {"a": 2, "b": None}]


def test_81_slices_of_in_memory_rows(client: TwinkleClient) -> None:
    part = Dataset(memory(rows(4), data_slice=[3, 0, 5]))
    assert [row["n"] for row in part] == [3, 0, 1]


def test_82_map_with_a_preprocessor(client: TwinkleClient) -> None:
    dataset = Dataset(memory(QUERIES))
    dataset.map("SelfCognitionProcessor", init_args={"model_name": "Ada", "model_author": "Lab"})
    row = dataset[0]
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][1]["content"] == "Who are you, Ada 0?"
    assert row["messages"][2]["content"] == "By Lab."
    assert row["query"] == QUERIES[0]["query"]
    dataset.map("SelfCognitionProcessor", remove_columns=["query", "response"])
    assert set(dataset[0]) == {"messages"}


def test_82_unknown_names_and_arguments(client: TwinkleClient) -> None:
    dataset = Dataset(memory(QUERIES))
    status, detail = refused(lambda: dataset.map("NoSuchProcessor"))
    assert status == 400
    assert "NoSuchProcessor" in detail
    assert "AlpacaProcessor" in detail
    status, detail = refused(lambda: dataset.map("SelfCognitionProcessor", init_args={"colour": 1}))
    assert (status, "colour" in detail) == (400, True)
    status, detail = refused(lambda: dataset.map("GSM8KProcessor"))
    assert (status, "question" in detail) == (400, True)
    assert len(dataset) == 6


def test_82_filter(client: TwinkleClient) -> None:
    dataset = Dataset(memory(rows(12)))
    dataset.filter("LengthFilter", init_args={"column": "text", "max_length": 5})
    assert len(dataset) == 10
    status, detail = refused(lambda: dataset.filter("SelfCognitionProcessor"))
    assert (status, "LengthFilter" in detail) == (400, True)


def test_83_encode(client: TwinkleClient) -> None:
    dataset = encoded(Dataset, trajectories("hello", "how are you"))
    row = dataset[0]
    length = len(row["input_ids"])
    assert row["length"] == length
    assert row["attention_mask"] == [1] * length
    assert row["position_ids"] == list(range(length))
    assert row["labels"][-1] == -100
    learnt = [i for i, label in enumerate(row["labels"]) if label != -100]
    assert learnt
    assert all(row["labels"][i] == row["input_ids"][i + 1] for i in learnt)


def test_83_encode_with_a_generation_prompt(client: TwinkleClient) -> None:
    dataset = Dataset(memory([{"messages": [{"role": "user", "content": "hi"}]}]))
    dataset.set_template("Template", model_id=MODEL)
    dataset.encode(add_generation_prompt=True)
    assert set(dataset[0]["labels"]) == {-100}


def test_83_encode_needs_a_template_and_messages(client: TwinkleClient) -> None:
    dataset = Dataset(memory(rows(2)))
    assert refused(dataset.encode)[0] == 400
    dataset.set_template("Template", model_id=MODEL)
    status, detail = refused(dataset.encode)
    assert (status, "messages" in detail) == (400, True)
    status, detail = refused(lambda: dataset.set_template("Template", model_id="no/model"))
    assert (status, "no/model" in detail) == (400, True)


def test_83_check_leaves_out_what_cannot_be_encoded(client: TwinkleClient) -> None:
    dataset = Dataset(memory(trajectories("a", "b" * 500)))
    dataset.set_template("Template", model_id=MODEL, max_length=100)
    dataset.check()
    assert len(dataset) == 1


def test_83_split_makes_more_rows_and_delete_fewer(client: TwinkleClient) -> None:
    data = trajectories("a", "b" * 300)
    assert len(encoded(Dataset, data, max_length=100, truncation_strategy="split")) > 2
    assert len(encoded(Dataset, data, max_length=100, truncation_strategy="delete")) == 1


def test_83_preference_pairs(client: TwinkleClient) -> None:
    data = [{"prompt": "hi", "answer_zh": "good", "answer_en": "bad"}]
    dataset = Dataset(memory(data))
    dataset.map("EmojiDPOProcessor", remove_columns=["prompt", "answer_zh", "answer_en"])
    dataset.set_template("Template", model_id=MODEL)
    dataset.encode()
    row = dataset[0]
    assert set(row) == {"positive", "negative"}
    assert row["positive"]["input_ids"] != row["negative"]["input_ids"]


def test_84_add_and_mix(client: TwinkleClient) -> None:
    first, second = memory(rows(3)), memory([{"n": 10 + i, "text": "x"} for i in range(3)])
    dataset = Dataset(first)
    dataset.add_dataset(second)
    status, detail = refused(lambda: len(dataset))
    assert (status, "mix_dataset" in detail) == (400, True)
    dataset.mix_dataset(interleave=True)
    assert [row["n"] for row in dataset] == [0, 10, 1, 11, 2, 12]
    other = Dataset(first)
    other.add_dataset(second)
    other.mix_dataset(interleave=False)
    assert [row["n"] for row in other] == [0, 1, 2, 10, 11, 12]


def test_84_map_one_of_several(client: TwinkleClient) -> None:
    alpaca = memory([{"instruction": "say", "input": "", "output": "yes"}])
    cognition = memory(QUERIES[:1])
    dataset = Dataset(alpaca)
    dataset.add_dataset(cognition)
    assert refused(lambda: dataset.map("AlpacaProcessor"))[0] == 400
    dataset.map("AlpacaProcessor", alpaca, remove_columns=["instruction", "input", "output"])
    dataset.map("SelfCognitionProcessor", cognition, remove_columns=["query", "response"])
    dataset.mix_dataset()
    assert [len(row["messages"]) for row in dataset] == [2, 3]


def test_84_save_as_goes_to_an_own_area(client: TwinkleClient, service: LocalService) -> None:
    dataset = Dataset(memory(rows(5)))
    for name in ("kept.jsonl", "more/kept.csv", "kept.parquet"):
        dataset.save_as(name)
        assert [row["text"] for row in Dataset(DatasetMeta(name))] == [f"row {i}" for i in range(5)]
    for bad in ("/tmp/out.jsonl", "../out.jsonl", "a/../../b.jsonl", "~/x", ".hidden"):
        assert refused(lambda bad=bad: dataset.save_as(bad))[0] == 400
    with another_client(service, OTHER_KEY):
        assert refused(lambda: Dataset(DatasetMeta("kept.jsonl")))[0] == 404


def test_84_save_as_what_training_has_read(client: TwinkleClient) -> None:
    dataset = Dataset(memory(rows(6)))
    dataset.save_as("read.jsonl", mode="training")
    for batch in DataLoader(dataset, batch_size=2):
        if batch[0]["n"] == 2:
            break
    assert dataset[5]["n"] == 5
    assert refused(lambda: dataset.filter("NotEmptyFilter", init_args={"columns": ["n"]}))[0] == 409
    dataset.flush_save()
    assert [row["n"] for row in Dataset(DatasetMeta("read.jsonl"))] == [0, 1, 2, 3, 5]


def test_85_a_loader_ends_and_begins_again(client: TwinkleClient) -> None:
    loader = DataLoader(Dataset(memory(rows(6))), batch_size=4)
    for _ in range(2):
        batches = [[row["n"] for row in batch] for batch in loader]
        assert batches == [[0, 1, 2, 3], [4, 5]]
        assert len(batches) == len(loader)
    with pytest.raises(StopIteration):
        next(loader)


def test_85_last_batches_that_are_left_out_are_not_counted(client: TwinkleClient) -> None:
    dataset = Dataset(memory(rows(6)))
    for more in ({"drop_last": True}, {"min_batch_size": 3}):
        loader = DataLoader(dataset, batch_size=4, **more)
        assert len(list(iter(loader))) == len(loader) == 1


def test_85_shuffled_by_a_seed(client: TwinkleClient) -> None:
    dataset = Dataset(memory(rows(20)))

    def order(seed: int) -> list[list[int]]:
        loader = DataLoader(dataset, batch_size=7, shuffle=True, seed=seed)
        return [[row["n"] for batch in loader for row in batch] for _ in range(2)]

    first, second = order(1)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert order(1) == [first, second]
    assert order(2)[0] != first


def test_85_next_without_iter_and_changed_rows(client: TwinkleClient) -> None:
    dataset = Dataset(memory(rows(6)))
    loader = DataLoader(dataset, batch_size=2)
    assert refused(lambda: next(loader))[0] == 400
    iter(loader)
    next(loader)
    dataset.filter("NotEmptyFilter", init_args={"columns": ["n"]})
    assert refused(lambda: next(loader))[0] == 409


def test_86_state_skip_and_resume(client: TwinkleClient) -> None:
    dataset = Dataset(memory(rows(10)))
    loader = DataLoader(dataset, batch_size=4)
    iter(loader)
    next(loader)
    state = loader.get_state()
    assert state == {"consumed_train_samples": 4}
    resumed = DataLoader(dataset, batch_size=4)
    resumed.resume_from_checkpoint(**state, cur_step=1)
    assert [[row["n"] for row in batch] for batch in resumed] == [[4, 5, 6, 7], [8, 9]]
    assert resumed.get_state() == {"consumed_train_samples": 10}
    # A skip is for one epoch; the next one is whole.
    assert [row["n"] for batch in resumed for row in batch] == list(range(10))
    resumed.skip_consumed_samples(13)
    assert next(iter(resumed))[0]["n"] == 3


def test_86_a_shuffled_epoch_goes_on(client: TwinkleClient) -> None:
    dataset = Dataset(memory(rows(10)))
    loader = DataLoader(dataset, batch_size=5, shuffle=True)
    whole = [[row["n"] for row in batch] for _ in range(2) for batch in loader]
    resumed = DataLoader(dataset, batch_size=5, shuffle=True)
    resumed.skip_consumed_samples(15)
    assert [[row["n"] for row in batch] for batch in resumed] == whole[3:]


def test_87_lazy_rows_are_plain_json(client: TwinkleClient) -> None:
    dataset = LazyDataset(memory(QUERIES))
    dataset.map("SelfCognitionProcessor")
    dataset.set_template("Template", model_id=MODEL)
    dataset.encode()
    eager = Dataset(memory(QUERIES))
    eager.map("SelfCognitionProcessor")
    eager.set_template("Template", model_id=MODEL)
    eager.encode()
    assert len(dataset) == 6
    assert dataset[2]["input_ids"] == eager[2]["input_ids"]
    assert dataset[2]["labels"] == eager[2]["labels"]
    assert [row["length"] for row in dataset] == [row["length"] for row in eager]


def test_87_lazy_mix_and_rows_that_cannot_be_made(client: TwinkleClient) -> None:
    dataset = LazyDataset(memory(trajectories("a", "b" * 500, "c")))
    dataset.add_dataset(memory(trajectories("d", "e", "f")))
    dataset.mix_dataset()
    dataset.set_template("Template", model_id=MODEL, max_length=100)
    dataset.encode()
    assert len(dataset) == 6
    assert refused(lambda: dataset[2])[0] == 400
    batches = list(iter(DataLoader(dataset, batch_size=3)))
    assert [len(batch) for batch in batches] == [3, 3]


def test_88_packing(client: TwinkleClient) -> None:
    texts = ["a" * i for i in (1, 20, 5, 40, 9)]
    plain = encoded(Dataset, trajectories(*texts), max_length=120)
    lengths = [row["length"] for row in plain]
    dataset = encoded(PackingDataset, trajectories(*texts), max_length=120)
    assert refused(lambda: len(dataset))[0] == 400
    dataset.pack_dataset()
    assert math.ceil(sum(lengths) / 120) <= len(dataset) < 5
    found: list[int] = []
    for index in range(len(dataset)):
        row = dataset[index]
        found += row["length"]
        assert len(row["input_ids"]) == sum(row["length"]) <= 120
        assert row["position_ids"].count(0) == len(row["length"])
    assert sorted(found) == sorted(lengths)
    assert len(list(iter(DataLoader(dataset, batch_size=1)))) == len(dataset)


def test_88_packing_a_stream(client: TwinkleClient) -> None:
    data = trajectories(*["a" * i for i in (1, 20, 5, 40, 9)])
    dataset = IterablePackingDataset(memory(data), packing_interval=2)
    dataset.set_template("Template", model_id=MODEL, max_length=120)
    dataset.pack_dataset()
    packed = list(iter(dataset))
    assert sum(len(row["length"]) for row in packed) == 5
    assert all(len(row["input_ids"]) <= 120 for row in packed)


def test_89_streaming(client: TwinkleClient, data_root: Path) -> None:
    file = data_root / "stream.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(7)))
    dataset = IterableDataset(DatasetMeta(str(file)))
    for _ in range(2):
        assert [row["n"] for row in iter(dataset)] == list(range(7))
    assert len(dataset) == 7
    assert refused(lambda: dataset[0])[0] == 400
    batches = [[row["n"] for row in batch] for batch in DataLoader(dataset, batch_size=3)]
    assert batches == [[0, 1, 2], [3, 4, 5], [6]]


def test_90_number_of_processors(client: TwinkleClient, service: LocalService) -> None:
    """Of a tenant who has none yet: other tests' sessions may not have ended."""
    with another_client(service, PLAIN_KEY) as one:
        answers = [create("preprocessor", "AlpacaProcessor") for _ in range(21)]
        assert [answer.status_code for answer in answers] == [200] * 20 + [429]
        assert "20 processors" in answers[-1].json()["detail"]
        assert int(answers[-1].headers["retry-after"]) >= 1
        kept = answers[0].json()["processor_id"]
        assert raw(kept, "preprocess", row={}).status_code == 200
        end_session(service, one._session_id, PLAIN_KEY)
        assert raw(kept, "preprocess", row={}).status_code == 409
    with another_client(service, PLAIN_KEY):
        assert create("preprocessor", "AlpacaProcessor").status_code == 200


def test_91_private_and_unknown_names(client: TwinkleClient) -> None:
    dataset = Dataset(memory(rows(1)))
    for name in ("__init__", "_write_through", "__class__", "__reduce__", "processor", "nothing"):
        answer = raw(dataset, name)
        assert answer.status_code == 400
        assert "mix_dataset" in answer.json()["detail"]
    for kind, cls in (
        ("nothing", "Dataset"),
        ("dataset", "os"),
        ("dataset", "DatasetMeta"),
        ("preprocessor", "Preprocessor"),
        ("reward", "OlympiadBenchAccuracyReward"),
        ("weight_loader", "Any"),
    ):
        answer = create(kind, cls)
        assert answer.status_code == 400, (kind, cls)
        assert "Traceback" not in answer.text
    assert raw("pid:" + "0" * 32, "__len__").status_code == 404
    assert raw("nonsense", "__len__").status_code == 404
    answer = create("dataset", "Dataset", dataset_meta=None, colour="red")
    assert (answer.status_code, "colour" in answer.json()["detail"]) == (400, True)


def test_92_plugins(client: TwinkleClient) -> None:
    dataset = Dataset(memory(QUERIES))
    for call in (
        lambda: dataset.map("ms://someone/plugin"),
        lambda: dataset.filter("hf://someone/plugin"),
        lambda: dataset.set_template("ms://someone/plugin", model_id=MODEL),
        lambda: DataLoader(dataset, batch_size=1).set_processor("hf://someone/plugin"),
    ):
        status, detail = refused(call)
        assert status == 400
        assert "plugin" in detail
    assert refused(lambda: Dataset(DatasetMeta("someone/dataset")))[0] == 404


def test_93_a_processor_of_another_tenant(client: TwinkleClient, service: LocalService) -> None:
    dataset = Dataset(memory(rows(2)))
    with another_client(service, OTHER_KEY):
        assert refused(lambda: dataset[0])[0] == 404
        assert refused(lambda: DataLoader(dataset, batch_size=1))[0] == 404


@pytest.mark.parametrize("text", ["123", "true", "null", '"x"', "[1, 2]", '{"a": 1}', "pid:1"])
def test_94_strings_stay_strings(client: TwinkleClient, text: str) -> None:
    dataset = Dataset(memory([{"query": "{{NAME}}", "response": text}]))
    dataset.map("SelfCognitionProcessor", init_args={"model_name": text})
    assert [one["content"] for one in dataset[0]["messages"][1:]] == [text, text]
    made = create("preprocessor", "SelfCognitionProcessor", model_name=text).json()["processor_id"]
    row = {"query": "{{NAME}}", "response": ""}
    assert raw(made, "preprocess", row=row).json()["result"]["messages"][1]["content"] == text


def test_77_input_processor(client: TwinkleClient) -> None:
    short, long = {"input_ids": [1, 2], "labels": [2, -100]}, {"input_ids": [3, 4, 5]}
    assert InputProcessor()([short, long]) == {
        "input_ids": [[1, 2, 0], [3, 4, 5]],
        "labels": [[2, -100, -100], [-100, -100, -100]],
    }
    assert InputProcessor(padding_free=True)([short, long])["input_ids"] == [[1, 2, 3, 4, 5]]
    loader = DataLoader(encoded(Dataset, trajectories("a", "bcd")), batch_size=2)
    loader.set_processor("InputProcessor")
    batch = next(iter(loader))
    assert {len(row) for key in batch for row in batch[key]} == {len(batch["input_ids"][0])}


def test_78_rewards_and_templates(client: TwinkleClient) -> None:
    reward = create("reward", "GSM8KAccuracyReward").json()["processor_id"]
    answers = [
        {
            "messages": [{"role": "assistant", "content": f"so \\boxed{{{said}}}"}],
            "user_data": [["ground_truth", "1200"]],
        }
        for said in ("1,200", "12")
    ]
    assert raw(reward, "__call__", trajectories=answers).json()["result"] == [1.0, 0.0]
    template = create("template", "Template", model_id=MODEL).json()["processor_id"]
    feature = raw(template, "encode", trajectory=trajectories("hi")[0]).json()["result"]
    text = raw(template, "decode", token_ids=feature["input_ids"]).json()["result"]
    assert "hi!" in text


def test_71_cast_column(client: TwinkleClient) -> None:
    dataset = Dataset(memory([{"image": None, "n": 1}]))
    assert refused(lambda: dataset.cast_column("image"))[0] == 400
    dataset.cast_column("image", decode=False)
    assert dataset[0] == {"image": None, "n": 1}
    assert refused(lambda: dataset.cast_column("absent", decode=False))[0] == 400
