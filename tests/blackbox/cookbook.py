"""The cookbook at work: its recipes as a person starts them, and data that they find offline.

A recipe names its data set and its model as the hub does (``openai/gsm8k``). Both libraries take a
folder of that name in the working directory first, so that nothing is downloaded and nothing of
the cookbook is touched.
"""

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.blackbox.other_clients import run_client

# A model whose renderer the cookbook knows; here it is a tiny one with the same special tokens.
MODEL = "Qwen/Qwen3-4B-Instruct-2507"
ANSWERS = ("\\boxed{3}", "\\boxed{7}")

Metrics = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """What a recipe left in its log folder."""

    log: Path

    @property
    def metrics(self) -> Metrics:
        return [json.loads(line) for line in (self.log / "metrics.jsonl").read_text().splitlines()]

    def series(self, name: str) -> list[float]:
        """One metric over the steps that have it."""
        return [row[name] for row in self.metrics if name in row]

    @property
    def checkpoints(self) -> list[dict[str, Any]]:
        lines = (self.log / "checkpoints.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def state(self) -> str:
        return self.checkpoints[-1]["state_path"]

    @property
    def sampler(self) -> str:
        return self.checkpoints[-1]["sampler_path"]


@dataclass(frozen=True)
class Cookbook:
    """The cookbook in a folder, pointed at a service by nothing but the environment."""

    url: str
    api_key: str
    folder: Path

    def log(self, name: str) -> Path:
        return self.folder / "runs" / name

    def run(self, *arguments: str, timeout_s: float = 100.0) -> str:
        return run_client(
            "cookbook",
            arguments,
            url=self.url,
            api_key=self.api_key,
            folder=self.folder,
            timeout_s=timeout_s,
        )

    def recipe(self, name: str, log: str, **settings: object) -> Run:
        """Run ``python -m tinker_cookbook.recipes.<name>`` to its end."""
        given = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
        folder = self.log(log)
        module = f"tinker_cookbook.recipes.{name}"
        self.run("-m", module, f"log_path={folder}", f"model_name={MODEL}", *given)
        return Run(folder)


def lay_out(folder: Path, model: Path) -> None:
    """Put the model's tokenizer and the data sets where the recipes look for them."""
    (folder / MODEL).parent.mkdir(parents=True)
    (folder / MODEL).symlink_to(model)
    draw = random.Random(0)

    def question() -> str:
        return f"Say {draw.randint(0, 9)} and {draw.randint(0, 9)}."

    def chat(answer: str) -> dict[str, Any]:
        roles = (("user", question()), ("assistant", answer))
        return {"messages": [{"role": role, "content": text} for role, text in roles]}

    def pair() -> dict[str, str]:
        start = f"\n\nHuman: {question()}\n\nAssistant: "
        return {"chosen": start + ANSWERS[1], "rejected": start + ANSWERS[0]}

    problems = [{"question": question(), "answer": "So:\n#### 7"} for _ in range(128)]
    write(
        folder / "HuggingFaceH4/no_robots/train.jsonl",
        ({"prompt": ""} | chat(draw.choice(ANSWERS)) for _ in range(16 * 60)),
    )
    write(folder / "always_seven.jsonl", (chat(ANSWERS[1]) for _ in range(16 * 12)))
    for split in ("train", "test"):
        write(folder / f"openai/gsm8k/{split}.jsonl", problems)
        write(folder / f"Anthropic/hh-rlhf/{split}.jsonl", (pair() for _ in range(96)))
    (folder / "openai/gsm8k/README.md").write_text(_NAMED_MAIN)
    write(folder / "zwhe99/DeepMath-103K/train.jsonl", problems)


def write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


_NAMED_MAIN = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: train.jsonl
  - split: test
    path: test.jsonl
---
"""
