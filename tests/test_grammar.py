"""Masks against other readings of the same grammars; grammars that would eat the machine; the
cache; and what random tokens under masks make of random schemas."""

import json
import random
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import jsonschema
import numpy as np
import pytest
import regex
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from masks import Reading, allowed, check_masks, mask_of, walk
from tiny_tokenizers import byte_level, with_byte_fallback

from jaxengine import grammar
from jaxengine.grammar import GrammarCompiler
from jaxengine.matcher import NUM_LEXERS, Grammar, Matcher, Vocabulary
from jaxengine.sampling_params import GrammarSpec
from jaxengine.tokenizer import load_tokenizer

TOKENIZER: Any = load_tokenizer(str(files("jaxengine") / "assets" / "demo"))
V = len(TOKENIZER) + 100  # models have more rows than their tokenizer has tokens
EOS = (0, 2)
DIGITS = GrammarSpec("regex", "[0-9]+")


def _texts(tokenizer: Any) -> list[str]:
    """The text of each token after an "a"; none of special ones."""
    decode, a = tokenizer.backend_tokenizer.decode, tokenizer.convert_tokens_to_ids("a")
    return [decode([a, i])[1:] for i in range(len(tokenizer))]


TEXTS = _texts(TOKENIZER)


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(TOKENIZER, V, EOS, any_whitespace=False)
    yield compiler
    compiler.close()


def _compiled(compiler: GrammarCompiler, field: str, text: Any) -> Matcher:
    text = text if isinstance(text, str) else json.dumps(text)
    return compiler.compile(GrammarSpec(field, text)).result(60).begin()


def _expression(pattern: str) -> Reading:
    compiled = regex.compile(pattern)
    return lambda text: (
        compiled.fullmatch(text, partial=True) is not None,
        compiled.fullmatch(text) is not None,
    )


def _one_of(*texts: str) -> Reading:
    return lambda text: (any(whole.startswith(text) for whole in texts), text in texts)


def _nested_lists(text: str) -> tuple[bool, bool]:
    """Lists of digits and lists, or a digit."""
    depth, expected = 0, "value"
    for character in text:
        is_value_next = expected in ("value", "first")
        if character in "0123456789" and is_value_next:
            expected = "next" if depth else "end"
        elif character == "[" and is_value_next:
            depth, expected = depth + 1, "first"
        elif character == "]" and expected in ("first", "next"):
            depth -= 1
            expected = "next" if depth else "end"
        elif character == "," and expected == "next":
            expected = "value"
        else:
            return False, False
    return True, expected == "end"


ITEMS = ("1", "12", "true", "null")
LIST = {"type": "array", "items": {"enum": [1, 12, True, None]}, "maxItems": 2}
LISTS = ["[]", *(f"[{a}]" for a in ITEMS), *(f"[{a},{b}]" for a in ITEMS for b in ITEMS)]
PERSON = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "xy"]}, "b": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
PERSONS = [f'{{"a":"{a}"{rest}}}' for a in ("x", "xy") for rest in ("", ',"b":true', ',"b":false')]
NESTED = 'root ::= "[" (root ("," root)*)? "]" | [0-9]'
SUM = 'root ::= "x = " sum ";"?\nsum ::= number (" + " number)*\nnumber ::= [1-9] [0-9]{0,2} | "0"'


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("field", "text", "reads"),
    [
        ("regex", r"(yes|no|maybe) [0-9]{1,3}(\.[0-9])?", None),
        ("regex", "[a-z]+@[a-z]+[.](com|org)", None),
        ("regex", "^the(se|re)?$", None),
        ("json_schema", PERSON, _one_of(*PERSONS)),
        ("json_schema", LIST, _one_of(*LISTS)),
        ("ebnf", SUM, _expression(r"x = ([1-9][0-9]{0,2}|0)( \+ ([1-9][0-9]{0,2}|0))*;?")),
        ("ebnf", NESTED, _nested_lists),
    ],
)
def test_masks_allow_what_another_reading_allows(
    compiler: GrammarCompiler, field: str, text: Any, reads: Reading | None, seed: int
) -> None:
    matcher = _compiled(compiler, field, text)
    check_masks(matcher, reads or _expression(text), TEXTS, EOS, random.Random(seed))


