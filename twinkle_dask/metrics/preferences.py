"""Metrics of preferences and of embeddings."""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from twinkle_dask.batch_losses import IGNORED_LABEL, LabelledBatch
from twinkle_dask.batch_losses.preferences import reference_sums
from twinkle_dask.batch_losses.settings import Setting, number, whole
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.metrics.base import Facts, Metric, batch_of, kept, scored
from twinkle_dask.types import Int64Array, Json

_POLICY: Final = ("chosen", "rejected")
_REWARDS: Final = ("ref_chosen", "ref_rejected", "chosen_reward", "rejected_reward", "margin")


class DPOMetric(Metric):
    """Log-probabilities of chosen and rejected answers, and what DPO calls their rewards.

    The reference is read as DPOLoss reads it: ``ref_outputs``, ``ref_logps``, or the two sums.
    """

    takes: Mapping[str, Setting] = {
        "ignore_index": Setting(default=IGNORED_LABEL, check=whole()),
        "beta": Setting(default=0.1, check=number(0)),
    }

    def empty(self, now: float) -> Json:
        """See ``Metric``."""
        del now
        return {**dict.fromkeys([*_POLICY, *_REWARDS], 0.0), "better": 0, "pairs": 0, "judged": 0}

    def suits(self, settings: Json, labels: Sequence[Int64Array], arguments: Json) -> None:
        """See ``Metric``."""
        if not labels:
            return
        batch = batch_of(settings, labels)
        _pairs(batch)
        reference_sums(batch, arguments)

    def add(self, values: Json, settings: Json, facts: Facts) -> Json:
        """See ``Metric``."""
        batch = batch_of(settings, facts.labels)
        lp_T = scored(batch, facts)
        if lp_T is None:
            return values
        _pairs(batch)
        sum_S = batch.sums_S(lp_T)
        chosen_P, rejected_P = sum_S[0::2], sum_S[1::2]
        more = {"chosen": chosen_P.sum(), "rejected": rejected_P.sum()}
        counts = {"pairs": len(chosen_P), "judged": 0, "better": 0}
        reference_S = reference_sums(batch, facts.arguments)
        if reference_S is not None:
            beta = float(settings["beta"])
            rewards_P = (
                beta * (chosen_P - reference_S[0::2]),
                beta * (rejected_P - reference_S[1::2]),
            )
            more |= {
                "ref_chosen": reference_S[0::2].sum(),
                "ref_rejected": reference_S[1::2].sum(),
                "chosen_reward": rewards_P[0].sum(),
                "rejected_reward": rewards_P[1].sum(),
                "margin": (rewards_P[0] - rewards_P[1]).sum(),
            }
            counts["judged"] = len(chosen_P)
            counts["better"] = int((rewards_P[0] > rewards_P[1]).sum())
        gathered: Json = {
            name: kept(float(values[name]) + float(more.get(name, 0.0)))
            for name in (*_POLICY, *_REWARDS)
        }
        return gathered | {name: values[name] + n for name, n in counts.items()}

    def tell(self, values: Json, settings: Json, now: float) -> Json:
        """See ``Metric``."""
        del settings, now
        if not values["pairs"]:
            return {}
        told: Json = {
            f"logps/{name}": f"{float(values[name]) / values['pairs']:.2f}" for name in _POLICY
        }
        if judged := values["judged"]:
            mean = {name: float(values[name]) / judged for name in _REWARDS}
            told |= {
                "logps/ref_chosen": f"{mean['ref_chosen']:.2f}",
                "logps/ref_rejected": f"{mean['ref_rejected']:.2f}",
                "rewards/chosen": f"{mean['chosen_reward']:.4f}",
                "rewards/rejected": f"{mean['rejected_reward']:.4f}",
                "rewards/margins": f"{mean['margin']:.4f}",
                "rewards/accuracies": f"{values['better'] / judged * 100:.1f}%",
            }
        return told


class EmbeddingMetric(Metric):
    """How near anchors are to their positives, and to those of others."""

    def empty(self, now: float) -> Json:
        """See ``Metric``."""
        del now
        return {
            "near": 0.0, "least": None, "most": None, "anchors": 0, "far": 0.0, "others": 0,
            "loss": 0.0, "passes": 0, "grad_norm": 0.0,
        }  # fmt: skip

    def add(self, values: Json, settings: Json, facts: Facts) -> Json:
        """See ``Metric``."""
        del settings
        if facts.embeddings is None:
            return values
        x_SD = facts.embeddings.astype(np.float64)
        labels = [int(row[0]) for row in facts.labels]
        starts = [i for i, label in enumerate(labels) if label and i + 1 < len(labels)]
        if not starts:
            return values
        anchors_GD, positives_GD = x_SD[starts], x_SD[[i + 1 for i in starts]]
        lengths_G = np.linalg.norm(anchors_GD, axis=1) * np.linalg.norm(positives_GD, axis=1)
        near_G = (anchors_GD * positives_GD).sum(axis=1) / np.maximum(lengths_G, 1e-8)
        between_GG = anchors_GD @ positives_GD.T
        least, most = [float(near_G.min())], [float(near_G.max())]
        if values["least"] is not None:
            least.append(float(values["least"]))
            most.append(float(values["most"]))
        more = values | {
            "near": kept(float(values["near"]) + float(near_G.sum())),
            "least": kept(min(least)),
            "most": kept(max(most)),
            "anchors": values["anchors"] + len(starts),
            "far": kept(float(values["far"]) + float(between_GG.sum() - np.trace(between_GG))),
            "others": values["others"] + len(starts) * (len(starts) - 1),
        }
        if facts.loss is not None:
            more["loss"] = kept(float(values["loss"]) + facts.loss)
            more["passes"] = values["passes"] + 1
        if facts.grad_norm is not None:
            more["grad_norm"] = kept(facts.grad_norm)
        return more

    def tell(self, values: Json, settings: Json, now: float) -> Json:
        """See ``Metric``."""
        del settings, now
        told: Json = {}
        if values["anchors"]:
            told["pos_sim"] = f"{float(values['near']) / values['anchors']:.4f}"
            told["pos_sim_min"] = f"{float(values['least']):.4f}"
            told["pos_sim_max"] = f"{float(values['most']):.4f}"
        if values["others"]:
            told["neg_sim"] = f"{float(values['far']) / values['others']:.4f}"
        if values["passes"]:
            told["loss"] = f"{float(values['loss']) / values['passes']:.4f}"
        if float(values["grad_norm"]) > 0:
            told["grad_norm"] = f"{float(values['grad_norm']):.6f}"
        return told


def _pairs(batch: LabelledBatch) -> None:
    if batch.num_rows % 2:
        raise InvalidRequest(
            "DPOMetric takes pairs: rows alternate between a chosen and a rejected answer, so "
            f"their number must be even, not {batch.num_rows}."
        )
