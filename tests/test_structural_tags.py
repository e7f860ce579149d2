"""Structural tags against a reading of the same rules in Python; special tokens; mistakes."""

import json
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from masks import check_masks, mask_of
from tokenizers import AddedToken

from jaxengine.matcher import Matcher, Vocabulary
from jaxengine.sampling_params import GrammarSpec
from jaxengine.structural_tags import SpecialTokens, structural_tag_grammar
from jaxengine.tokenizer import load_tokenizer

DEMO = Path(str(files("jaxengine"))) / "assets" / "demo"
COMPACT = {"whitespace_flexible": False}
EVEN = {"enum": [2, 4]}
TAG = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<f=a>", "schema": {"type": "boolean"}, "end": "</f>"},
        {"begin": "<f=b>", "schema": EVEN, "end": ""},
        {"begin": "[[", "schema": EVEN, "end": "]]"},
    ],
    "triggers": ["<f=", "[["],
}
AFTER = {"<f=": ("a>true</f>", "a>false</f>", "b>2", "b>4"), "[[": ("2]]", "4]]")}
"""What may follow each trigger."""


def _reads_tag(text: str) -> tuple[bool, bool]:
    while found := [(text.find(trigger), trigger) for trigger in AFTER if trigger in text]:
        at, trigger = min(found)
        text = text[at + len(trigger) :]
        ends = [end for end in AFTER[trigger] if text.startswith(end)]
        if not ends:
            return any(end.startswith(text) for end in AFTER[trigger]), False
        text = text[len(ends[0]) :]
    return True, True


def _compiled(vocabulary: Vocabulary, tag: Any) -> Matcher:
    return vocabulary.compile(GrammarSpec("structural_tag", json.dumps(tag))).begin()


@pytest.mark.parametrize(
    "start", ["", "x", "so <f", "[", "<f=", "<f=a", "<f=a>true</f>", "<f=b>4", "[[4]]["]
)
def test_text_is_free_until_a_trigger_forces_a_structure(start: str) -> None:
    tokenizer = load_tokenizer(DEMO)
    decode = tokenizer.backend_tokenizer.decode
    texts = [None if "\ufffd" in decode([i]) else decode([i]) for i in range(len(tokenizer))]
    matcher = _compiled(Vocabulary(tokenizer, len(texts) + 100, [0, 2], COMPACT), TAG)
    for token in tokenizer.backend_tokenizer.encode(start).ids:
        matcher.accept(token)
    check_masks(matcher, _reads_tag, texts, [0, 2], random.Random(0), text=start, max_tokens=8)


# Tokens that are no text to llguidance: of these none but <call> is special to the tokenizer.
ADDED = ["<tool>", "</tool>", "<think>", AddedToken("<call>", special=True)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = load_tokenizer(DEMO)
    tokenizer.backend_tokenizer.add_tokens(ADDED)
    return tokenizer


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Any) -> Vocabulary:
    return Vocabulary(tokenizer, len(tokenizer), [0, 2], COMPACT)


def _text_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokens of the text and of nothing else, one for each character."""
    return [tokenizer.convert_tokens_to_ids({" ": "Ġ", "\n": "Ċ"}.get(c, c)) for c in text]


TOOLS = {
    "structures": [
        {"begin": f'<tool>\n{{"name": "{name}", "arguments": ', "schema": EVEN, "end": "}\n</tool>"}
        for name in ("f", "g")
    ]
    + [{"begin": "<call>", "schema": EVEN, "end": "."}],
    "triggers": ["<tool>", "<call>"],
}


def test_a_special_token_is_a_trigger_and_is_forced_in_a_structure(
    tokenizer: Any, vocabulary: Vocabulary
) -> None:
    tool, end, think, call = (tokenizer.convert_tokens_to_ids(str(token)) for token in ADDED)
    text = lambda written: _text_tokens(tokenizer, written)
    matcher = _compiled(vocabulary, TOOLS)
    mask = mask_of(matcher, len(tokenizer))
    assert {tool, end, think, call} <= set(mask) and 1 not in mask
    begin = text('\n{"name": "f", "arguments": ')
    for token in [think, *text("so "), tool, *begin, *text("2}\n"), end, *text("bye"), call]:
        assert matcher.error is None
        matcher.accept(token)
    assert matcher.error is None and not matcher.is_stopped
    for token in [*text("4."), 2]:
        matcher.accept(token)
    assert matcher.error is None and matcher.is_stopped


def test_a_trigger_written_as_text_is_one_too(tokenizer: Any, vocabulary: Vocabulary) -> None:
    matcher = _compiled(vocabulary, TOOLS)
    for token in _text_tokens(tokenizer, "a <tool>"):
        matcher.accept(token)
    forced = tokenizer.backend_tokenizer.decode(matcher.forced_tokens())
    assert forced.startswith('\n{"name": "')


def test_the_shortest_of_several_triggers_is_the_one() -> None:
    structure = {"begin": "<fx>", "schema": EVEN, "end": ""}
    tag = {"structures": [structure], "triggers": ["<fx", "<f"]}
    special = SpecialTokens(ids={}, in_text=frozenset())
    lark = structural_tag_grammar(json.dumps(tag), special, {})
    assert 'tag0_text[lazy]: TEXT "<f"\n' in lark and "<fx" not in lark


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"triggers": "<f="}, "triggers: expected a list of non-empty strings"),
        ({"triggers": [""]}, "triggers: expected a list of non-empty strings"),
        ({"triggers": ["<f=", "[[", "x"]}, "triggers: no structure begins with 'x'"),
        ({"triggers": ["<f="]}, r"structures: '\[\[' begins with none of the triggers '<f='"),
        ({"structures": []}, "structures: expected a list of objects"),
        ({"structures": [{"begin": "<f="}]}, 'structures: expected objects of a string "begin"'),
        ({"structures": [TAG["structures"][0] | {"schema": "{}"}]}, "structures: expected objects"),
        (
            {"structures": [TAG["structures"][0] | {"schema": {"multipleOf": 62615533}}]},
            "multipleOf",
        ),
        ({"format": {}}, 'expected an object of "structures" and "triggers"'),
    ],
)
def test_mistakes_are_named(vocabulary: Vocabulary, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _compiled(vocabulary, TAG | change)


def test_a_special_token_in_the_midst_of_a_trigger_is_refused(vocabulary: Vocabulary) -> None:
    structure = {"begin": "a<call>b", "schema": EVEN, "end": ""}
    with pytest.raises(ValueError, match="triggers: 'a<call>' has the special token <call> in its"):
        _compiled(vocabulary, {"structures": [structure], "triggers": ["a<call>"]})


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"structures": [], "triggers": NaN}'])
def test_what_is_no_object_is_refused(vocabulary: Vocabulary, text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        vocabulary.compile(GrammarSpec("structural_tag", text))
