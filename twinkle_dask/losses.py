"""What each loss takes: its inputs, its settings and their defaults.

The formulas are in ``twinkle_dask.trainer.losses``; ``docs/losses.md`` explains them and says how
to add a loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import LossName, LossSpec

CLIP_LOW: Final = "clip_low_threshold"
CLIP_HIGH: Final = "clip_high_threshold"
SEQUENCE_RATIO_MASK: Final = "sequence_ratio_mask"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """The inputs of a loss besides ``target_tokens``, and its settings.

    Attributes:
        required: Names of inputs that must be there.
        optional: Names of inputs that may be there; where a datum leaves one out, it is the
            setting of that name, and 1 if there is no such setting.
        defaults: Every setting with its default. All settings are finite and at least 0.
        many_targets: Whether (N, K) targets make sense.
        sequence_level: Whether a token's slope depends on all logprobs of its datum, by their mean
            log ratio over ``sequence_ratio_mask``; such data are scored twice.
    """

    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset({"weights"})
    defaults: Mapping[str, float] = field(default_factory=dict[str, float])
    many_targets: bool = False
    sequence_level: bool = False

    @property
    def off_policy(self) -> bool:
        """Whether the loss knows what the sampler's logprobs were."""
        return "logprobs" in self.required

    def fill(self, name: str, config: Mapping[str, float]) -> float:
        """What stands for an optional input where a datum leaves it out."""
        return config.get(name, 1.0)


_ROLLOUT = frozenset({"logprobs", "advantages"})

LOSSES: Mapping[LossName, LossTerms] = {
    LossName.CROSS_ENTROPY: LossTerms(many_targets=True),
    LossName.IMPORTANCE_SAMPLING: LossTerms(required=_ROLLOUT),
    LossName.PPO: LossTerms(
        required=_ROLLOUT,
        optional=frozenset({"weights", CLIP_LOW, CLIP_HIGH}),
        defaults={CLIP_LOW: 0.8, CLIP_HIGH: 1.2},
    ),
    LossName.CISPO: LossTerms(
        required=_ROLLOUT,
        optional=frozenset({"weights", CLIP_LOW, CLIP_HIGH}),
        defaults={CLIP_LOW: 0.0, CLIP_HIGH: 4.0},
    ),
    # Tinker publishes no default for beta; this is the value of the example in its documentation.
    LossName.DRO: LossTerms(required=_ROLLOUT, defaults={"beta": 0.05}),
    # Nor for these; they are those of section 5.1 of https://arxiv.org/abs/2507.18071, which clips
    # by 3e-4 and 4e-4.
    LossName.GSPO: LossTerms(
        required=_ROLLOUT | {SEQUENCE_RATIO_MASK},
        optional=frozenset({"weights", CLIP_LOW, CLIP_HIGH}),
        defaults={CLIP_LOW: 1 - 3e-4, CLIP_HIGH: 1 + 4e-4},
        sequence_level=True,
    ),
    LossName.STABLE_REINFORCE: LossTerms(
        required=_ROLLOUT,
        optional=frozenset({"weights", CLIP_HIGH}),
        defaults={"kl_coeff": 0.01, CLIP_HIGH: 2.0},
    ),
}


def loss_spec(name: str, config: Mapping[str, float]) -> LossSpec:
    """Look a loss up by a tenant's words and fill in its defaults.

    Raises:
        InvalidRequest: Unknown loss, unknown setting, or a setting that makes no sense.
    """
    try:
        loss = LossName(name)
    except ValueError:
        known = ", ".join([*sorted(LossName), "custom"])
        raise InvalidRequest(f"Unknown loss {name[:60]!r}. This service has: {known}.") from None
    defaults = LOSSES[loss].defaults
    if unknown := sorted(config.keys() - defaults.keys()):
        takes = ", ".join(sorted(defaults)) or "no settings"
        raise InvalidRequest(
            f"Loss {name!r} has no setting {unknown[0][:60]!r}; it takes: {takes}."
        )
    for key, value in config.items():
        if not 0 <= value < float("inf"):
            raise InvalidRequest(
                f"Setting {key!r} of loss {name!r} must be finite and at least 0, not {value}."
            )
    spec = LossSpec(name=loss, config={**defaults, **config})
    low, high = spec.config.get(CLIP_LOW, 0.0), spec.config.get(CLIP_HIGH, 1.0)
    if high == 0 or low > high:
        raise InvalidRequest(
            f"The thresholds of loss {name!r} are bounds of the ratio itself (around 1): "
            f"{CLIP_HIGH} must be above 0 and not below {CLIP_LOW}, "
            f"but they are {high} and {low}."
        )
    return spec
