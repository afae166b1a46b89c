"""Item 92: recipes of tinker-cookbook 0.6.1, unmodified, train a tiny model here.

Only the address, the key and the model's name are ours; data sets lie in the working directory
(``cookbook.py``). The first recipe teaches the model to answer 3 or 7 by the toss of a coin, and
the others go on from there: what is rewarded, preferred or taught is 7.
"""

from collections.abc import Generator, Sequence
from pathlib import Path
from statistics import fmean

import pytest

from tests.blackbox.conftest import KEY
from tests.blackbox.cookbook import MODEL, Cookbook, Run, lay_out, write
from tests.blackbox.other_clients import CLIENTS
from tests.models import tiny_qwen3
from twinkle_dask import local_service

pytestmark = pytest.mark.timeout(180)  # each starts a program that imports torch and trains

RL = {
    "env": "gsm8k",
    "groups_per_batch": 8,
    "group_size": 8,
    "max_tokens": 20,
    "learning_rate": 0.001,
    "eval_every": 0,
    "save_every": 0,
    "max_steps": 14,
}
REWARD = "env/all/reward/total"


@pytest.fixture(scope="module")
def cookbook(tmp_path_factory: pytest.TempPathFactory) -> Generator[Cookbook]:
    """A service of its own: the cookbook knows its models by name, and a smaller one is quicker."""
    folder = tmp_path_factory.mktemp("cookbook")
    model = tiny_qwen3(
        folder / "model", vocab_size=512, hidden=64, layers=2, tie_word_embeddings=False
    )
    lay_out(folder / "work", model)
    with local_service(
        {MODEL: str(model)}, api_keys=[KEY], dtype="float32", data_dir=folder / "data"
    ) as service:
        yield Cookbook(url=service.url, api_key=KEY, folder=folder / "work")


@pytest.fixture(scope="module")
def taught(cookbook: Cookbook) -> Run:
    """``sl_loop``, whose checkpoint the others start from."""
    return cookbook.recipe(
        *("sl_loop", "taught"),
        batch_size=16,
        learning_rate=0.008,
        lora_rank=16,
        max_length=256,
        save_every=40,
    )


@pytest.fixture(scope="module")
def knows_seven(cookbook: Cookbook, taught: Run) -> Run:
    """The supervised trainer on data that always says 7."""
    return always_seven(cookbook, "knows_seven", load_checkpoint_path=taught.state)


def always_seven(cookbook: Cookbook, log: str, **settings: object) -> Run:
    return cookbook.recipe(
        *("chat_sl.train", log),
        dataset=cookbook.folder / "always_seven.jsonl",
        batch_size=16,
        learning_rate=0.003,
        max_length=256,
        lr_schedule="constant",
        save_every=4,
        eval_every=0,
        behavior_if_log_dir_exists="resume",
        **settings,
    )


