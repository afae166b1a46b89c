"""Samples through the official SDK in a line, and a sentence that a run can learn by heart."""

from collections.abc import Sequence
from typing import Any

import tinker
from tinker import types

from tests.blackbox.data import datum, random_tokens

# Float32 on both sides; sums are ordered differently.
TOLERANCE = 2e-4
PROMPT = random_tokens(9, seed=7)
QUESTION = "Who are you"
ANSWER = "? I am a small model, made for tests.<|im_end|>"
# What ``SamplingClient.sample`` takes beside the parameters of drawing.
_WISHES = (
    "include_prompt_logprobs",
    "topk_prompt_logprobs",
    "topk_sample_logprobs",
    "target_prompt_logprobs",
    "prompt_alt_tokens_k",
    "prompt_logprobs_last_n",
)


def sample(
    client: tinker.SamplingClient,
    prompt: Sequence[int] = PROMPT,
    *,
    num_samples: int = 1,
    **params: Any,
) -> tinker.APIFuture[types.SampleResponse]:
    wishes = {name: params.pop(name) for name in _WISHES if name in params}
    return client.sample(
        types.ModelInput.from_ints(list(prompt)),
        num_samples,
        types.SamplingParams.model_validate(params),
        **wishes,
    )


def tokens_of(future: tinker.APIFuture[types.SampleResponse]) -> list[list[int]]:
    return [sequence.tokens for sequence in future.result().sequences]


def teach(run: tinker.TrainingClient) -> None:
    """Train a run until it answers the question with the answer, whatever is drawn."""
    tokenizer: Any = run.get_tokenizer()
    lesson = [datum(tokenizer.encode(QUESTION + ANSWER))]
    for _ in range(40):
        run.forward_backward(lesson, "cross_entropy")
        run.optim_step(types.AdamParams(learning_rate=3e-3))
