"""Structural tags, text that is free until a trigger appears in it, as Lark grammars of llguidance.
It knows no tokenizer: which tokens are no text it is told.

The JSON is SGLang's: `{"structures": [{"begin": "<f=add>", "schema": {...}, "end": "</f>"}],
"triggers": ["<f="]}`. After a trigger the text has to go on as one of the structures that begin so;
then it is free again. Structures may come any number of times, also never.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxengine.json_schemas import check_schema, parse_json, with_options
from jaxengine.lark import quoted

FIELDS = {"begin": str, "schema": dict, "end": str}


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Tokens that are no text to llguidance, by what they look like. Those of `in_text` may stand
    in free text nevertheless, such as `<think>`."""

    ids: Mapping[str, int]
    in_text: frozenset[int]


def structural_tag_grammar(
    text: str, special: SpecialTokens, json_options: Mapping[str, Any]
) -> str:
    """The grammar of the structural tag that is written in `text`. Raises ValueError if none is."""
    structures, triggers = _parse(text)
    writer = _Writer(special, json_options)
    for i, structure in enumerate(structures):
        # Of several that fit, the shortest has been written first.
        trigger = min((t for t in triggers if structure["begin"].startswith(t)), key=len)
        writer.add(f"tag{i}", trigger, structure)
    return writer.grammar()


class _Writer:
    def __init__(self, special: SpecialTokens, json_options: Mapping[str, Any]):
        self._special, self._json_options = special, json_options
        longest_first = sorted(special.ids, key=len, reverse=True)
        self._pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self._free_ids = set(special.in_text)
        self._tags: list[str] = []
        self._rules: list[str] = []

    def add(self, tag: str, trigger: str, structure: Mapping[str, Any]) -> None:
        begin = f"{tag}_text"
        self._rules.append(f"{begin}[lazy]: TEXT {quoted(trigger)}")
        found = re.search(self._pattern, trigger)
        if found and found.start() > 0:
            raise ValueError(
                f"triggers: {trigger!r} has the special token {found[0]} in its midst; begin the "
                "trigger with it"
            )
        if found:
            token = self._special.ids[found[0]]
            self._free_ids.discard(token)
            begin = f"({begin} | TEXT <[{token}]> {self._written(trigger[found.end() :])})"
        rest = self._written(structure["begin"][len(trigger) :])
        schema = json.dumps(with_options(structure["schema"], self._json_options))
        self._rules.append(
            f"{tag}: {begin} {rest} %json {schema} {self._written(structure['end'])}"
        )
        self._tags.append(tag)

    def grammar(self) -> str:
        free = [f"TEXT <[{token}]>" for token in sorted(self._free_ids)]
        lines = ["%llguidance {}", f"start: ({' | '.join([*self._tags, *free])})* TEXT"]
        return "\n".join([*lines, "TEXT: /(?s:.*)/", *self._rules]) + "\n"

    def _written(self, text: str) -> str:
        """`text` as strings and the special tokens between them."""
        parts = re.split(f"({self._pattern})", text)
        ids = self._special.ids
        return " ".join(f"<[{ids[p]}]>" if p in ids else quoted(p) for p in parts if p)


def _parse(text: str) -> tuple[Sequence[Mapping[str, Any]], Sequence[str]]:
    tag = parse_json(text)
    if not isinstance(tag, dict) or not tag.keys() - {"type"} == {"structures", "triggers"}:
        keys = list(tag) if isinstance(tag, dict) else tag
        raise ValueError(f'expected an object of "structures" and "triggers", got {keys!r:.100}')
    structures, triggers = tag["structures"], tag["triggers"]
    if not isinstance(triggers, list) or not all(t and isinstance(t, str) for t in triggers):
        raise ValueError(f"triggers: expected a list of non-empty strings, got {triggers!r:.100}")
    if not isinstance(structures, list) or not structures:
        raise ValueError(f"structures: expected a list of objects, got {structures!r:.100}")
    for structure in structures:
        _check_structure(structure, triggers)
    for trigger in triggers:
        if not any(structure["begin"].startswith(trigger) for structure in structures):
            raise ValueError(f"triggers: no structure begins with {trigger!r}; leave it out")
    return structures, triggers


def _check_structure(structure: Any, triggers: Sequence[str]) -> None:
    is_object = isinstance(structure, dict) and structure.keys() == FIELDS.keys()
    if not is_object or not all(isinstance(structure[key], FIELDS[key]) for key in FIELDS):
        raise ValueError(
            'structures: expected objects of a string "begin", an object "schema" and a string '
            f'"end", got {structure!r:.100}'
        )
    if not any(structure["begin"].startswith(trigger) for trigger in triggers):
        raise ValueError(
            f"structures: {structure['begin']!r} begins with none of the triggers "
            f"{', '.join(map(repr, triggers))}; add one"
        )
    check_schema(structure["schema"])
