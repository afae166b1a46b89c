"""Reinforcement learning on small sums with GRPO, with the Twinkle client.

Each step samples a group of answers to several sums, rewards those that are right, and trains on
what was sampled (``new_input_feature``) with the sampler's logprobs as the old policy's. Tasks come
from a generator with a seed and a verifier, in the manner of reasoning-gym.
"""

import argparse
import random
import re
import statistics
from typing import Any

from peft import LoraConfig
from rich.console import Console
from twinkle_client import init_twinkle_client
from twinkle_client.model import MultiLoraTransformersModel
from twinkle_client.sampler import vLLMSampler

SYSTEM = "Answer with the number alone."

console = Console()


def main() -> None:
    """Train, and show the mean reward of each step as a bar."""
    given = parse_arguments()
    steps, sums, group = (2, 2, 4) if given.quick else (given.steps, 8, 8)
    rng = random.Random(0)
    client = init_twinkle_client(base_url=given.url, api_key=given.key)
    model = MultiLoraTransformersModel(given.model)
    adapter = LoraConfig(target_modules="all-linear", r=16, lora_alpha=32)
    model.add_adapter_to_model("sums", adapter)
    model.set_loss("GRPOLoss", epsilon=0.2)
    model.set_optimizer("AdamW", lr=3e-4, weight_decay=0.0)
    sampler = vLLMSampler(given.model)
    sampler.set_template("Template", model_id=given.model)
    rewards: list[float] = []
    for number in range(1, steps + 1):
        tasks = [task(rng) for _ in range(sums)]
        saved = model.save("sums", is_sampler=True).twinkle_path
        params = {"max_tokens": 12, "temperature": 1.0, "logprobs": 1, "num_samples": group}
        drawn = sampler.sample(
            [to_trajectory(question) for question, _ in tasks],
            params | {"seed": number},
            adapter_uri=saved,
        )
        inputs: list[Any] = []
        advantages: list[float] = []
        old_logps: list[list[float]] = []
        for (_, result), answers in zip(tasks, drawn, strict=True):
            scores = [reward(str(each.decoded), result) for each in answers.sequences]
            rewards_mean = statistics.fmean(scores)
            spread = statistics.pstdev(scores) + 1e-4
            for each, score in zip(answers.sequences, scores, strict=True):
                inputs.append(each.new_input_feature)
                advantages.append((score - rewards_mean) / spread)
                old_logps.append([place[0][1] for place in each.logprobs or []])
            rewards.append(rewards_mean)
        model.forward_backward(inputs=inputs, advantages=advantages, old_logps=old_logps)
        model.clip_grad_and_step()
        mean = statistics.fmean(rewards[-sums:])
        console.print(f"step {number:3d}  mean reward {mean:.3f} {'█' * round(40 * mean)}")
    client.close()


def task(rng: random.Random) -> tuple[str, int]:
    """A sum of two small numbers, and its result."""
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return f"{a} + {b} = ?", a + b


def to_trajectory(question: str) -> dict[str, Any]:
    """What the sampler's template encodes."""
    system = {"role": "system", "content": SYSTEM}
    return {"messages": [system, {"role": "user", "content": question}]}


def reward(answer: str, result: int) -> float:
    """1 for the number alone, half of it if more is said, 0 for another number."""
    text = answer.removesuffix("<|im_end|>").strip()
    numbers = re.findall(r"-?\d+", text)
    if not numbers or int(numbers[-1]) != result:
        return 0.0
    return 1.0 if text.rstrip(".") == str(result) else 0.5


def parse_arguments() -> argparse.Namespace:
    """Where the service is."""
    parser = argparse.ArgumentParser(description="GRPO on small sums with the Twinkle client.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="two steps of few samples")
    return parser.parse_args()


if __name__ == "__main__":
    main()
