"""EBNF against what it must and must not derive; random grammars against Python's expressions."""

import re

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxengine.ebnf import MAX_DEPTH, parse_ebnf
from jaxengine.lark import lark_grammar

BYTES = llguidance.LLTokenizer("byte")
DEEP = "(" * MAX_DEPTH + '"a"' + ")*" * MAX_DEPTH


def _derives(grammar: str, text: str) -> bool:
    lark = llguidance.LLMatcher.grammar_from_lark(lark_grammar(parse_ebnf(grammar), "root"))
    matcher = llguidance.LLMatcher(BYTES, lark, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("grammar", "derived", "others"),
    [
        ('root ::= "a" "b"', ["ab"], ["a", "b", "abb"]),
        ('root ::= "a" | "ab" "c" | "a" "bd"', ["a", "abc", "abd"], ["ab"]),
        ('root ::= [a-z]* "foo"', ["foo", "afoo", "foofoo", "fooafoo"], ["fo"]),
        ('root ::= ("a"+)? "b"{2}', ["bb", "aabb"], ["ab"]),
        ('root ::= ("a"{1,3}){2,}', ["aa", "a" * 9], ["a"]),
        ('root ::= "a"{0} "b" | "c"{ 1 , 2 }', ["b", "c", "cc"], ["ab", ""]),
        ("root ::= [^a-c]", ["d", "é", "\n"], ["a", ""]),
        ("root ::= .", ["a", "\n", "中"], ["", "aa"]),
        (r"root ::= [\]\[\^\-\\a]+", [r"][^-\a"], ["b"]),
        ("root ::= [a-]+ [&&~~]", ["a-&", "a~"], ["b&", "a"]),
        ("root ::= [^]", ["x"], [""]),
        (r'root ::= "\x41\u00e9\U0001F600\n\"\\/"', ['Aé😀\n"\\/'], ["A"]),
        ('root ::= "é😀" "<|x|> %json {} @a // #"', ["é😀<|x|> %json {} @a // #"], [""]),
        (r"root ::= [\u00e0-\u00ff]", ["é"], ["e"]),
        ('# first\nroot ::= "a" # "x"\n  | "b"\n  | (\n"c")\n', ["a", "b", "c"], ["x"]),
        ('root ::=\r\n  my-Rule myRule2\r\nmy-Rule ::= "a"\r\nmyRule2 ::= "b"', ["ab"], ["a"]),
        ('root ::= A a 1x\nA ::= "x"\na ::= "y"\n1x ::= "z"', ["xyz"], ["xx"]),
        ('root ::= start\nstart ::= "" | "a"', ["", "a"], ["b"]),
        ('root ::= "a" root "b" |', ["", "aabb"], ["a", "aab"]),
        ('root ::= root "+" root | [0-9]+ | "(" root ")"', ["1", "1+(2+3)+44"], ["1+", "(1"]),
        ('root ::= ("a" root)? "c"', ["c", "acc", "aaccc"], ["ac"]),
        ('root ::= list{0,2}\nlist ::= "[" list* "]"', ["", "[]", "[[][]][]"], ["[", "[][][]"]),
        (f"root ::= {DEEP}", ["", "aaa"], ["b"]),
        (
            """root ::= object
            object ::= "{" (pair ("," pair)*)? "}"
            pair ::= "\\"" [a-z]+ "\\":" value
            value ::= object | [0-9]+ | "null\"""",
            ["{}", '{"a":1,"b":{"c":null}}'],
            ['{"a":}', '{"a":1,}'],
        ),
    ],
)
def test_what_a_grammar_derives(grammar: str, derived: list[str], others: list[str]) -> None:
    assert [text for text in derived if not _derives(grammar, text)] == []
    assert [text for text in others if _derives(grammar, text)] == []


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("", "expected a rule `root ::= ...`, got none"),
        ('main ::= "a"', "expected a rule `root ::= ...`, got main"),
        ('\nroot = "a"', "line 2: cannot read '= \"a\"'"),
        ('"a"\nroot ::= "a"', "line 1: expected a rule, `name ::=`, got '\"a\"'"),
        ('root ::= "a"\n\n )', "line 3: expected a rule"),
        ("root ::= a\na ::= b", "line 2: rule 'b' is not defined"),
        ('root ::= "a"\nroot ::= "b"', "line 2: rule 'root' is defined twice"),
        ('root ::= "a', "line 1: cannot read"),
        ('root ::= ("a"', "line 1: this parenthesis is not closed"),
        ("root ::= *", "line 1: [*] repeats nothing"),
        ('root ::= "a"*+', "a repetition of a repetition needs parentheses"),
        ('root ::= "a"{3,2}', r"\{3,2\} ends before it begins"),
        ("root ::= [z-a]", "the range z-a ends before it begins"),
        ("root ::= []", "a class of no characters"),
        (r'root ::= "\d"', r"unknown escape \\d"),
        (r'root ::= "\ud83d"', "there is no character of code D83D"),
        (r'root ::= "\U00110000"', "there is no character of code 110000"),
        (f"root ::= ({DEEP})", "parentheses in one another"),
    ],
)
def test_a_mistake_is_told_with_its_line(grammar: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_ebnf(grammar)


def _wrapped(inner: st.SearchStrategy[tuple[str, str]]) -> st.SearchStrategy[tuple[str, str]]:
    several = st.lists(inner, min_size=2, max_size=3)
    suffixes = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,1}", "{2,}"])
    return st.one_of(
        several.map(
            lambda parts: (" ".join(f"({e})" for e, _ in parts), "".join(r for _, r in parts))
        ),
        several.map(lambda parts: (" | ".join(e for e, _ in parts), _alternatives(parts))),
        st.builds(lambda part, end: (f"({part[0]}){end}", f"(?:{part[1]}){end}"), inner, suffixes),
    )


def _alternatives(parts: list[tuple[str, str]]) -> str:
    return "(?:" + "|".join(expression for _, expression in parts) + ")"


LEAVES = st.sampled_from(
    [('"a"', "a"), ('"ab"', "ab"), ('"b"', "b"), ("[ab]", "[ab]"), ("[^a]", "[^a]"), ('""', "")]
)


@settings(max_examples=300)
@given(
    st.recursive(LEAVES, _wrapped, max_leaves=6),
    st.recursive(LEAVES, _wrapped, max_leaves=3),
    st.lists(st.text("abc", max_size=6), min_size=5, max_size=5),
)
def test_rules_without_recursion_derive_what_the_same_expression_matches(
    pair: tuple[str, str], other: tuple[str, str], texts: list[str]
) -> None:
    grammar = f'root ::= {pair[0]} | "c" other\nother ::= {other[0]}'
    expression = f"{pair[1]}|c(?:{other[1]})"
    assert [_derives(grammar, text) for text in texts] == [
        re.fullmatch(expression, text) is not None for text in texts
    ]