def rises(values: Sequence[float], by: float) -> bool:
    """Whether the last third lies above the first third.

    Samples are drawn freshly in each run. A step's mean over 64 of them is off by 0.06 (the
    standard error of a coin), so the difference of two thirds of 14 steps is off by 0.04.
    """
    third = max(1, len(values) // 3)
    return fmean(values[-third:]) > fmean(values[:third]) + by


# ---- supervised


def test_92_sl_loop_lowers_the_loss(taught: Run) -> None:
    losses = taught.series("train_mean_nll")
    assert len(losses) == 60
    assert losses[0] > 5  # near ln 512: it knows nothing
    assert losses[-1] < 0.3  # a coin for one token of ten
    assert [each["name"] for each in taught.checkpoints] == ["000040", "final"]


def test_92_supervised_training_goes_on_from_a_checkpoint(taught: Run, knows_seven: Run) -> None:
    losses = knows_seven.series("train_mean_nll")
    assert losses[0] < taught.series("train_mean_nll")[0] / 2
    assert losses[-1] < losses[0] / 2


def test_92_a_run_resumes_where_it_stopped(cookbook: Cookbook, taught: Run) -> None:
    first = always_seven(cookbook, "resumed", load_checkpoint_path=taught.state).metrics
    both = always_seven(cookbook, "resumed", num_epochs=2)
    assert [row["step"] for row in both.metrics] == [*range(2 * len(first))]
    losses = both.series("train_mean_nll")
    assert losses[len(first)] < losses[0] / 2
    # The optimizer came along: its count of steps goes on.
    assert both.series("step:max") == [*range(1, 2 * len(first) + 1)]


# ---- reinforcement


def test_92_rl_loop_raises_the_reward(cookbook: Cookbook, taught: Run) -> None:
    write(cookbook.log("rl_loop") / "checkpoints.jsonl", [taught.checkpoints[-1] | {"batch": 0}])
    run = cookbook.recipe(
        *("rl_loop", "rl_loop"),
        batch_size=8,
        group_size=8,
        max_tokens=20,
        learning_rate=0.001,
        save_every=0,
        max_steps=14,
    )
    assert rises(run.series("reward/total"), by=0.1)


def test_92_rl_in_step(cookbook: Cookbook, taught: Run) -> None:
    run = cookbook.recipe("math_rl.train", "rl_sync", load_checkpoint_path=taught.state, **RL)
    assert rises(run.series(REWARD), by=0.15)


def test_92_rl_one_step_off_policy(cookbook: Cookbook, taught: Run) -> None:
    run = cookbook.recipe(
        *("math_rl.train", "rl_async"),
        load_checkpoint_path=taught.state,
        max_steps_off_policy=1,
        **RL,
    )
    assert max(run.series("async/staleness_max")) >= 1
    assert rises(run.series(REWARD), by=0.1)


def test_92_rl_by_streamed_minibatches(cookbook: Cookbook, taught: Run) -> None:
    run = cookbook.recipe(
        *("math_rl.train", "rl_streamed"),
        load_checkpoint_path=taught.state,
        stream_minibatch_config__num_minibatches=2,
        stream_minibatch_config__groups_per_batch=8,
        **RL,
    )
    assert rises(run.series(REWARD), by=0.1)


# ---- preference, distillation


def test_92_dpo_prefers_the_chosen(cookbook: Cookbook, taught: Run) -> None:
    run = cookbook.recipe(
        *("preference.dpo.train", "dpo"),
        load_checkpoint_path=taught.state,
        batch_size=8,
        learning_rate=0.003,
        max_length=256,
    )
    losses = run.series("dpo_loss")
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # pyright: ignore[reportUnknownMemberType]
    assert losses[-1] < 0.5
    assert run.series("accuracy")[-1] > 0.9
    assert run.series("margin")[-1] > 0.5


def test_92_distillation_on_policy(cookbook: Cookbook, taught: Run, knows_seven: Run) -> None:
    run = cookbook.recipe(
        *("distillation.on_policy_distillation", "on_policy"),
        load_checkpoint_path=taught.state,
        teacher_model=MODEL,
        teacher_checkpoint=knows_seven.sampler,
        groups_per_batch=8,
        group_size=8,
        max_tokens=20,
        learning_rate=0.001,
        eval_every=0,
        save_every=0,
        max_steps=14,
    )
    divergence = run.series("teacher_kl")
    assert fmean(divergence[-3:]) < divergence[0] / 2


def test_92_distillation_off_policy(cookbook: Cookbook, taught: Run, knows_seven: Run) -> None:
    run = Run(cookbook.log("off_policy"))
    cookbook.run(
        str(CLIENTS / "off_policy_distillation.py"),
        *(MODEL, str(cookbook.folder / "always_seven.jsonl")),
        *(taught.state, knows_seven.sampler, str(run.log)),
    )
    losses = run.series("train/loss:sum")
    assert fmean(losses[-3:]) < 0.7 * losses[0]


# ---- weights


def test_92_weights_are_exported(cookbook: Cookbook, knows_seven: Run, tmp_path: Path) -> None:
    adapter, merged, peft = (tmp_path / name for name in ("adapter", "merged", "peft"))
    model = str(cookbook.folder / MODEL)
    cookbook.run(
        "-c",
        "import sys; from tinker_cookbook import weights; path, out = sys.argv[1:]\n"
        "weights.download(tinker_path=path, output_dir=out)",
        *(knows_seven.state, str(adapter)),
    )
    assert {file.name for file in adapter.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    cookbook.run(
        *("-m", "tinker_cookbook.scripts.merge_tinker_adapter_to_hf_model"),
        *("--hf-model", model, "--tinker-adapter-path", str(adapter)),
        *("--output-path", str(merged)),
    )
    assert (merged / "config.json").exists()
    cookbook.run(
        "-c",
        "import sys; from tinker_cookbook import weights; base, adapter, out = sys.argv[1:]\n"
        "weights.build_lora_adapter(base_model=base, adapter_path=adapter, output_path=out)",
        *(model, str(adapter), str(peft)),
    )
    assert (peft / "adapter_config.json").exists()
