"""Rewards of the Twinkle protocol by name, where they need nothing but the text."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from pydantic import BaseModel, ConfigDict

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.processor.naming import known
from twinkle_dask.types import Json

_NUMBER_TOLERANCE: Final = 1e-5
_TAIL: Final = 500  # where an answer is looked for


class _Reward(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def score(self, trajectory: Json, truth: Json | None) -> float:
        """The reward of one trajectory."""
        raise NotImplementedError


class FormatReward(_Reward):
    """1 if the last answer has <think>...</think> and <answer>...</answer>."""

    def score(self, trajectory: Json, truth: Json | None) -> float:
        """1.0 or 0.0."""
        text = _completion(trajectory)
        return float(
            all(
                f"<{tag}>" in text and f"</{tag}>" in text.partition(f"<{tag}>")[2]
                for tag in ("think", "answer")
            )
        )


class GSM8KFormatReward(_Reward):
    r"""1 if the last answer has \boxed{...} or a number behind ####."""

    def score(self, trajectory: Json, truth: Json | None) -> float:
        """1.0 or 0.0."""
        text = _completion(trajectory)
        return float(bool(boxed(text)) or re.search(r"####\s*[-\d,.]+", text) is not None)


class GSM8KAccuracyReward(_Reward):
    """1 if the answer is the number that ``user_data`` calls ``ground_truth``."""

    def score(self, trajectory: Json, truth: Json | None) -> float:
        """1.0 or 0.0."""
        said = _number_text(_completion(trajectory)[-_TAIL:])
        right = _user_data(trajectory, "ground_truth")
        if right is None and truth is not None:
            right = _user_data(truth, "ground_truth")
        if not said or not right:
            return 0.0
        try:
            return float(abs(float(said) - float(right)) < _NUMBER_TOLERANCE)
        except ValueError:
            return float(said == right)


class MathReward(_Reward):
    """1 if the boxed answer reads like the boxed solution, LaTeX's braces aside.

    Twinkle simplifies both with sympy where it can; this compares the text, or the numbers.
    """

    ground_truth_key: str = "solution"

    def score(self, trajectory: Json, truth: Json | None) -> float:
        """1.0 or 0.0."""
        held = trajectory if truth is None else truth
        right = _user_data(held, self.ground_truth_key)
        if right is None:
            right = _completion(held)
        return float(_same(_answer(_completion(trajectory)), _answer(right)))


REWARDS: Final[Mapping[str, type[_Reward]]] = {
    cls.__name__: cls for cls in (FormatReward, GSM8KAccuracyReward, GSM8KFormatReward, MathReward)
}
_NOT_DONE: Final = frozenset(
    {
        "MultiModalAccuracyReward",
        "OlympiadBenchAccuracyReward",
        "OlympiadBenchFormatReward",
        "OlympiadBenchQualityReward",
    }
)


def reward(name: str, arguments: Json) -> _Reward:
    """A reward by its name.

    Raises:
        NotSupported: It exists in Twinkle and is not computed here.
        InvalidRequest: Unknown name or arguments.
    """
    if name in _NOT_DONE:
        raise NotSupported(
            f"{name} is not computed by this server (it has {', '.join(REWARDS)}); make it in your "
            "program."
        )
    return known(REWARDS, "reward", name, arguments)


def scores(
    name: str, arguments: Json, trajectories: Sequence[Json], truths: Sequence[Json] | None
) -> list[float]:
    """The rewards of trajectories, in their order.

    Raises:
        InvalidRequest: There are not as many truths as trajectories, or one is malformed.
    """
    made = reward(name, arguments)
    if truths is not None and len(truths) != len(trajectories):
        raise InvalidRequest(
            f"There are {len(trajectories)} trajectories and {len(truths)} ground_truths."
        )
    held: Sequence[Json | None] = [None] * len(trajectories) if truths is None else truths
    return [made.score(one, truth) for one, truth in zip(trajectories, held, strict=True)]


def boxed(text: str) -> str:
    r"""What the last \boxed{...} holds, braces within it counted; empty if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[start:end].strip()
    return ""


def _completion(trajectory: Json) -> str:
    for message in reversed(_listed(trajectory, "messages")):
        if isinstance(message, dict) and cast(Json, message).get("role") == "assistant":
            content: Any = cast(Json, message).get("content")
            return content if isinstance(content, str) else ""
    return ""


def _listed(trajectory: Json, name: str) -> list[Any]:
    held: Any = trajectory.get(name) or []
    if not isinstance(held, list | tuple):
        raise InvalidRequest(f"{name!r} of a trajectory must be a list.")
    return list(cast(list[Any], held))


def _user_data(trajectory: Json, key: str) -> str | None:
    for entry in _listed(trajectory, "user_data"):
        pair = cast(list[Any], entry) if isinstance(entry, list | tuple) else []
        if len(pair) == 2 and pair[0] == key:
            return str(pair[1])
    return None


def _number_text(text: str) -> str:
    found = boxed(text)
    if not found:
        numbers = re.findall(r"####\s*([-\d,.\s]+)", text)
        found = numbers[-1] if numbers else ""
    return found.replace(",", "").replace(" ", "").strip()


def _answer(text: str) -> str:
    if "# Answer" in text:
        text = text.split("# Answer")[1]
    return boxed(text) or text.strip()


def _same(one: str, other: str) -> bool:
    one, other = (re.sub(r"\\[()\[\]]|[{}\s$]", "", text) for text in (one, other))
    if one == other:
        return True
    try:
        return abs(float(one) - float(other)) < _NUMBER_TOLERANCE
    except ValueError:
        return False
