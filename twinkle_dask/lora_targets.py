"""Which linears an adapter is for, by PEFT's ``target_modules``: names, or a pattern of paths.

A pattern never meets ``re``, which may take for ever over one from a tenant: a small language of
regular expressions is compiled to steps that are followed all at once, so that a match takes at
most (steps times characters) whatever it says (Thompson 1968; https://swtch.com/~rsc/regexp).
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from twinkle_dask.errors import InvalidRequest

MAX_NAMES: Final = 4096
MAX_NAME_LENGTH: Final = 200
MAX_PATTERN_LENGTH: Final = 500
_MAX_STEPS: Final = 500  # for 450 paths a second at most
_MAX_WRITES: Final = 10 * _MAX_STEPS
_MAX_DEPTH: Final = 20

_Test = Callable[[str], bool]


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


_CLASSES: Final[dict[str, _Test]] = {"d": str.isdecimal, "w": _is_word, "s": str.isspace}


def is_target(path: str, name: str) -> bool:
    """Whether ``name`` is the path of a linear, or its last parts."""
    return path == name or path.endswith(f".{name}")


def named(names: Iterable[str], paths: tuple[str, ...]) -> tuple[str, ...]:
    """The paths that some of ``names`` are for, in their order.

    Raises:
        InvalidRequest: A name is for none of them.
    """
    names = tuple(names)
    known = {
        ".".join(parts[i:])
        for path in paths
        for parts in [path.split(".")]
        for i in range(len(parts))
    }
    if missing := [name for name in names if name not in known]:
        last = sorted({path.rpartition(".")[2] for path in paths})
        raise InvalidRequest(
            f"This base model has no linear module {missing[0][:MAX_NAME_LENGTH]!r} to adapt. Its "
            f"linear modules end in {', '.join(last)}."
        )
    wanted = set(names)
    return tuple(
        path
        for path in paths
        if any(".".join(path.split(".")[i:]) in wanted for i in range(path.count(".") + 1))
    )


def matching(pattern: str, paths: tuple[str, ...]) -> tuple[str, ...]:
    r"""The paths that a regular expression matches from end to end, in their order.

    It may be made of characters, ``.``, escapes (``\.``, ``\d``, ``\w``, ``\s``), sets
    (``[qkv]``, ``[^0-9]``), groups, ``|``, ``*``, ``+``, ``?`` and ``{m,n}``.

    Raises:
        InvalidRequest: It is made of something else, is too long, or matches none.
    """
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise InvalidRequest(
            f"A pattern of target modules may have {MAX_PATTERN_LENGTH} characters; give a list of "
            "names instead."
        )
    matcher = _Compiler(pattern).compiled()
    if found := tuple(path for path in paths if matcher.matches(path)):
        return found
    last = sorted({path.rpartition(".")[2] for path in paths})
    raise InvalidRequest(
        f"No linear module of this base model has a path that {pattern!r} matches from end to end. "
        f"A path is for example {paths[0] if paths else '?'!r}; they end in {', '.join(last)}."
    )


@dataclass(slots=True)
class _Step:
    """Take a character that passes ``test`` and go on; without a test, go on at each of ``to``."""

    test: _Test | None = None
    to: list[int] = field(default_factory=list[int])


@dataclass(slots=True)
class _Matcher:
    steps: list[_Step]
    start: int
    end: int

    def matches(self, text: str) -> bool:
        here = self._reached([self.start])
        for character in text:
            after: list[int] = []
            for index in here:
                step = self.steps[index]
                if step.test is not None and step.test(character):
                    after += step.to
            if not after:
                return False
            here = self._reached(after)
        return self.end in here

    def _reached(self, indices: list[int]) -> set[int]:
        """Where one can be without taking a character."""
        seen: set[int] = set()
        stack = list(indices)
        while stack:
            index = stack.pop()
            if index not in seen:
                seen.add(index)
                if self.steps[index].test is None:
                    stack += self.steps[index].to
        return seen


# A piece of a pattern writes its steps before those at an index, and tells where it begins.
_Piece = Callable[[int], int]


class _Compiler:
    """Reads a pattern from left to right; its steps are written from the end to the beginning."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0
        self._steps: list[_Step] = [_Step()]
        self._writes = 0

    def compiled(self) -> _Matcher:
        # Both ends are anchored anyway.
        if self._pattern.startswith("^"):
            self._at = 1
        piece = self._either()
        if self._next == "$" and self._at == len(self._pattern) - 1:
            self._at += 1
        if self._at != len(self._pattern):
            raise self._wrong(f"{self._next!r} stands where it has no meaning")
        return _Matcher(self._steps, piece(0), 0)

    @property
    def _next(self) -> str:
        return self._pattern[self._at] if self._at < len(self._pattern) else ""

    def _take(self) -> str:
        character = self._next
        if not character:
            raise self._wrong("it ends too early")
        self._at += 1
        return character

    def _wrong(self, why: str) -> InvalidRequest:
        return InvalidRequest(
            f"The pattern of target modules {self._pattern!r} is not understood: {why}. "
            "Characters, '.', escapes, [sets], (groups), '|', '*', '+', '?' and '{m,n}' are. A "
            "list of names is taken too."
        )

    def _step(self, step: _Step) -> int:
        if len(self._steps) >= _MAX_STEPS:
            raise self._wrong("it repeats too much")
        self._steps.append(step)
        return len(self._steps) - 1

    def _either(self) -> _Piece:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._wrong("its groups are nested too deeply")
        branches = [self._row()]
        while self._next == "|":
            self._at += 1
            branches.append(self._row())
        self._depth -= 1
        if len(branches) == 1:
            return branches[0]
        return lambda end: self._step(_Step(to=[branch(end) for branch in branches]))

    def _row(self) -> _Piece:
        pieces: list[_Piece] = []
        while self._next not in {"", "|", ")", "$"}:
            pieces.append(self._repeated(self._single()))

        def write(end: int) -> int:
            for piece in reversed(pieces):
                end = piece(end)
            return end

        return write

    def _single(self) -> _Piece:
        character = self._take()
        match character:
            case "(":
                if self._pattern.startswith("?:", self._at):
                    self._at += 2
                elif self._next == "?":
                    raise self._wrong("'(?' other than '(?:' is not taken")
                inner = self._either()
                if self._next != ")":
                    raise self._wrong("a group is not closed")
                self._at += 1
                return inner
            case "[":
                return self._taking(self._set())
            case ".":
                return self._taking(lambda c: c != "\n")
            case "\\":
                return self._taking(self._escape())
            case "*" | "+" | "?" | "{" | "^":
                raise self._wrong(f"{character!r} stands where it has no meaning")
            case _:
                return self._taking(character.__eq__)

    def _taking(self, test: _Test) -> _Piece:
        return lambda end: self._step(_Step(test, [end]))

    def _escape(self) -> _Test:
        character = self._take()
        if character in _CLASSES:
            return _CLASSES[character]
        if character.lower() in _CLASSES:
            inside = _CLASSES[character.lower()]
            return lambda c: not inside(c)
        if character.isalnum():
            raise self._wrong(f"'\\{character}' is not taken")
        return character.__eq__

    def _set(self) -> _Test:
        inverse = self._next == "^"
        self._at += inverse
        tests: list[_Test] = []
        while (character := self._take()) != "]" or not tests:
            if character == "\\":
                tests.append(self._escape())
                continue
            last = character
            if self._next == "-" and self._pattern[self._at + 1 : self._at + 2] not in {"]", ""}:
                self._at += 1
                last = self._take()
                if last == "\\" or last < character:
                    raise self._wrong("a range of a set is empty")
            tests.append(_between(character, last))
        return lambda c: any(test(c) for test in tests) != inverse

    def _repeated(self, piece: _Piece) -> _Piece:
        least, most = 1, 1
        match self._next:
            case "*":
                least, most = 0, None
            case "+":
                least, most = 1, None
            case "?":
                least, most = 0, 1
            case "{":
                least, most = self._counts()
            case _:
                return piece
        self._at += 1
        if self._next == "?":  # as few as possible: the same, from end to end
            self._at += 1
        if self._next in {"*", "+", "?", "{"} and self._next:
            raise self._wrong("what is repeated is repeated again")
        return lambda end: self._write_repeated(piece, least, most, end)

    def _write_repeated(self, piece: _Piece, least: int, most: int | None, end: int) -> int:
        start = end
        # Nothing, repeated and repeated again, makes no steps and takes as long.
        self._writes += most or least + 1
        if self._writes > _MAX_WRITES:
            raise self._wrong("it repeats too much")
        if most is None:
            start = self._step(_Step(to=[end]))
            self._steps[start].to.append(piece(start))
        else:
            for _ in range(most - least):
                start = self._step(_Step(to=[end, piece(start)]))
        for _ in range(least):
            start = piece(start)
        return start

    def _counts(self) -> tuple[int, int | None]:
        found = re.compile(r"\{(\d{1,3})(?:(,)(\d{0,3}))?\}").match(self._pattern, self._at)
        if found is None:
            raise self._wrong("'{' without numbers")
        self._at = found.end() - 1
        least = int(found[1])
        if found[2] is None:
            return least, least
        most = int(found[3]) if found[3] else None
        if most is not None and most < least:
            raise self._wrong("'{m,n}' with m above n")
        return least, most


def _between(first: str, last: str) -> _Test:
    return lambda c: first <= c <= last
