"""Stop strings and expressions: found where they are complete, cut where they begin."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxengine.stopping import REGEX_WINDOW, Stop, StopMatcher


def feed(matcher, text, size=1):
    """The stop found when `text` grows by `size` characters at a time."""
    for end in range(size, len(text) + size, size):
        stop = matcher.search(text[:end])
        if stop is not None:
            return stop
    return None


def test_the_text_is_cut_before_the_first_occurrence():
    assert StopMatcher(["END"]).search("one END two END") == Stop("END", 4)


def test_the_stop_string_is_kept_on_request():
    assert StopMatcher(["END"], no_stop_trim=True).search("one END two") == Stop("END", 7)


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4),
    size=st.integers(1, 9),
)
def test_a_stop_string_is_found_across_pieces(text, stops, size):
    matcher = StopMatcher(stops)
    stop = feed(matcher, text, size)
    assert (stop is not None) == any(string in text for string in stops)
    if stop is not None:
        assert stop.text_len == text.index(stop.matched)


@given(text=st.text("abc", max_size=30), stops=st.lists(st.text("abc", min_size=1, max_size=5)))
def test_what_is_shown_early_is_never_taken_back(text, stops):
    matcher, shown = StopMatcher(stops), 0
    for end in range(1, len(text) + 1):
        stop = matcher.search(text[:end])
        if stop is not None:
            assert stop.text_len >= shown
            return
        now = matcher.shown_len(text[:end])
        assert shown <= now <= end
        shown = now


def test_only_a_possible_beginning_is_held_back():
    matcher = StopMatcher(["\n\nUser:", "<end>"])
    assert matcher.shown_len("hello") == 5
    assert matcher.shown_len("hello\n") == 5
    assert matcher.shown_len("hello\n\nUse") == 5
    assert matcher.shown_len("hello <e") == 6
    assert StopMatcher(["<end>"], no_stop_trim=True).shown_len("hello <e") == 8
    assert StopMatcher().shown_len("anything") == 8


def test_of_two_strings_that_end_together_the_first_to_begin_is_matched():
    assert StopMatcher(["b", "ab"]).search("xab") == Stop("ab", 1)


def test_nothing_new_is_nothing_found():
    matcher = StopMatcher([], ["x*"])
    assert matcher.search("") is None
    assert matcher.search("a") == Stop("x*", 1)
    assert matcher.search("a") is None


def test_an_expression_reports_its_pattern_and_cuts_nothing():
    assert feed(StopMatcher([], [r"[.!?]\s"]), "One. Two. Three", 1) == Stop(r"[.!?]\s", 5)
    assert StopMatcher([], ["and|or"]).search("this and that") == Stop("and|or", 13)


def test_strings_come_before_expressions():
    assert StopMatcher(["two"], ["one"]).search("one two") == Stop("two", 4)


def test_an_expression_sees_a_window_of_the_text_before():
    begin = "<" + "x" * (REGEX_WINDOW - 1)
    matcher = StopMatcher([], ["<x*>"])
    assert feed(matcher, begin, len(begin)) is None
    assert matcher.search(begin + ">") is not None
    matcher = StopMatcher([], ["<x*>"])
    assert feed(matcher, begin + "x", len(begin) + 1) is None
    assert matcher.search(begin + "x>") is None


def test_an_expression_that_never_ends_is_an_error_soon():
    matcher = StopMatcher([], [r"(a|aa)+$|(a+)+b"])
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"stop_regex: .*took more than"):
        matcher.search("a" * 60 + "c")
    assert time.monotonic() - start < 5


def test_a_long_text_is_searched_in_linear_time():
    matcher = StopMatcher(["never"], ["never[0-9]"])
    text = "all the words there are " * 4000
    start = time.monotonic()
    assert feed(matcher, text, 24) is None
    assert time.monotonic() - start < 5


def test_bad_stops_are_named():
    with pytest.raises(ValueError, match=r"stop_regex: '\(' is not an expression"):
        StopMatcher([], ["("])
    with pytest.raises(ValueError, match="stop: expected non-empty"):
        StopMatcher(["a", ""])
