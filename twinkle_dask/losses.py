"""What each loss takes: its inputs, its settings and their defaults.

The formulas are in ``twinkle_dask.trainer.losses``.

To add a loss: a member in ``types.LossName``, an entry here, its formula there, a row in
``docs/losses.md``, and the gradient test in ``tests/trainer``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import LossName, LossSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """The inputs of a loss besides ``target_tokens``, and its settings.

    Attributes:
        required: Names of inputs that must be there.
        optional: Names of inputs that may be there; each is 1 everywhere when absent.
        defaults: Every setting with its default.
        many_targets: Whether (N, K) targets make sense.
    """

    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    defaults: Mapping[str, float] = field(default_factory=dict[str, float])
    many_targets: bool = False


_POLICY_INPUTS = frozenset({"logprobs", "advantages"})

LOSSES: Mapping[LossName, LossTerms] = {
    LossName.CROSS_ENTROPY: LossTerms(optional=frozenset({"weights"}), many_targets=True),
    LossName.IMPORTANCE_SAMPLING: LossTerms(
        required=_POLICY_INPUTS, optional=frozenset({"weights"})
    ),
    LossName.PPO: LossTerms(
        required=_POLICY_INPUTS,
        optional=frozenset({"weights"}),
        defaults={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    ),
}


def loss_spec(name: str, config: Mapping[str, float]) -> LossSpec:
    """Look a loss up by a tenant's words and fill in its defaults.

    Raises:
        InvalidRequest: Unknown loss, unknown setting, or a setting that is not finite.
    """
    try:
        loss = LossName(name)
    except ValueError:
        known = ", ".join(sorted(LossName))
        raise InvalidRequest(f"Unknown loss {name[:60]!r}. This service has: {known}.") from None
    defaults = LOSSES[loss].defaults
    if unknown := sorted(config.keys() - defaults.keys()):
        takes = ", ".join(sorted(defaults)) or "no settings"
        raise InvalidRequest(
            f"Loss {name!r} has no setting {unknown[0][:60]!r}; it takes: {takes}."
        )
    for key, value in config.items():
        if not abs(value) < float("inf"):
            raise InvalidRequest(f"Setting {key!r} of loss {name!r} must be finite, not {value}.")
    return LossSpec(name=loss, config={**defaults, **config})
