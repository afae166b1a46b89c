"""Reinforcement learning on small sums with GRPO, with our own client.

Each step samples a group of answers to several sums, rewards those that are right, and pushes the
model towards them: the advantage of an answer is its reward minus its group's mean.
"""

import argparse
import random
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from twinkle_dask_client import Conversation, Lora, Message, Run, SamplingParams, Service

MODEL = "SmolLM2-135M-Instruct"
SYSTEM = "Answer with the number alone."

console = Console()


def main() -> None:
    """Train, show the rewards, draw their curve."""
    parser = argparse.ArgumentParser(description="GRPO on small sums with twinkle_dask_client.")
    parser.add_argument("--url", help="of the service; else TWINKLE_DASK_URL")
    parser.add_argument("--key", help="an API key; else TWINKLE_DASK_API_KEY")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="two steps of few samples")
    given = parser.parse_args()
    steps, sums, group = (2, 2, 4) if given.quick else (given.steps, 8, 8)
    rng = random.Random(0)

    rewards: list[float] = []
    with Service(given.url, api_key=given.key) as service:
        run = service.create_run(given.model, lora=Lora(rank=16))
        run.set_loss("GRPOLoss", epsilon=0.2)
        run.set_optimizer("AdamW", lr=3e-4)
        for number in range(steps):
            tasks = [task(rng) for _ in range(sums)]
            rewards.append(step(service, run, given.model, tasks, group, seed=number))
            console.print(f"step {number + 1:3d}  mean reward {rewards[-1]:.3f}")
    report(rewards, given.out)


def task(rng: random.Random) -> tuple[str, int]:
    """A sum of two small numbers, and its result."""
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return f"{a} + {b} = ?", a + b


def reward(answer: str, result: int) -> float:
    """1 for the number alone, less the more is said around it, 0 for another number."""
    numbers = re.findall(r"-?\d+", answer)
    if not numbers or int(numbers[-1]) != result:
        return 0.0
    return 1.0 if answer.strip() == str(result) else 0.5


def step(
    service: Service, run: Run, model: str, tasks: list[tuple[str, int]], group: int, seed: int
) -> float:
    """Sample with the newest weights, reward, learn; gives the mean reward."""
    sampler = service.sampler(model, checkpoint=run.save_for_sampler().address)
    sampler.set_template()
    prompts = [
        Conversation(
            messages=[
                Message(role="system", content=SYSTEM),
                Message(role="user", content=question),
            ]
        )
        for question, _ in tasks
    ]
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=seed, logprobs=1)
    batch: list[dict[str, Any]] = []
    advantages: list[float] = []
    old_logps: list[list[float]] = []
    total = 0.0
    drawn = sampler.sample(prompts, params, num_samples=group)
    for (_, result), sample in zip(tasks, drawn, strict=True):
        values = [reward(each.text, result) for each in sample.sequences]
        mean = sum(values) / len(values)
        total += mean
        for each, value in zip(sample.sequences, values, strict=True):
            batch.append(each.feature)
            advantages.append(value - mean)
            old_logps.append([place[0][1] for place in each.logprobs or () if place])
    # Where all answers of all groups are equally good there is nothing to learn.
    if any(advantages):
        run.forward_backward(batch, advantages=advantages, old_logps=old_logps)
        run.step(max_grad_norm=1.0)
    return total / len(tasks)


def report(rewards: list[float], out: Path) -> None:
    """A table of means over a quarter of the steps each, and the curve as a picture."""
    out.mkdir(parents=True, exist_ok=True)
    quarter = max(1, len(rewards) // 4)
    table = Table("steps", "mean reward")
    for start in range(0, len(rewards), quarter):
        part = rewards[start : start + quarter]
        table.add_row(f"{start + 1} to {start + len(part)}", f"{sum(part) / len(part):.3f}")
    console.print(table)
    figure: Any = Figure(figsize=(6, 3.5), layout="constrained")  # Any: half of it has no types
    axes = figure.subplots()
    axes.plot(range(1, len(rewards) + 1), rewards)
    axes.set(xlabel="step", ylabel="mean reward", title="GRPO on small sums")
    axes.grid(alpha=0.3)
    figure.savefig(out / "short_math_grpo.png", dpi=150)
    console.print(f"Curve {out / 'short_math_grpo.png'}")


if __name__ == "__main__":
    main()
