"""The processor room from its entry: states and JSON in, states and JSON out, no cluster."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinkle_dask.errors import InvalidRequest, NotFound, NotSupported, QuotaExceeded
from twinkle_dask.processor import calls
from twinkle_dask.processor.bins import joined, packed_bins
from twinkle_dask.processor.collating import collated
from twinkle_dask.processor.loaders import advanced, next_numbers, num_batches, skipped
from twinkle_dask.processor.naming import looked_up
from twinkle_dask.processor.plain import plain
from twinkle_dask.processor.preprocessors import PREPROCESSORS, preprocessor
from twinkle_dask.processor.rewards import REWARDS, boxed, scores
from twinkle_dask.processor.sources import Doors, local_files
from twinkle_dask.processor.states import LoaderState

Json = dict[str, Any]


class Room:
    """What the gateway keeps: states by id, and saved names."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.blobs = folder / "blobs"
        self.states: dict[str, str] = {}
        self.saved: dict[str, str] = {}
        self.more: Json = {"data_roots": [], "allow_hub": False, "allowance": 10**9, "models": {}}
        self.more |= {"max_answer_bytes": 10**6, **more}

    def create(self, kind: str, cls: str, **arguments: Any) -> str:
        pid = secrets.token_hex(16)
        self._run(pid, kind, cls, cls, arguments)
        return pid

    def call(self, pid: str, function: str, **arguments: Any) -> Any:
        answer = self._run(pid, "", "", function, arguments)
        return StopIteration if answer["over"] else orjson.loads(answer["result"])

    def _run(self, pid: str, kind: str, cls: str, function: str, arguments: Json) -> Json:
        named = {value for value in arguments.values() if str(value) in self.states}
        state = self.states.get(pid, "")
        if '"dataset":"' in state:
            named.add(json.loads(state)["dataset"])
        answer = calls.run(
            {
                "processor": pid,
                "processor_type": kind,
                "class_type": cls,
                "function": function,
                "arguments": orjson.dumps(arguments),
                "texts": {},
                "state": state,
                "others": {one: self.states[one] for one in named},
                "blobs_url": str(self.blobs),
                "folder": f"processors/{pid}",
                "saved_folder": "saved-data/t",
                "call_id": secrets.token_hex(4),
                "saved": self.saved,
                **self.more,
            }
        )
        self.states |= answer["states"]
        if answer["saved"]:
            self.saved[answer["saved"]["name"]] = answer["saved"]["path"]
        return answer

    def files(self) -> list[Path]:
        return [path for path in self.blobs.rglob("*") if path.is_file()]


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def meta(data: Any = None, **more: Any) -> str:
    return json.dumps({"_TWINKLE_TYPE_": "DatasetMeta", "data": data, **more})


def numbers(count: int) -> list[Json]:
    return [{"n": i} for i in range(count)]


def test_an_answer_has_a_limit(tmp_path: Path) -> None:
    room = Room(tmp_path, max_answer_bytes=100)
    pid = room.create("dataset", "Dataset", dataset_meta=meta(numbers(50)))
    loader = room.create("dataloader", "DataLoader", dataset=pid, batch_size=40)
    room.call(loader, "__iter__")
    with pytest.raises(InvalidRequest, match="fewer rows"):
        room.call(loader, "__next__")


def test_each_call_stands_on_states_alone(room: Room) -> None:
    pid = room.create("dataset", "Dataset", dataset_meta=meta(numbers(3)))
    before = room.states[pid]
    room.call(pid, "filter", filter_func="EqualsFilter", init_args={"column": "n", "values": [2]})
    assert room.call(pid, "__len__") == 1
    room.states[pid] = before  # as if the answer had been lost
    assert room.call(pid, "__len__") == 3


def test_rows_of_different_shapes(room: Room) -> None:
    rows = [
        {"tools": [{"parameters": {"city": "x"}}], "v": 1},
        {"tools": [{"parameters": {"when": 3}}], "v": "text"},
    ]
    pid = room.create("dataset", "Dataset", dataset_meta=meta(rows))
    assert [room.call(pid, "__getitem__", idx=i) for i in range(2)] == rows
    assert room.call(pid, "__getitem__", idx=2) is StopIteration


def test_what_is_beyond_the_quota_leaves_nothing(tmp_path: Path) -> None:
    room = Room(tmp_path, allowance=2000)
    with pytest.raises(QuotaExceeded, match="2000 bytes"):
        room.create("dataset", "Dataset", dataset_meta=meta(numbers(5000)))
    assert room.files() == []


def test_a_slice_may_not_name_rows_without_end(room: Room) -> None:
    part = {"_slice_type_": "range", "start": 0, "stop": 10**15, "step": 1}
    with pytest.raises(InvalidRequest, match="the most"):
        room.create("dataset", "Dataset", dataset_meta=meta(numbers(2), data_slice=part))


