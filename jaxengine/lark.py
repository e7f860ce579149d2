"""Rules as a Lark grammar of llguidance. It does not know in which notation they were given.

llguidance reads text as a series of lexemes, each the longest that fits: `"ab" "c" | "a" "bd"` does
not match "abd". Whatever does not recurse is therefore written as one regular expression, in which
no match is lost; lexemes end only where recursion begins.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple


class Literal(NamedTuple):
    """A string or a class of characters, as Lark writes it."""

    lark: str


class Reference(NamedTuple):
    rule: str


class Repetition(NamedTuple):
    part: "Part"
    low: int
    high: int | None  # None: no end


class Concatenation(NamedTuple):
    parts: "tuple[Part, ...]"


class Alternation(NamedTuple):
    parts: "tuple[Part, ...]"


Part = Literal | Reference | Repetition | Concatenation | Alternation

NOTHING = Literal('""')
ANY_CHARACTER = "/(?s:.)/"


def quoted(text: str) -> str:
    return json.dumps(text)


def character_class(ranges: Sequence[tuple[str, str]], *, is_negated: bool) -> str:
    """A class of the characters between the first and the last of each range, both included."""
    if not ranges:
        if is_negated:
            return ANY_CHARACTER
        raise ValueError("a class of no characters")
    for first, last in ranges:
        if last < first:
            raise ValueError(f"the range {first}-{last} ends before it begins")
    code = lambda character: f"\\x{{{ord(character):X}}}"
    listed = "".join(f"{code(first)}-{code(last)}" for first, last in ranges)
    return f"/[{'^' if is_negated else ''}{listed}]/"


def lark_grammar(rules: Mapping[str, Part], root: str) -> str:
    """The grammar that begins with the rule `root`; every rule that is named has to be there."""
    return _Writer(rules).grammar(root)


class _Writer:
    def __init__(self, rules: Mapping[str, Part]):
        self._rules = rules
        self._regular = _regular_rules(rules)
        self._names = {  # to Lark, capitals are what makes an expression of a rule
            rule: f"R{i}" if rule in self._regular else f"r{i}" for i, rule in enumerate(rules)
        }
        self._terminals: dict[str, str] = {}

    def grammar(self, root: str) -> str:
        lines = ["%llguidance {}", f"start: {self._names[root]}"]
        for rule, part in self._rules.items():
            written = self._written(part, in_terminal=rule in self._regular)
            lines.append(f"{self._names[rule]}: {written}")
        lines += [f"{name}: {written}" for written, name in self._terminals.items()]
        return "\n".join(lines) + "\n"

    def _written(self, part: Part, in_terminal: bool) -> str:
        if not in_terminal:
            if self._is_regular(part):
                return self._terminal(part)
            part = self._with_runs(part)
        match part:
            case Literal(lark):
                return lark
            case Reference(rule):
                return self._names[rule]
            case Repetition(inner, low, high):
                return f"({self._written(inner, in_terminal)}){_bounds(low, high)}"
            case Concatenation(parts):
                written = [(self._written(inner, in_terminal), inner) for inner in parts]
                return " ".join(
                    f"({text})" if isinstance(inner, Alternation) else text
                    for text, inner in written
                )
            case Alternation(parts):
                return " | ".join(self._written(inner, in_terminal) for inner in parts)

    def _with_runs(self, part: Part) -> Part:
        """`part` with neighbours that are regular taken together; alternatives have no order."""
        if not isinstance(part, Concatenation | Alternation):
            return part
        is_ordered, merged = isinstance(part, Concatenation), list[Part]()
        parts = part.parts if is_ordered else sorted(part.parts, key=self._is_regular)
        for is_regular, group in groupby(parts, self._is_regular):
            run = tuple(group)
            merged += [type(part)(run)] if is_regular and len(run) > 1 else run
        return type(part)(tuple(merged))

    def _terminal(self, part: Part) -> str:
        if isinstance(part, Reference):
            return self._names[part.rule]
        written = self._written(part, in_terminal=True)
        return self._terminals.setdefault(written, f"T{len(self._terminals)}")

    def _is_regular(self, part: Part) -> bool:
        return self._regular.issuperset(_references(part))


def _bounds(low: int, high: int | None) -> str:
    return f"{{{low},{'' if high is None else high}}}"


def _regular_rules(rules: Mapping[str, Part]) -> set[str]:
    """Those from which no recursion is reached."""
    users, num_open = defaultdict[str, list[str]](list), dict[str, int]()
    for rule, part in rules.items():
        named = set(_references(part))
        num_open[rule] = len(named)
        for other in named:
            users[other].append(rule)
    regular, todo = set[str](), [rule for rule, count in num_open.items() if count == 0]
    while todo:
        regular.add(rule := todo.pop())
        for user in users[rule]:
            num_open[user] -= 1
            if num_open[user] == 0:
                todo.append(user)
    return regular


def _references(part: Part) -> Iterator[str]:
    match part:
        case Reference(rule):
            yield rule
        case Repetition(inner):
            yield from _references(inner)
        case Concatenation(parts) | Alternation(parts):
            for inner in parts:
                yield from _references(inner)
