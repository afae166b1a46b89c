"""The optimizers by the names of torch's classes.

Defaults are those of torch 2.13, but for two that Twinkle's server sets for every class: ``lr`` is
1e-5 and ``weight_decay`` 0.01, where a class takes them. An adapter has neither norms nor biases,
so weight decay is one for all weights. How torch computes (``fused``, ``foreach``) is chosen here.
"""

from collections.abc import Mapping
from typing import Final

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.optimizers.settings import Choice, Flag, Number, Setting, Several, Table
from twinkle_dask.types import OptimizerSpec

_SHARE: Final = Number(0.0, 0.0, 1.0, below=True)
_ANY: Final = Number(0.0, -float("inf"))


def _share(default: float) -> Number:
    return Number(default, 0.0, 1.0, below=True)


def _betas(second: float = 0.999) -> Several:
    return Several((_SHARE, _SHARE), (0.9, second))


_LR: Final = {"lr": Number(1e-5)}
_DECAY: Final = {"weight_decay": Number(0.01)}
_EPS: Final = {"eps": Number(1e-8)}
_MAXIMIZE: Final = {"maximize": Flag(False)}

_ENTRIES: Final[Mapping[str, Mapping[str, Setting]]] = {
    "Adam": {
        **_LR,
        "betas": _betas(),
        **_EPS,
        **_DECAY,
        "amsgrad": Flag(False),
        **_MAXIMIZE,
        "decoupled_weight_decay": Flag(False),
    },
    "AdamW": {**_LR, "betas": _betas(), **_EPS, **_DECAY, "amsgrad": Flag(False), **_MAXIMIZE},
    "SGD": {
        **_LR,
        "momentum": Number(0.0),
        "dampening": Number(0.0, -float("inf")),
        **_DECAY,
        "nesterov": Flag(False),
        **_MAXIMIZE,
    },
    "RMSprop": {
        **_LR,
        "alpha": _share(0.99),
        **_EPS,
        **_DECAY,
        "momentum": Number(0.0),
        "centered": Flag(False),
        **_MAXIMIZE,
    },
    "Adagrad": {
        **_LR,
        "lr_decay": Number(0.0),
        **_DECAY,
        "initial_accumulator_value": Number(0.0),
        "eps": Number(1e-10),
        **_MAXIMIZE,
    },
    "Adadelta": {
        **_LR,
        "rho": Number(0.9, 0.0, 1.0),
        "eps": Number(1e-6),
        **_DECAY,
        **_MAXIMIZE,
    },
    "Adamax": {**_LR, "betas": _betas(), **_EPS, **_DECAY, **_MAXIMIZE},
    "NAdam": {
        **_LR,
        "betas": _betas(),
        **_EPS,
        **_DECAY,
        "momentum_decay": Number(0.004),
        "decoupled_weight_decay": Flag(False),
        **_MAXIMIZE,
    },
    "RAdam": {
        **_LR,
        "betas": _betas(),
        **_EPS,
        **_DECAY,
        "decoupled_weight_decay": Flag(False),
        **_MAXIMIZE,
    },
    "ASGD": {
        **_LR,
        "lambd": Number(1e-4),
        "alpha": Number(0.75, 0.0, 5.0),  # torch raises to it, and larger ones overflow
        "t0": Number(1e6),
        **_DECAY,
        **_MAXIMIZE,
    },
    "Rprop": {
        **_LR,
        "etas": Several(
            (Number(0.5, 0.0, 1.0, True, True), Number(1.2, 1.0, above=True)), (0.5, 1.2)
        ),
        "step_sizes": Several((Number(1e-6), Number(50.0)), (1e-6, 50.0)),
        **_MAXIMIZE,
    },
    "Muon": {
        **_LR,
        **_DECAY,
        "momentum": _share(0.95),
        "nesterov": Flag(True),
        "ns_coefficients": Several((_ANY, _ANY, _ANY), (3.4445, -4.775, 2.0315)),
        "eps": Number(1e-7),
        "ns_steps": Number(5, 1, 99, whole=True),
        "adjust_lr_fn": Choice(("original", "match_rms_adamw"), None),
    },
    "Adafactor": {
        **_LR,
        "beta2_decay": Number(-0.8, -float("inf"), 0.0),
        "eps": Several((Number(None, optional=True), Number(1e-3)), (None, 1e-3)),
        "d": Number(1.0, 1.0),
        **_DECAY,
        **_MAXIMIZE,
    },
}

_MEGATRON: Final = "it is Megatron's, and adapters are trained without Megatron here; use 'AdamW'."

OPTIMIZERS: Final = Table(
    what="optimizer",
    entries=_ENTRIES,
    refused={
        "LBFGS": "it evaluates the loss several times in a step, with data that the server does "
        "not keep.",
        "SparseAdam": "it takes sparse gradients, and those of adapters are dense.",
        "Optimizer": "it is the base of the others.",
        "default": _MEGATRON,
        "MegatronOptimizer": _MEGATRON,
    },
    not_taken=dict.fromkeys(
        ("fused", "foreach", "capturable", "differentiable"),
        "the server chooses how torch computes",
    ),
)


def optimizer_spec(name: str, settings: Mapping[str, object]) -> OptimizerSpec:
    """Look an optimizer up by a tenant's words and fill in its defaults.

    Raises:
        InvalidRequest: Unknown class, unknown setting, or settings that make no sense.
    """
    values = OPTIMIZERS.read(name, settings)
    if name == "SGD" and values["nesterov"] and (not values["momentum"] or values["dampening"]):
        raise InvalidRequest("nesterov of SGD needs a momentum above 0 and a dampening of 0.")
    if name == "Rprop" and values["step_sizes"][0] > values["step_sizes"][1]:
        raise InvalidRequest("The first of step_sizes of Rprop must not be above the second.")
    return OptimizerSpec(name=name, settings=values)
