"""Reads EBNF as SGLang takes it: `root ::= "a" [0-9]+ | other`, rules over several lines, comments
after `#`. It does not know what becomes of the rules."""

import re
import sys
from collections.abc import Iterator
from typing import NoReturn

from jaxengine.lark import (
    ANY_CHARACTER,
    NOTHING,
    Alternation,
    Concatenation,
    Literal,
    Part,
    Reference,
    Repetition,
    character_class,
    quoted,
)

MAX_DEPTH = 24
"""Parentheses within parentheses; llguidance allows a few more."""

TOKEN = re.compile(
    r"""(?P<space>(?:\s|\#[^\n]*)+)
    | (?P<head>[\w-]+)\s*::=
    | (?P<name>[\w-]+)
    | "(?P<literal>(?:[^"\\\n]|\\.)*)"
    | \[(?P<negation>\^?)(?P<characters>(?:[^\]\\\n]|\\.)*)\]
    | \{\s*(?P<low>\d{1,6})\s*(?P<comma>,?)\s*(?P<high>\d{0,6})\s*\}
    | (?P<mark>[*+?|().])""",
    re.VERBOSE,
)
CHARACTER = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))|(.)", re.DOTALL
)
ESCAPED = {"n": "\n", "r": "\r", "t": "\t"} | {character: character for character in "\\\"'[]^-/"}
REPETITIONS = {"*": (0, None), "+": (1, None), "?": (0, 1)}
REPEATING = (*REPETITIONS, "high")  # the last stands for bounds in braces


def parse_ebnf(text: str) -> dict[str, Part]:
    """The rules by name, `root` among them, every rule that is named defined once.

    Raises ValueError with the line where `text` is no such grammar.
    """
    return _Parser(text).rules()


class _Parser:
    def __init__(self, text: str):
        self._text = text
        self._tokens = list(self._tokenized())
        self._next = 0

    def rules(self) -> dict[str, Part]:
        rules: dict[str, Part] = {}
        while self._peek() is not None:
            head = self._take()
            if head.lastgroup != "head":
                self._fail(head.start(), f"expected a rule, `name ::=`, got {head[0]!r}")
            if head["head"] in rules:
                self._fail(head.start(), f"rule {head['head']!r} is defined twice")
            rules[head["head"]] = self._alternation(depth=0)
        for name in self._tokens:
            if name.lastgroup == "name" and name["name"] not in rules:
                self._fail(name.start(), f"rule {name['name']!r} is not defined")
        if "root" not in rules:
            raise ValueError(f"expected a rule `root ::= ...`, got {', '.join(rules) or 'none'}")
        return rules

    def _alternation(self, depth: int) -> Part:
        if depth > MAX_DEPTH:
            self._fail(
                self._tokens[self._next - 1].start(),
                f"more than {MAX_DEPTH} parentheses in one another; make rules of the inner ones",
            )
        parts = [self._concatenation(depth)]
        while self._peek() == "|":
            self._take()
            parts.append(self._concatenation(depth))
        return parts[0] if len(parts) == 1 else Alternation(tuple(parts))

    def _concatenation(self, depth: int) -> Part:
        parts = []
        while self._peek() not in (None, "head", "|", ")"):
            parts.append(self._repeated(self._single(depth)))
        if not parts:
            return NOTHING
        return parts[0] if len(parts) == 1 else Concatenation(tuple(parts))

    def _single(self, depth: int) -> Part:
        token = self._take()
        if token.lastgroup == "name":
            return Reference(token["name"])
        if token.lastgroup in ("literal", "characters"):
            try:
                return _literal(token) if token.lastgroup == "literal" else _class(token)
            except ValueError as error:
                self._fail(token.start(), f"{token[0]}: {error}")
        if token[0] == ".":
            return Literal(ANY_CHARACTER)
        if token[0] != "(":
            self._fail(token.start(), f"{token[0]} repeats nothing")
        inner = self._alternation(depth + 1)
        if self._peek() != ")":
            self._fail(token.start(), "this parenthesis is not closed")
        self._take()
        return inner

    def _repeated(self, part: Part) -> Part:
        if self._peek() not in REPEATING:
            return part
        token = self._take()
        low, high = REPETITIONS.get(token[0]) or _bounds(token)
        if high is not None and high < low:
            self._fail(token.start(), f"{token[0]} ends before it begins")
        if self._peek() in REPEATING:
            self._fail(token.start(), "a repetition of a repetition needs parentheses")
        return NOTHING if high == 0 else Repetition(part, low, high)

    def _peek(self) -> str | None:
        """The kind of the next token, the token itself if it is a mark; None at the end."""
        if self._next == len(self._tokens):
            return None
        token = self._tokens[self._next]
        return token[0] if token.lastgroup == "mark" else token.lastgroup

    def _take(self) -> re.Match[str]:
        self._next += 1
        return self._tokens[self._next - 1]

    def _tokenized(self) -> Iterator[re.Match[str]]:
        position = 0
        while position < len(self._text):
            token = TOKEN.match(self._text, position)
            if token is None:
                self._fail(position, f"cannot read {self._text[position : position + 20]!r}")
            if token.lastgroup != "space":
                yield token
            position = token.end()

    def _fail(self, position: int, reason: str) -> NoReturn:
        raise ValueError(f"line {self._text.count(chr(10), 0, position) + 1}: {reason}")


def _bounds(token: re.Match[str]) -> tuple[int, int | None]:
    low = int(token["low"])
    if token["high"]:
        return low, int(token["high"])
    return low, None if token["comma"] else low


def _literal(token: re.Match[str]) -> Literal:
    return Literal(quoted("".join(character for character, _ in _characters(token["literal"]))))


def _class(token: re.Match[str]) -> Literal:
    found = list(_characters(token["characters"]))
    ranges, i = [], 0
    while i < len(found):
        is_range = found[i + 1 : i + 2] == [("-", False)] and i + 2 < len(found)
        ranges.append((found[i][0], found[i + 2 if is_range else i][0]))
        i += 3 if is_range else 1
    return Literal(character_class(ranges, is_negated=bool(token["negation"])))


def _characters(text: str) -> Iterator[tuple[str, bool]]:
    """The characters that `text` writes, each with whether it was escaped."""
    for match in CHARACTER.finditer(text):
        digits, letter, plain = match[1] or match[2] or match[3], match[4], match[5]
        if digits is not None:
            code = int(digits, 16)
            if code > sys.maxunicode or 0xD800 <= code < 0xE000:
                raise ValueError(f"there is no character of code {code:X}")
            yield chr(code), True
        elif letter is not None:
            if letter not in ESCAPED:
                raise ValueError(f"unknown escape \\{letter}")
            yield ESCAPED[letter], True
        else:
            yield plain, False