@pytest.mark.parametrize("tokenizer", [byte_level(), with_byte_fallback()])
def test_masks_of_both_kinds_of_tokenizers(tokenizer: Any) -> None:
    eos, num_ids = tokenizer.eos_token_id, len(tokenizer) + 100
    compiler = GrammarCompiler(tokenizer, num_ids, [eos])
    spaced = _compiled(compiler, "regex", "(the|st)[a-z ]{2,6}( the)*!?")
    characters = _compiled(compiler, "regex", "[é😀ऽ]{3}")
    for seed in range(5):
        rng = random.Random(seed)
        check_masks(
            spaced.clone(),
            _expression("(the|st)[a-z ]{2,6}( the)*!?"),
            _texts(tokenizer),
            [eos],
            rng,
        )
        ids = walk(characters.clone(), num_ids, rng, max_tokens=20)
        assert regex.fullmatch("[é😀ऽ]{3}", tokenizer.backend_tokenizer.decode(ids))
    compiler.close()


DENSE, SPACED, LOOSE = '{"a":[1,{"b":null}]}', '{"a": [1, {"b": null}]}', '{ "a"\n:\t[] }'


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({}, {DENSE, SPACED, LOOSE}),
        ({"any_whitespace": False}, {DENSE}),
        ({"whitespace_pattern": " "}, {DENSE, SPACED}),
    ],
)
def test_whitespace_of_json_is_a_choice(options: dict[str, Any], accepted: set[str]) -> None:
    compiler = GrammarCompiler(TOKENIZER, V, EOS, **options)
    for text in (DENSE, SPACED, LOOSE):
        matcher = _compiled(compiler, "json_schema", "{}")
        for token in TOKENIZER.backend_tokenizer.encode(text).ids:
            matcher.accept(token)
        assert (matcher.error is None) == (text in accepted), text
    compiler.close()


def test_a_pattern_of_whitespace_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="^constrained_json_whitespace_pattern: expected a regul"):
        GrammarCompiler(TOKENIZER, V, EOS, whitespace_pattern="(")


def test_a_matcher_stops_at_the_end_and_at_an_end_of_sequence(compiler: GrammarCompiler) -> None:
    one = TOKENIZER.convert_tokens_to_ids("1")
    matcher = _compiled(compiler, "regex", "[0-9]{2}")
    matcher.accept(one)
    assert not matcher.is_stopped and not set(mask_of(matcher, V)) & set(EOS)
    matcher.accept(one)
    assert matcher.is_stopped and matcher.error is None and mask_of(matcher, V) == [*EOS]
    for eos in EOS:
        matcher = _compiled(compiler, *DIGITS)
        matcher.accept(one)
        assert not matcher.is_stopped and set(mask_of(matcher, V)) > set(EOS)
        matcher.accept(eos)
        assert matcher.is_stopped and matcher.error is None


