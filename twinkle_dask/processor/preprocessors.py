"""The preprocessors of the Twinkle protocol by name: a row of a known data set to a trajectory.

What each reads and makes is the protocol's; the tables in docs/processors.md list the columns.
``user_data`` is a list of (key, text) pairs, as Twinkle's own helpers write and read it.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias, cast

from pydantic import BaseModel, ConfigDict

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.processor.naming import known
from twinkle_dask.types import Json

Row: TypeAlias = Mapping[str, Any]

_GSM8K_SYSTEM: Final = (
    "Work through the math problem one step at a time. Write the final number inside \\boxed{}."
)
_BOXED_ONLY_SYSTEM: Final = (
    "Answer the math problem with nothing but its final result, written as \\boxed{...}."
)
_COUNTDOWN_SYSTEM: Final = (
    "First reason about the task to yourself, then tell the user your answer."
)
_OLYMPIAD_SYSTEM: Final = {
    "zh": "请逐步解答下面的数学或物理题。最后把答案写在 \\boxed{} 中。若有多个答案用逗号隔开。",
    "en": "Solve the mathematics or physics problem step by step and write the final answer inside "
    "\\boxed{}; separate several answers by commas.",
}


class _Arguments(BaseModel):
    """What a preprocessor may be told; unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def preprocess(self, row: Row) -> Json:
        """The new columns of one row."""
        raise NotImplementedError


def _message(role: str, content: str) -> Json:
    return {"role": role, "content": content}


def _column(row: Row, name: str) -> str:
    """A column that must be there, as text."""
    if name not in row:
        raise InvalidRequest(
            f"The rows have no column {name!r}; they have {', '.join(sorted(row)) or 'none'}."
        )
    return _text(row[name])


def _text(value: object) -> str:
    return "" if value is None else str(value)


class SelfCognitionProcessor(_Arguments):
    """``query`` and ``response``, with {{NAME}} and {{AUTHOR}} filled in."""

    model_name: str | None = None
    model_author: str | None = None

    def preprocess(self, row: Row) -> Json:
        """A system, a user and an assistant message."""
        query, response = (self._filled(_column(row, key)) for key in ("query", "response"))
        return {
            "messages": [
                _message("system", "You are a helpful assistant."),
                _message("user", query),
                _message("assistant", response),
            ]
        }

    def _filled(self, text: str) -> str:
        text = text.replace("{{NAME}}", self.model_name or "twinkle robot")
        return text.replace("{{AUTHOR}}", self.model_author or "twinkle lab")


class AlpacaProcessor(_Arguments):
    """``instruction``, ``input`` and ``output``; the first two make the question."""

    def preprocess(self, row: Row) -> Json:
        """A user and an assistant message."""
        parts = [_text(row.get("instruction"))]
        if more := _text(row.get("input")):
            parts.append(more)
        answer = _text(row.get("output"))
        return {"messages": [_message("user", "\n".join(parts)), _message("assistant", answer)]}


class CompetitionMathProcessor(_Arguments):
    """``problem`` and ``solution``."""

    def preprocess(self, row: Row) -> Json:
        """A user and an assistant message."""
        problem, solution = _column(row, "problem"), _column(row, "solution")
        return {"messages": [_message("user", problem), _message("assistant", solution)]}


class CompetitionMathGRPOProcessor(_Arguments):
    """``problem`` to be answered by the model; ``solution`` goes to ``user_data``."""

    def preprocess(self, row: Row) -> Json:
        """A system and a user message, and an assistant message with nothing in it."""
        problem, solution = _column(row, "problem"), _column(row, "solution")
        messages = [
            _message("system", _BOXED_ONLY_SYSTEM),
            _message("user", problem),
            _message("assistant", ""),
        ]
        return {"messages": messages, "user_data": [["solution", solution]]}


