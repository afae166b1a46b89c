"""Whether the engine's numbers are right: beside Transformers and PEFT on the same weights.

The truth is PEFT on a float32 copy of the weights, row by row. The engine may err by twice what
PEFT itself does in the dtype of the run (it too rounds to bfloat16 after every operation), and
anything may err by a ten-thousandth, so that float32 has something to be within.
"""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import torch
from torch import nn

from benchmarks._inprocess import Engine, Rows, cross_entropy
from benchmarks._plain import adapter_config
from tests.blackbox.data import random_tokens
from twinkle_dask.trainer.work import ExportState, LoadState
from twinkle_dask.types import (
    AdapterState,
    Float32Array,
    ForwardBackwardResult,
    LoraSpec,
    RunId,
    RunState,
)

# Partly typed, used through Any.
_peft: Any = peft

_RANKS = (4, 8, 16)
_LENGTHS = ((5, 33), (64,), (17, 2, 40))
_TIMES_PLAIN = 2.0
_LEAST_ALLOWED = 1e-4


@dataclass(frozen=True, slots=True)
class Case:
    """One run of the mixed batch."""

    state: AdapterState
    rows: Rows


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a forward_backward gave: logprobs of all rows, and gradients by weight name."""

    logprobs: Float32Array
    gradients: Mapping[str, Float32Array]


def mixed_cases(model: Any) -> list[Case]:
    """Adapters of several ranks that change what the model says, with rows of several lengths."""
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    vocab_size: int = model.config.vocab_size
    return [
        Case(
            _random_adapter(linears, rank),
            [random_tokens(length + 1, rank + length, vocab_size) for length in lengths],
        )
        for rank, lengths in zip(_RANKS, _LENGTHS, strict=True)
    ]


def _random_adapter(linears: Mapping[str, nn.Linear], rank: int) -> AdapterState:
    random = np.random.default_rng(rank)
    weights: dict[str, Float32Array] = {}
    for name, linear in linears.items():
        bound = linear.in_features**-0.5  # as a fresh A; a fresh B is 0, which hides A's gradient
        a_RD = random.uniform(-bound, bound, (rank, linear.in_features))
        b_ER = random.normal(0.0, 0.01, (linear.out_features, rank))
        weights[f"{name}.lora_A.weight"] = a_RD.astype(np.float32)
        weights[f"{name}.lora_B.weight"] = b_ER.astype(np.float32)
    return AdapterState(spec=LoraSpec(rank=rank, seed=0), weights=weights)


def plain_numbers(model: Any, cases: Sequence[Case], dtype: torch.dtype) -> list[Numbers]:
    """By PEFT on a copy of the model in ``dtype``; adapters and what they compute are float32."""
    found: list[Numbers] = []
    for case in cases:
        config = adapter_config(case.state.spec.rank)
        with warnings.catch_warnings():
            # It warns of merging into a head tied to the embedding; nothing is merged here.
            warnings.simplefilter("ignore")
            wrapped = _peft.get_peft_model(_copy(model, dtype), config, "0")
        named = {
            name.removeprefix("base_model.model.").replace(".0.weight", ".weight"): parameter
            for name, parameter in wrapped.named_parameters()
            if ".lora_" in name
        }
        for name, parameter in named.items():
            parameter.data = torch.tensor(case.state.weights[name], device=parameter.device)
        logprobs: list[Float32Array] = []
        for row in case.rows:
            tokens_BL = torch.tensor([list(row)], device=wrapped.device)
            logits_LV = wrapped(input_ids=tokens_BL[:, :-1], use_cache=False).logits[0]
            targets_L1 = tokens_BL[0, 1:, None]
            lp_L = logits_LV.float().log_softmax(-1).gather(1, targets_L1)[:, 0]
            (-lp_L.sum()).backward()
            logprobs.append(lp_L.detach().cpu().numpy())
        gradients = {name: value.grad.float().cpu().numpy() for name, value in named.items()}
        found.append(Numbers(np.concatenate(logprobs), gradients))
    return found


def _copy(model: Any, dtype: torch.dtype) -> Any:
    copied = copy.deepcopy(model)
    # Not ``.to(dtype)`` where it is that already: the rotary frequencies are always float32.
    return copied if copied.dtype == dtype else copied.to(dtype)


def engine_numbers(engine: Engine, cases: Sequence[Case]) -> list[Numbers]:
    """By the engine, all cases together."""
    runs = [RunId(f"check-{i}") for i in range(len(cases))]
    for run, case in zip(runs, cases, strict=True):
        given: Future[RunState] = Future()
        given.set_result(RunState(adapter=case.state))
        engine.submit(run, LoadState(state=given, with_optimizer=False))
    engine.drain()
    ids = [
        (
            engine.submit(run, cross_entropy(case.rows)),
            engine.submit(run, ExportState(gradients=True, optimizer=False)),
        )
        for run, case in zip(runs, cases, strict=True)
    ]
    outcomes = engine.drain()
    found: list[Numbers] = []
    for evaluated, exported in ids:
        result, state = outcomes[evaluated], outcomes[exported]
        if not isinstance(result, ForwardBackwardResult) or not isinstance(state, RunState):
            raise TypeError(f"unexpected outcomes {type(result)} and {type(state)}")
        found.append(Numbers(np.concatenate(result.logprobs), state.gradients or {}))
    for run in runs:
        engine.trainer.drop_run(run)
    return found


def compare(
    engine: Sequence[Numbers], plain: Sequence[Numbers], truth: Sequence[Numbers]
) -> dict[str, Any]:
    """Errors of both by the worst run, what is allowed, and whether the engine keeps to it.

    ``logprob`` is the root mean square error over positions; ``gradient`` the error's norm over
    the gradient's, for the whole adapter.
    """
    ours, theirs = _errors(engine, truth), _errors(plain, truth)
    allowed = {
        name: max(_TIMES_PLAIN * error, _LEAST_ALLOWED)
        for name, error in theirs.items()
        if name != "logprob_max"
    }
    return {
        "engine_error": _rounded(ours),
        "plain_error": _rounded(theirs),
        "allowed": _rounded(allowed),
        "right": all(ours[name] <= bound for name, bound in allowed.items()),
    }


def _errors(found: Sequence[Numbers], truth: Sequence[Numbers]) -> dict[str, float]:
    pairs = list(zip(found, truth, strict=True))
    differences = [one.logprobs - true.logprobs for one, true in pairs]
    return {
        "logprob": max(float(np.sqrt(np.mean(d**2))) for d in differences),
        "logprob_max": max(float(np.abs(d).max()) for d in differences),
        "gradient": max(_gradient_error(one.gradients, true.gradients) for one, true in pairs),
    }


def _gradient_error(found: Mapping[str, Float32Array], truth: Mapping[str, Float32Array]) -> float:
    if found.keys() != truth.keys():
        return math.inf
    wrong = sum(float(np.sum((found[name] - truth[name]) ** 2.0)) for name in truth)
    return math.sqrt(wrong / sum(float(np.sum(value**2.0)) for value in truth.values()))


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.2g}") for name, value in values.items()}