@pytest.mark.parametrize("token", [0, 1, 300, V - 1, V + 5])
def test_a_token_that_does_not_fit_is_an_error_of_its_matcher_alone(
    compiler: GrammarCompiler, token: int
) -> None:
    wrong, right = _compiled(compiler, *DIGITS), _compiled(compiler, *DIGITS)
    wrong.accept(token)
    assert wrong.error is not None and wrong.is_stopped
    out = np.zeros((2, -(-V // 32)), np.int32)
    compiler.fill_masks([wrong, right], out)
    assert wrong.error is not None and right.error is None
    assert allowed(out[1]) == mask_of(right, V)


def test_forced_tokens_are_those_of_the_text(compiler: GrammarCompiler) -> None:
    matcher = _compiled(compiler, "regex", "(no|The import statement is) long")
    assert matcher.forced_tokens() == []
    matcher.accept(TOKENIZER.convert_tokens_to_ids("The"))
    forced = matcher.forced_tokens()
    assert TOKENIZER.backend_tokenizer.decode(forced) == " import statement is long"
    for token in forced:
        assert mask_of(matcher, V) == [token]
        matcher.accept(token)
    assert matcher.is_stopped


def test_masks_of_many_rows_are_those_of_each(compiler: GrammarCompiler) -> None:
    specs = [("regex", "[a-z ]*"), ("json_schema", "{}"), ("ebnf", NESTED), tuple(DIGITS)]
    rng, matchers = random.Random(0), list[Matcher | None]()
    for i in range(40):
        matcher = _compiled(compiler, *specs[i % 4])
        walk(matcher, V, rng, max_tokens=i % 7)
        matchers.append(None if i % 5 == 3 else matcher)
    out = np.random.default_rng(0).integers(-(2**31), 2**31, (40, -(-V // 32)), np.int32)
    compiler.fill_masks(matchers, out)
    for row, matcher in zip(out, matchers, strict=True):
        if matcher is None:
            assert (row == -1).all()
        else:
            assert allowed(row) == mask_of(matcher, V) and max(allowed(row)) < len(TOKENIZER)


@pytest.mark.parametrize(("seconds", "count"), [(60.0, NUM_LEXERS), (0.0, 1)])
def test_completions_of_a_grammar_take_turns_with_its_lexers(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, seconds: float, count: int
) -> None:
    """Where that does not take long; they allow the same."""
    monkeypatch.setattr("jaxengine.matcher.LEXER_SECONDS", seconds)
    found = compiler.compile(GrammarSpec("regex", f"[a-z]{{2,{count + 2}}}")).result(60)
    matchers = [found.begin() for _ in range(2 * count)]
    assert [each.lexer for each in matchers] == [*range(count), *range(count)]
    assert all(each.clone().lexer == each.lexer for each in matchers)
    out = np.zeros((len(matchers), -(-V // 32)), np.int32)
    for _ in range(2):
        compiler.fill_masks(matchers, out)
        assert (out == out[0]).all() and out.any()
        for each in matchers:
            each.accept(allowed(out[0])[0])


@pytest.mark.parametrize("least", [1, 100])
def test_masks_are_the_same_filled_beside(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    monkeypatch.setattr(grammar, "MIN_BESIDE", least)
    matchers = [_compiled(compiler, *DIGITS), None, _compiled(compiler, "regex", "[a-z]")]
    out, expected = (np.zeros((3, -(-V // 32)), np.int32) for _ in range(2))
    assert compiler.begin_masks(matchers, out).result(60) is None
    compiler.fill_masks(matchers, expected)
    assert (out == expected).all()
    with pytest.raises(ValueError, match="one for each of 2 rows"):
        compiler.begin_masks(matchers, out[:2]).result(60)


def test_masks_that_cannot_be_written_are_refused(compiler: GrammarCompiler) -> None:
    matcher, words = _compiled(compiler, *DIGITS), -(-V // 32)
    wrong = [np.zeros(words, np.int64), np.zeros((words, 2), np.int32)[:, 0]]
    for row in [*wrong, np.zeros(words + 1, np.int32), np.zeros(words - 1, np.int32)]:
        with pytest.raises(ValueError):
            matcher.fill(row)
    for shape in ((1, words + 1), (2, words)):
        with pytest.raises(ValueError):
            compiler.fill_masks([matcher], np.zeros(shape, np.int32))


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("regex", "(", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "[^\\s\\S]", ""),
        ("json_schema", "{", "expected JSON"),
        ("json_schema", "[]", "expected a JSON Schema, an object"),
        ("json_schema", '{"type": "object", "not": {}}', "not"),
        ("json_schema", '{"type": "foo"}', "foo"),
        ("json_schema", '{"oneOf": [{"const": 1}, {"const": 2}]}', "x-guidance.*coerce_one_of"),
        ("json_schema", '{"$ref": "#"}', "no text matches it"),
        ("json_schema", '{"enum": []}', "empty"),
        ("ebnf", "root ::= root", "no text matches it"),
        ("ebnf", "root ::= x", "line 1: rule 'x' is not defined"),
        ("structural_tag", "{}", "structures"),
    ],
)
def test_what_cannot_be_compiled_is_named_with_the_reason(
    compiler: GrammarCompiler, field: str, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{field}: .*{message}"):
        compiler.compile(GrammarSpec(field, text)).result(60)


def test_without_tokenizer_or_ends_every_grammar_is_refused() -> None:
    with pytest.raises(
        ValueError, match="^regex: structured output needs a tokenizer, .*skip_tokenizer_init"
    ):
        GrammarCompiler(None, V, EOS).compile(DIGITS)
    for size, eos, message in ((V, [V - 1], "end-of-sequence"), (1000, EOS, "vocab size")):
        future = GrammarCompiler(TOKENIZER, size, eos).compile(DIGITS)
        with pytest.raises(ValueError, match=f"^regex: .*{message}"):
            future.result(60)


# Grammars that would eat the machine.

CHAIN = "".join(f"a{i} ::= a{i + 1} | a{i + 2}\n" for i in range(900)) + 'a900 ::= "x"\n'
HOSTILE = [
    ("json_schema", '{"items":' * 25_000 + "{}" + "}" * 25_000),
    ("json_schema", {"allOf": [{"pattern": f"a{{{i},}}"} for i in range(60)]}),
    ("json_schema", {"multipleOf": 62615533}),
    ("json_schema", {"properties": {f"p{i}": {"type": "string"} for i in range(8000)}}),
    (
        "json_schema",
        {str(i): {"items": {"$ref": f"#/{i + 1}"}} for i in range(7000)} | {"$ref": "#/0"},
    ),
    ("regex", "(" * 10_000 + "a" + ")" * 10_000),
    ("regex", "(a|b|ab)?" * 3000),
    ("regex", "(?:" * 200 + "a" + "){2,3}" * 200),
    ("ebnf", "root ::= " + "(" * 10_000 + '"a"' + ")" * 10_000),
    ("ebnf", "root ::= " + "".join(f"a{i} " for i in range(5000))),
]
HEAVY = [
    ("regex", "(x{1000}){1000}"),
    ("regex", "(.*a){300}.{300}"),
    ("regex", "a?" * 2000),
    ("ebnf", "root ::= a0\n" + CHAIN + 'a901 ::= "y" root'),
    ("ebnf", "root ::= " + "x " * 2000 + '\nx ::= "a" x "b" | ""'),
    ("ebnf", 'root ::= root root | "a" | ""'),
    ("json_schema", {"type": "string", "minLength": 100_000, "pattern": "^(ab|c)*$"}),
    (
        "json_schema",
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in "ab"]} for i in range(8)]},
    ),
]


@pytest.mark.parametrize(("field", "text"), HOSTILE)
def test_a_grammar_beyond_all_limits_is_refused_in_time(
    compiler: GrammarCompiler, field: str, text: Any
) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"^{field}: "):
        _compiled(compiler, field, text)
    assert time.monotonic() - started < 2 * grammar.SECONDS


@pytest.mark.parametrize(("field", "text"), HEAVY)
def test_a_heavy_grammar_works_or_fails_by_itself_and_in_time(
    compiler: GrammarCompiler, field: str, text: Any
) -> None:
    started = time.monotonic()
    heavy, light = _compiled(compiler, field, text), _compiled(compiler, *DIGITS)
    expected, out = mask_of(light, V), np.zeros((2, -(-V // 32)), np.int32)
    for _ in range(5):
        compiler.fill_masks([heavy, light], out)
        assert allowed(out[1]) == expected and light.error is None
        if heavy.is_stopped:
            break
        heavy.accept(allowed(out[0])[-1])
    assert time.monotonic() - started < 2 * grammar.SECONDS


def test_what_never_ends_is_given_up_and_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    release, compile_really = threading.Event(), Vocabulary.compile

    def compile_slowly(self: Vocabulary, spec: GrammarSpec) -> Grammar:
        if spec.text == "never":
            release.wait(60)
        return compile_really(self, spec)

    monkeypatch.setattr(Vocabulary, "compile", compile_slowly)
    compiler = GrammarCompiler(TOKENIZER, V, EOS, seconds=1.0)
    stuck = compiler.compile(GrammarSpec("regex", "never"))
    assert compiler.compile(DIGITS).result(60).begin().error is None
    with pytest.raises(ValueError, match="^regex: compiling it took more than 1.0 s"):
        stuck.result(60)
    assert compiler.compile(GrammarSpec("regex", "never")) is stuck  # not tried again
    release.set()
    compiler.close()


# The cache.


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[GrammarSpec]:
    """What has been compiled since."""
    specs, compile_really = list[GrammarSpec](), Vocabulary.compile

    def compile_and_note(self: Vocabulary, spec: GrammarSpec) -> Grammar:
        specs.append(spec)
        return compile_really(self, spec)

    monkeypatch.setattr(Vocabulary, "compile", compile_and_note)
    return specs


def test_equal_grammars_are_compiled_once(compiled: list[GrammarSpec]) -> None:
    compiler, futures = GrammarCompiler(TOKENIZER, V, EOS), []
    ask = lambda: futures.append(compiler.compile(GrammarSpec("regex", "[0-9]+")))
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({future.result(60) for future in futures}) == 1 and len(compiled) == 1
    compiler.compile(GrammarSpec("ebnf", 'root ::= "[0-9]+"')).result(60)
    compiler.clear()
    compiler.compile(DIGITS).result(60)
    assert len(compiled) == 3
    compiler.close()


def test_the_grammars_asked_for_last_are_kept(
    monkeypatch: pytest.MonkeyPatch, compiled: list[GrammarSpec]
) -> None:
    monkeypatch.setattr(grammar, "CACHE_BYTES", 3 * grammar.LEAST_BYTES)
    compiler = GrammarCompiler(TOKENIZER, V, EOS)
    a, b, c, d = (GrammarSpec("regex", letter) for letter in "abcd")
    for spec in (a, b, c, a, d, a, b):
        compiler.compile(spec).result(60)
    assert compiled == [a, b, c, d, b]
    long = GrammarSpec("regex", "x" * (3 * grammar.LEAST_BYTES))
    for spec in (long, long, b):
        compiler.compile(spec).result(60)
    assert compiled[5:] == [long, b]
    compiler.close()


# Random schemas.

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1000, 1000),
    st.floats(-10, 10).map(lambda number: round(number, 2)),
    st.text(max_size=4),
)
BOUNDS = st.tuples(st.integers(-300, 300), st.integers(1, 300))
PATTERNS = st.sampled_from(["^[a-c]{1,3}$", "^(ab|é)+$", "x", "^$"])
LEAVES = st.one_of(
    st.sampled_from(
        [{"type": "boolean"}, {"type": "null"}, {"type": "number"}, {"type": "integer"}]
    ),
    VALUES.map(lambda value: {"const": value}),
    st.lists(VALUES, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    PATTERNS.map(lambda pattern: {"type": "string", "pattern": pattern, "maxLength": 12}),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 3),
        st.integers(0, 3),
    ),
    BOUNDS.map(lambda b: {"type": "integer", "minimum": b[0], "exclusiveMaximum": b[0] + b[1]}),
    BOUNDS.filter(lambda b: b[0] % 8 or b[1] >= 8).map(  # others are refused
        lambda b: {"type": "number", "exclusiveMinimum": b[0] / 8, "maximum": sum(b) / 8}
    ),
    st.integers(1, 30).map(lambda k: {"type": "integer", "multipleOf": k, "minimum": -k}),
)
NAMES = st.text(max_size=3)


def _nested(schemas: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    properties = st.dictionaries(NAMES, schemas, max_size=3)
    objects = properties.flatmap(
        lambda found: st.lists(st.sampled_from([*found] or [""]), unique=True).map(
            lambda required: {
                "type": "object",
                "properties": found,
                "required": [name for name in required if name in found],
                "additionalProperties": False,
            }
        )
    )
    arrays = st.builds(
        lambda items, low, more: {
            "type": "array",
            "items": items,
            "minItems": low,
            "maxItems": low + more,
        },
        schemas,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    tuples = st.lists(schemas, min_size=1, max_size=3).map(
        lambda items: {"type": "array", "prefixItems": items, "items": False}
    )
    choices = st.lists(schemas, min_size=1, max_size=3).map(lambda found: {"anyOf": found})
    return objects | arrays | tuples | choices


SCHEMAS = st.recursive(LEAVES, _nested, max_leaves=6).flatmap(
    lambda schema: st.sampled_from(
        [
            schema,
            {
                "$defs": {"a": schema},
                "type": "array",
                "items": {"$ref": "#/$defs/a"},
                "maxItems": 2,
            },
        ]
    )
)


@pytest.fixture(scope="module")
def spacious() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(TOKENIZER, V, EOS, whitespace_pattern=r"[ \n]{0,2}")
    yield compiler
    compiler.close()


@settings(max_examples=500)
@given(SCHEMAS, st.booleans(), st.integers(0, 2**32))
def test_random_tokens_under_masks_are_json_that_the_schema_accepts(
    compiler: GrammarCompiler,
    spacious: GrammarCompiler,
    schema: dict[str, Any],
    is_spacious: bool,
    seed: int,
) -> None:
    matcher = _compiled(spacious if is_spacious else compiler, "json_schema", schema)
    ids = walk(matcher, V, random.Random(seed), max_tokens=300)
    assume(matcher.is_stopped)
    text = TOKENIZER.backend_tokenizer.decode([token for token in ids if token not in EOS])
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