@pytest.mark.parametrize("data", [5, "text", [1, 2], {"a": 1}, {"a": [1], "b": [1, 2]}])
def test_data_that_are_no_rows(room: Room, data: Any) -> None:
    with pytest.raises(InvalidRequest, match="data"):
        room.create("dataset", "Dataset", dataset_meta=meta(data))


def test_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n{"a": \n')
    room = Room(tmp_path / "room", data_roots=[str(tmp_path)])
    with pytest.raises(InvalidRequest, match="cannot be read"):
        room.create("dataset", "Dataset", dataset_meta=meta(dataset_id="broken.jsonl"))


def test_a_folder_of_files(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "set").mkdir(parents=True)
    for i in range(2):
        (root / "set" / f"{i}.csv").write_text(f"a,b\n{i},\n")
    room = Room(tmp_path / "room", data_roots=[str(root)])
    pid = room.create("dataset", "Dataset", dataset_meta=meta(dataset_id="set"))
    assert room.call(pid, "__getitem__", idx=1) == {"a": 1, "b": ""}


def test_files_are_found_below_the_roots_alone(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "root-else"
    root.mkdir()
    outside.mkdir()
    (outside / "x.jsonl").write_text("{}")
    os.symlink(outside, root / "way-out")
    (root / "in.jsonl").write_text("{}")
    doors = Doors(data_roots=(str(root),), saved={})
    assert local_files("in.jsonl", doors) == [str(root / "in.jsonl")]
    for name in ("../root-else/x.jsonl", str(outside / "x.jsonl"), "way-out/x.jsonl", "/"):
        with pytest.raises((NotFound, InvalidRequest)):
            local_files(name, doors)


def test_a_stream_goes_on_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbers(5)))
    room = Room(tmp_path / "room", data_roots=[str(tmp_path)])
    pid = room.create("dataset", "IterableDataset", dataset_meta=meta(dataset_id="s.jsonl"))
    room.call(pid, "__iter__")
    assert [room.call(pid, "__next__")["n"] for _ in range(3)] == [0, 1, 2]
    monkeypatch.setattr(calls, "_STREAMS", calls.Streams())
    monkeypatch.setattr(calls, "_TABLES", calls.OpenTables())
    assert [room.call(pid, "__next__")["n"] for _ in range(2)] == [3, 4]
    assert room.call(pid, "__next__") is StopIteration
    assert room.call(pid, "__next__") is StopIteration


def test_a_loader_replaces_rows_that_cannot_be_made(room: Room) -> None:
    rows = [{"question": "q", "image_1": "a picture"} for _ in range(3)]
    pid = room.create("dataset", "LazyDataset", dataset_meta=meta(rows))
    loader = room.create("dataloader", "DataLoader", dataset=pid, batch_size=3)
    room.call(pid, "map", preprocess_func="OlympiadBenchProcessor")
    room.call(loader, "__iter__")
    with pytest.raises(InvalidRequest, match="others in its place"):
        room.call(loader, "__next__")


@given(st.lists(st.integers(1, 50), max_size=40))
def test_packing_loses_and_overfills_nothing(lengths: list[int]) -> None:
    bins = packed_bins(lengths, 40)
    assert sorted(row for one in bins for row in one) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in one) <= 40 or len(one) == 1 for one in bins)
    totals = [sum(lengths[row] for row in one) for one in bins]
    assert sum(total * 2 <= 40 for total in totals) <= 1


def test_packed_rows_are_put_end_to_end() -> None:
    rows: list[Json] = [
        {"input_ids": [1], "length": 1, "m": [{}]},
        {"input_ids": [], "length": 0, "m": []},
    ]
    made = joined(rows)
    assert made == {"input_ids": [1], "length": [1, 0], "m": [[{}], []]}


@given(
    num_rows=st.integers(0, 30),
    batch_size=st.integers(1, 8),
    smallest=st.integers(0, 8),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    skip=st.integers(0, 60),
)
@settings(deadline=None)
def test_a_loader_gives_what_it_says(
    num_rows: int, batch_size: int, smallest: int, drop_last: bool, shuffle: bool, skip: int
) -> None:
    start = LoaderState(
        dataset="d",
        batch_size=batch_size,
        min_batch_size=min(smallest, batch_size),
        drop_last=drop_last,
        shuffle=shuffle,
        epoch=0,
        iterating=True,
    )

    def read(loader: LoaderState) -> list[list[int]]:
        batches: list[list[int]] = []
        while batch := next_numbers(loader, num_rows):
            batches.append(batch)
            loader = advanced(loader, len(batch))
        return batches

    whole = read(start)
    assert len(whole) == num_batches(start, num_rows)
    rows = [number for batch in whole for number in batch]
    assert len(set(rows)) == len(rows)
    skip -= skip % batch_size
    resumed = skipped(start, skip, num_rows)
    if resumed.epoch == 0:
        assert [n for batch in read(resumed) for n in batch] == rows[skip:]
    assert resumed.position < max(1, len(rows))


