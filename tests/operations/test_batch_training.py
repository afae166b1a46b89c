"""Which passes a batch goes through, and that nobody comes between them."""

import asyncio
from typing import Any

import numpy as np
import pytest

from tests.operations.parts import ANN, FACTS, MODEL, Parts
from twinkle_dask.batch_losses import loss_spec
from twinkle_dask.config import LimitConfig
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.batch_training import BatchRow, BatchTraining
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.provenance import Provenance
from twinkle_dask.operations.training import Training
from twinkle_dask.operations.values import LoraRequest, ServedModel
from twinkle_dask.types import ForwardBackward, LossName, RunId

X = -100
ROWS = [
    BatchRow(tokens=np.array([1, 2, 3], np.int32), labels=np.array([X, 3, 4])),
    BatchRow(tokens=np.array([1, 2], np.int32), labels=np.array([5, X])),
]
DPO = loss_spec("DPOLoss", {"reference_free": True, "beta": 1.0})
GRPO: dict[str, Any] = {"advantages": [1.0, -1.0]}


async def batches_of(parts: Parts, dropout: float = 0.0) -> tuple[BatchTraining, RunId]:
    served = ServedModel(name=MODEL, source="tiny", facts=FACTS, tokenizer_id=MODEL)
    catalogue = Catalogue({MODEL: served})
    training = Training(
        parts.runs,
        parts.store,
        parts.checkpoints,
        catalogue,
        LimitConfig(max_data=2),
        Provenance(parts.recording),
    )
    ticket = await parts.runs.create(
        ANN,
        await parts.a_session(),
        seq=0,
        base_model=MODEL,
        lora=LoraRequest(rank=1, dropout=dropout),
        user_metadata={},
    )
    await parts.done(ticket.id)
    assert ticket.run is not None
    return BatchTraining(parts.runs, training, catalogue, parts.tickets), ticket.run


def passes(parts: Parts) -> list[ForwardBackward]:
    return [body for body in parts.host.commands if isinstance(body, ForwardBackward)]


async def test_slopes_of_one_pass_are_the_weights_of_another(parts: Parts) -> None:
    batches, run = await batches_of(parts, dropout=0.5)
    parts.host.logprobs = [-1.0, -7.0]
    done = await batches.forward_backward(ANN, run, rows=ROWS, loss=DPO, arguments={})
    # Two targets against one, so a margin of -1; the second pass's scores are not looked at.
    assert done.loss == pytest.approx(np.log1p(np.exp(1.0)))
    assert done.num_counted == 1
    first, second = passes(parts)
    assert (first.backward, second.backward) == (False, True)
    assert first.dropout_seed == second.dropout_seed is not None
    assert second.num_counted == 1
    share = 1 / (1 + np.exp(-1.0))
    weights = [d.loss_inputs["weights"].tolist() for d in second.data]
    assert weights == [pytest.approx([0, share, share]), pytest.approx([-share, 0])]
    # Where there is no target, token 0 is scored.
    assert [d.target_tokens.tolist() for d in first.data] == [[0, 3, 4], [5, 0]]
    assert not first.data[0].loss_inputs


async def test_one_pass_where_the_core_has_the_loss(parts: Parts) -> None:
    batches, run = await batches_of(parts)
    parts.host.logprobs = [-1.0, -1.0, -1.0]
    for name, arguments in (
        ("CrossEntropyLoss", {}),
        ("GRPOLoss", GRPO),
        ("GRPOLoss", {**GRPO, "old_logps": [[-1.5, -1.0], [-1.2]]}),
    ):
        await batches.forward_backward(
            ANN, run, rows=ROWS, loss=loss_spec(name, {}), arguments=arguments
        )
    seen = passes(parts)
    assert all(one.backward for one in seen)
    losses = [one.loss.name for one in seen]
    assert losses == [LossName.CROSS_ENTROPY, LossName.CROSS_ENTROPY, LossName.PPO]
    assert seen[2].data[0].loss_inputs["logprobs"].tolist() == [0.0, -1.5, -1.0]
    assert seen[2].data[0].loss_inputs["weights"].tolist() == [0.0, 0.25, 0.25]


async def test_a_sum_counts_its_targets(parts: Parts) -> None:
    batches, run = await batches_of(parts)
    parts.host.logprobs = [-1.0]
    loss = loss_spec("CrossEntropyLoss", {"reduction": "sum"})
    done = await batches.forward_backward(ANN, run, rows=ROWS, loss=loss, arguments={})
    assert (done.loss, done.num_counted) == (3.0, 3.0)
    assert passes(parts)[0].num_counted == 3.0


async def test_known_logprobs_spare_a_pass(parts: Parts) -> None:
    batches, run = await batches_of(parts)
    parts.host.logprobs = [-1.0, -1.0]
    scored = await batches.forward(ANN, run, rows=ROWS, loss=DPO, arguments={})
    done = await batches.forward_backward(
        ANN, run, rows=ROWS, loss=DPO, arguments={}, logprobs=scored.logprobs
    )
    assert done.loss == scored.loss
    assert [one.backward for one in passes(parts)] == [False, True]


async def test_passes_of_two_calls_do_not_mix(parts: Parts) -> None:
    batches, run = await batches_of(parts)
    parts.host.logprobs = [-1.0] * 6
    calls = [
        batches.forward_backward(ANN, run, rows=ROWS, loss=DPO, arguments={}) for _ in range(3)
    ]
    await asyncio.gather(*calls)
    assert [one.backward for one in passes(parts)] == [False, True] * 3


async def test_scores_that_are_no_numbers_add_nothing(parts: Parts) -> None:
    batches, run = await batches_of(parts)
    parts.host.logprobs = [float("nan"), float("nan")]
    with pytest.raises(InvalidRequest, match="Row 0: a score of the model"):
        await batches.forward_backward(ANN, run, rows=ROWS, loss=DPO, arguments={})
    assert [one.backward for one in passes(parts)] == [False]
    scored = await batches.forward(ANN, run, rows=ROWS, loss=DPO, arguments={})
    assert scored.loss is not None
    assert np.isnan(scored.loss)


@pytest.mark.parametrize(
    ("rows", "loss", "arguments", "words"),
    [
        ([], DPO, {}, "batch is empty"),
        ([*ROWS, *ROWS], DPO, {}, "has 4 data; send at most 2"),
        (
            [BatchRow(tokens=ROWS[0].tokens, labels=ROWS[1].labels)] * 2,
            DPO,
            {},
            "Row 0 has 3 tokens and 2 labels",
        ),
        (
            [BatchRow(tokens=ROWS[1].tokens, labels=np.array([1, 100]))] * 2,
            DPO,
            {},
            "token 100, but the vocabulary",
        ),
        (ROWS, loss_spec("GRPOLoss", {}), {"advantages": [1, -1e30]}, "Row 1: a weight .* beyond"),
        (ROWS, loss_spec("GRPOLoss", {}), {"advantage": [1, 2]}, "Unknown argument 'advantage'"),
        (ROWS, loss_spec("InfonceLoss", {}), {}, "task='embedding'"),
    ],
)
async def test_refusals(
    parts: Parts, rows: list[BatchRow], loss: Any, arguments: dict[str, Any], words: str
) -> None:
    batches, run = await batches_of(parts)
    with pytest.raises(InvalidRequest, match=words):
        await batches.forward_backward(ANN, run, rows=rows, loss=loss, arguments=arguments)
    assert not passes(parts)
