"""What a tenant may set: the closed table of loss classes, their settings and defaults.

The names are those of Twinkle's classes, and so are the settings. ``docs/losses.md`` has the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from twinkle_dask.batch_losses.settings import Setting, filled, flag, number, one_of, or_none, whole
from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.types import Json

IGNORED_LABEL: Final = -100
"""A position with this label is no target, whatever ``ignore_index`` says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLossSpec:
    """A loss by its class name, with every setting it has, checked.

    Attributes:
        name: One of ``LOSSES``.
        settings: Plain JSON.
    """

    name: str
    settings: Json = field(default_factory=dict[str, Any])

    @property
    def embeds(self) -> bool:
        """Whether it is a loss of rows' embeddings, not of their tokens."""
        return self.name == "InfonceLoss"


_IGNORE: Mapping[str, Setting] = {"ignore_index": Setting(default=IGNORED_LABEL, check=whole())}
_CROSS_ENTROPY: Mapping[str, Setting] = {
    **_IGNORE,
    "reduction": Setting(default="mean", check=one_of("mean", "sum")),
    "dft": Setting(default=False, check=flag),
}
_POLICY: Mapping[str, Setting] = {
    **_IGNORE,
    "epsilon": Setting(default=0.2, check=number(0)),
    "epsilon_high": Setting(default=None, check=or_none(number(0))),
    "beta": Setting(default=0.0, check=number(0)),
    "entropy_coef": Setting(default=0.0, check=number(0)),
}

LOSSES: Mapping[str, Mapping[str, Setting]] = {
    "CrossEntropyLoss": _CROSS_ENTROPY,
    "ChunkedCrossEntropyLoss": {
        **_CROSS_ENTROPY,
        "chunk_size": Setting(default=None, check=whole(1), needed=True),
    },
    "MSELoss": {},
    "DPOLoss": {
        **_IGNORE,
        "beta": Setting(default=0.1, check=number(0, above=True)),
        "label_smoothing": Setting(default=0.0, check=number(0, 1)),
        "loss_type": Setting(
            default="sigmoid", check=one_of("sigmoid", "hinge", "ipo", "kto_pair")
        ),
        "reference_free": Setting(default=False, check=flag),
        "sft_weight": Setting(default=0.0, check=number(0)),
    },
    "SimPOLoss": {
        **_IGNORE,
        "beta": Setting(default=2.5, check=number(0, above=True)),
        "gamma": Setting(default=0.5, check=number()),
    },
    "CPOLoss": {
        **_IGNORE,
        "beta": Setting(default=0.1, check=number(0, above=True)),
        "bc_coef": Setting(default=1.0, check=number()),
    },
    "ORPOLoss": {**_IGNORE, "lambda_orpo": Setting(default=0.1, check=number())},
    "GRPOLoss": _POLICY,
    "PPOLoss": {
        **_POLICY,
        "loss_agg_mode": Setting(
            default="token-mean", check=one_of("token-mean", "seq-mean-token-mean")
        ),
    },
    "GSPOLoss": _POLICY,
    "SAPOLoss": {
        **_POLICY,
        "tau_pos": Setting(default=1.0, check=number(0, above=True)),
        "tau_neg": Setting(default=1.0, check=number(0, above=True)),
    },
    "CISPOLoss": _POLICY,
    "BNPOLoss": _POLICY,
    "DRGRPOLoss": {
        **_POLICY,
        "max_completion_length": Setting(default=1024, check=whole(1)),
    },
    "GKDLoss": {
        **_IGNORE,
        "beta": Setting(default=0.5, check=number(0, 1)),
        "temperature": Setting(default=1.0, check=number(0, above=True)),
        "chunk_size": Setting(default=512, check=whole(1)),
    },
    "InfonceLoss": {
        "temperature": Setting(default=0.1, check=number(0, above=True)),
        "use_batch": Setting(default=True, check=flag),
        "hard_negatives": Setting(default=None, check=or_none(whole(1))),
        "mask_fake_negative": Setting(default=False, check=flag),
        "fake_neg_margin": Setting(default=0.1, check=number()),
        "include_qq": Setting(default=False, check=flag),
        "include_dd": Setting(default=False, check=flag),
    },
}

#: Twinkle's other losses, and why they are not here.
_REFUSED: Mapping[str, str] = {
    "LigerFusedLinearCrossEntropyLoss": (
        "it is the name of a GPU kernel. ChunkedCrossEntropyLoss is the same loss; this service "
        "makes logits in chunks whatever the loss."
    ),
    "PPOValueLoss": (
        "it trains a value head, and the models here have none. Compute advantages at the client "
        "and train the policy with PPOLoss."
    ),
}


def loss_spec(class_name: str, settings: Mapping[str, Any]) -> BatchLossSpec:
    """Look a loss up by a tenant's words and fill in its defaults.

    Raises:
        InvalidRequest: Unknown class, unknown setting, or a value that makes no sense.
        NotSupported: A loss of Twinkle that this service does not compute.
    """
    if class_name in _REFUSED:
        raise NotSupported(f"Loss {class_name!r} is not computed here: {_REFUSED[class_name]}")
    takes = LOSSES.get(class_name)
    if takes is None:
        known = ", ".join(sorted(LOSSES))
        raise InvalidRequest(f"Unknown loss {class_name[:60]!r}. This service has: {known}.")
    values = filled(f"Loss {class_name!r}", takes, settings)
    _together(class_name, values)
    return BatchLossSpec(name=class_name, settings=values)


def _together(name: str, values: Json) -> None:
    """What depends on more than one setting, or cannot be computed here."""
    if name == "DPOLoss" and values["label_smoothing"] > 0 and values["loss_type"] != "sigmoid":
        raise InvalidRequest(
            "'label_smoothing' of DPOLoss is defined for loss_type 'sigmoid' only, not for "
            f"{values['loss_type']!r}; leave it at 0."
        )
    if name == "InfonceLoss" and values["mask_fake_negative"] and values["fake_neg_margin"] <= 0:
        raise InvalidRequest(
            "'fake_neg_margin' of InfonceLoss must be above 0 with 'mask_fake_negative', or the "
            f"positives themselves would be masked; it is {values['fake_neg_margin']}."
        )
    if values.get("entropy_coef", 0.0) > 0:
        raise NotSupported(
            f"'entropy_coef' of {name} must be 0 here: an entropy bonus needs the gradient of the "
            "whole distribution, and this service differentiates what was sampled. 'beta' with "
            "'ref_logps' holds the policy back in another way."
        )