@pytest.mark.parametrize("name", sorted(PREPROCESSORS))
def test_preprocessors_of_empty_rows_refuse_or_answer(name: str) -> None:
    try:
        made = preprocessor(name, {})({})
    except (InvalidRequest, NotSupported):
        return
    assert "messages" in made or {"positive", "negative"} <= made.keys()


def test_preprocessors() -> None:
    made = preprocessor("GSM8KProcessor", {"add_assistant": True})(
        {"question": "q", "answer": "so #### 1,234"}
    )
    assert made["user_data"] == [["ground_truth", "1234"]]
    assert [one["role"] for one in made["messages"]] == ["system", "user", "assistant"]
    made = preprocessor("AlpacaProcessor", {})({"instruction": "a", "input": "b", "output": "c"})
    assert [one["content"] for one in made["messages"]] == ["a\nb", "c"]
    made = preprocessor("CountdownProcessor", {})({"nums": [1, 2], "response": 3})
    assert dict(made["user_data"]) == {"target": "3", "nums": "[1, 2]"}
    made = preprocessor("OlympiadBenchProcessor", {"language": "en"})(
        {"question": "q", "final_answer": ["1", "2"]}
    )
    assert made["user_data"] == [["ground_truth", "1, 2"]]
    with pytest.raises(NotSupported):
        preprocessor("OlympiadBenchProcessor", {})({"question": "q", "image_1": {}})


@pytest.mark.parametrize(
    ("name", "text", "score"),
    [
        ("FormatReward", "<think>a</think><answer>b</answer>", 1.0),
        ("FormatReward", "</think><think><answer>b</answer>", 0.0),
        ("GSM8KFormatReward", "#### 5", 1.0),
        ("GSM8KFormatReward", "5", 0.0),
        ("GSM8KAccuracyReward", "\\boxed{5.0}", 1.0),
        ("GSM8KAccuracyReward", "#### 6", 0.0),
        ("MathReward", "\\boxed{ \\frac{1}{2} }", 1.0),
    ],
)
def test_rewards(name: str, text: str, score: float) -> None:
    pairs = [["ground_truth", "5"], ["solution", "it is \\boxed{\\frac{1}{2}}"]]
    one = {"messages": [{"role": "assistant", "content": text}], "user_data": pairs}
    assert scores(name, {}, [one], None) == [score]
    assert name in REWARDS


@pytest.mark.parametrize("name", ["messages", "user_data"])
@pytest.mark.parametrize("value", [5, "text", {"role": "user"}])
def test_rewards_of_a_malformed_trajectory_are_refused(name: str, value: Any) -> None:
    one = {"messages": [{"role": "assistant", "content": "#### 5"}], name: value}
    with pytest.raises(InvalidRequest, match=name):
        scores("GSM8KAccuracyReward", {}, [one], None)


def test_boxed_counts_braces() -> None:
    assert boxed("\\boxed{1} \\boxed{a{b}c} d") == "a{b}c"
    assert boxed("\\boxed{a") == boxed("a") == ""


def test_plain_values() -> None:
    made = plain({"a": float("nan"), "b": np.float32(1), "c": np.arange(2), "d": b"x", "e": (1,)})
    assert made == {"a": None, "b": 1.0, "c": [0, 1], "d": "eA==", "e": [1]}


def test_batches_of_features() -> None:
    made = collated([{"input_ids": [1], "x": "y"}, {"input_ids": [2, 3]}], padding_side="left")
    assert made == {"input_ids": [[0, 1], [2, 3]]}
    packed = {"input_ids": [1, 2], "position_ids": [0, 0], "attention_mask": [1, 1]}
    assert collated(packed) == {"input_ids": [[1, 2]], "position_ids": [[0, 0]]}
    with pytest.raises(InvalidRequest, match="labels"):
        collated([{"input_ids": [1], "labels": [1, 2]}])


def test_plugins_are_refused_by_name() -> None:
    with pytest.raises(NotSupported, match="code on a hub"):
        looked_up({"a": 1}, "thing", "hf://x/y")


def test_map_keeps_columns_unless_told(room: Room) -> None:
    rows = [{"instruction": "a", "input": "b", "output": "c"}]
    pid = room.create("dataset", "Dataset", dataset_meta=meta(rows))
    room.call(pid, "map", preprocess_func="AlpacaProcessor", remove_columns="input")
    row = room.call(pid, "__getitem__", idx=0)
    assert set(row) == {"instruction", "output", "messages"}
    with pytest.raises(InvalidRequest, match="remove_columns"):
        room.call(pid, "map", preprocess_func="AlpacaProcessor", remove_columns=["input"])
