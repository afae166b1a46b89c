"""From a loss's name to its formula: the closed table's other half."""

from collections.abc import Callable, Mapping
from typing import Final

from twinkle_dask.batch_losses.batch import LabelledBatch, Objective
from twinkle_dask.batch_losses.distillation import gkd
from twinkle_dask.batch_losses.policies import cispo, clipped, gspo, sapo
from twinkle_dask.batch_losses.preferences import cpo, dpo, orpo, simpo
from twinkle_dask.batch_losses.specs import BatchLossSpec
from twinkle_dask.batch_losses.supervised import cross_entropy, squared_error
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import Json

#: Every argument that some loss knows. One loss leaves another's alone, since metrics read the
#: same arguments.
ARGUMENTS: Final = frozenset(
    {
        "advantages", "old_logps", "ref_logps", "ref_outputs", "ref_chosen_logps",
        "ref_rejected_logps", "num_items_in_batch", "targets", "teacher_logits",
        "teacher_topk_logprobs", "teacher_topk_indices", "topk",
    }
)  # fmt: skip

_BY_LABELS: Mapping[str, Callable[[Json, LabelledBatch, Json], Objective]] = {
    "CrossEntropyLoss": cross_entropy,
    "ChunkedCrossEntropyLoss": cross_entropy,
    "MSELoss": squared_error,
    "DPOLoss": dpo,
    "SimPOLoss": simpo,
    "CPOLoss": cpo,
    "ORPOLoss": orpo,
}
_POLICIES: Mapping[str, Callable[[Json, LabelledBatch, Json, str], Objective]] = {
    "GRPOLoss": clipped,
    "PPOLoss": clipped,
    "BNPOLoss": clipped,
    "DRGRPOLoss": clipped,
    "GSPOLoss": gspo,
    "SAPOLoss": sapo,
    "CISPOLoss": cispo,
}


def objective(
    spec: BatchLossSpec, batch: LabelledBatch, arguments: Json, vocab_size: int
) -> Objective:
    """Bind a loss of tokens to a batch and the arguments of a call.

    Args:
        spec: Of any loss but one that ``embeds``.
        batch: With the loss's ``ignore_index``.
        arguments: JSON by Twinkle's names; what no loss knows is left alone.
        vocab_size: Of the student.

    Raises:
        InvalidRequest: An argument is missing or does not fit; names the row and the lengths.
    """
    name, settings = spec.name, spec.settings
    if name == "GKDLoss":
        return gkd(settings, batch, arguments, vocab_size)
    if name in _POLICIES:
        return _POLICIES[name](settings, batch, arguments, name)
    if name in _BY_LABELS:
        return _BY_LABELS[name](settings, batch, arguments)
    raise InvalidRequest(f"{name} is not a loss of tokens.")