class GSM8KProcessor(_Arguments):
    """``question`` and ``answer``; the number behind #### is the ground truth."""

    system: str | None = None
    add_assistant: bool = False

    def preprocess(self, row: Row) -> Json:
        """A system and a user message, with the answer behind it if asked for."""
        question, answer = _column(row, "question"), _text(row.get("answer"))
        messages = [
            _message("system", _GSM8K_SYSTEM if self.system is None else self.system),
            _message("user", question),
        ]
        if self.add_assistant:
            messages.append(_message("assistant", answer))
        number = re.search(r"####\s*([-\d,.]+)", answer)
        truth = number.group(1).replace(",", "") if number else ""
        return {"messages": messages, "user_data": [["ground_truth", truth]]}


class CountdownProcessor(_Arguments):
    """``nums`` and ``response`` or ``target``: a puzzle; both go to ``user_data``."""

    def preprocess(self, row: Row) -> Json:
        """A system and a user message."""
        numbers = row.get("nums", [])
        target = row.get("response", row.get("target", 0))
        question = (
            f"The numbers are {numbers}. Combine them with +, -, * and / into an equation whose "
            f"value is {target}; no number may be used twice.\n"
            "Put your reasoning between <think> and </think>, and the equation between <answer> "
            "and </answer>, as in <answer> (1 + 2) / 3 * 4 = 4 </answer>."
        )
        messages = [_message("system", _COUNTDOWN_SYSTEM), _message("user", question)]
        # The original writes a mapping here, which its own readers of user_data cannot find.
        pairs = [["target", json.dumps(target)], ["nums", json.dumps(numbers)]]
        return {"messages": messages, "user_data": pairs}


class EmojiDPOProcessor(_Arguments):
    """A prompt with a chosen and a rejected answer."""

    system: str | None = None
    chosen_key: str = "answer_zh"
    rejected_key: str = "answer_en"
    prompt_key: str = "prompt"

    def preprocess(self, row: Row) -> Json:
        """Two trajectories, ``positive`` and ``negative``."""
        prompt = [_message("system", self.system)] if self.system else []
        prompt.append(_message("user", _text(row.get(self.prompt_key))))
        keys = {"positive": self.chosen_key, "negative": self.rejected_key}
        return {
            name: {"messages": [*prompt, _message("assistant", _text(row.get(key)))]}
            for name, key in keys.items()
        }


class OlympiadBenchProcessor(_Arguments):
    """``question`` and ``context``; ``final_answer`` is the ground truth."""

    system: str | None = None
    language: str = "zh"

    def preprocess(self, row: Row) -> Json:
        """A system and a user message."""
        if any(row.get(f"image_{i}") is not None for i in range(1, 10)):
            raise NotSupported(
                "OlympiadBenchProcessor: this server prepares text only, and some rows have "
                "images; leave them out first."
            )
        question, context = _text(row.get("question")), _text(row.get("context"))
        if context:
            question = f"背景信息\n{context}\n\n{question}"
        system = self.system
        if system is None:
            system = _OLYMPIAD_SYSTEM["zh" if self.language == "zh" else "en"]
        answer: Any = row.get("final_answer") or ""
        if isinstance(answer, list | tuple):
            answer = ", ".join(str(one).strip() for one in cast(list[Any], answer) if one)
        return {
            "messages": [_message("system", system), _message("user", question)],
            "user_data": [["ground_truth", str(answer).strip()]],
        }


PREPROCESSORS: Final[Mapping[str, type[_Arguments]]] = {
    cls.__name__: cls
    for cls in (
        SelfCognitionProcessor,
        AlpacaProcessor,
        GSM8KProcessor,
        CompetitionMathProcessor,
        CompetitionMathGRPOProcessor,
        CountdownProcessor,
        EmojiDPOProcessor,
        OlympiadBenchProcessor,
    )
}


def preprocessor(name: str, arguments: Json) -> Callable[[Row], Json]:
    """What a name and its arguments do to one row.

    Raises:
        InvalidRequest: Unknown name or arguments; the message has those there are.
        NotSupported: It makes messages with images.
    """
    if name == "CLEVRProcessor":
        raise NotSupported(
            "CLEVRProcessor makes messages with images, which this server does not prepare; map "
            "the rows in your program and send them encoded."
        )
    return known(PREPROCESSORS, "preprocessor", name, arguments).preprocess
