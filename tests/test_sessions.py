"""The books of sessions: which turn goes on from which, and what is refused. No engine."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fakes import make_request

from jaxengine import turns
from jaxengine.request import Request
from jaxengine.sessions import Origin, Sessions
from jaxengine.turns import SessionParams

BOS = 100


class Conversation:
    """Sessions with requests that end when they are told to."""

    def __init__(self):
        self.sessions = Sessions()
        self.requests: dict[str, Request] = {}
        self.ended: list[str] = []

    def end(self, rid: str, output: list[int] | None = None, reason: str = "abort") -> None:
        self.ended.append(rid)
        self.requests[rid].output_ids = output or []
        self.requests[rid].finish_reason = {"type": reason}
        self.requests[rid].finish_time = turns.time.time()

    def origin(self, session_id: str | None, **params: Any) -> Origin:
        asked = SessionParams.from_dict({"id": session_id, **params})
        return self.sessions.origin(asked, self.end)

    def begin(self, session_id: str | None, name: str, ids: list[int], **params: Any) -> list[str]:
        """Adds an unfinished turn; the ids of those it aborts."""
        origin = self.origin(session_id, **params)
        self.requests[name] = make_request(origin.followed_by(ids, BOS), rid=name)
        return self.sessions.add(origin, [self.requests[name]])

    def turn(
        self, session_id: str | None, name: str, ids: list[int], output: list[int], **params: Any
    ) -> list[int]:
        """Adds a turn that ends at once, and returns its prompt."""
        self.begin(session_id, name, ids, **params)
        self.end(name, output, "length")
        return list(self.requests[name].prompt_ids)


@pytest.fixture
def talk() -> Conversation:
    return Conversation()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Lets seconds pass."""
    now = [1000.0]
    monkeypatch.setattr(turns.time, "time", lambda: now[0])
    yield lambda seconds: now.__setitem__(0, now[0] + seconds)


def open_session(talk: Conversation, **arguments: Any) -> str | None:
    defaults = {"capacity": 0, "session_id": "s", "is_streaming": False, "timeout": None}
    return talk.sessions.open(**{**defaults, **arguments})


def test_a_turn_is_what_stood_before_and_the_new_tokens(talk):
    open_session(talk)
    assert talk.turn("s", "a", [BOS, 5, 6], [7, 8]) == [BOS, 5, 6]
    assert talk.turn("s", "b", [BOS, 9], [10], rid="a") == [BOS, 5, 6, 7, 8, 9]
    assert talk.turn("s", "c", [11], [12], rid="b") == [BOS, 5, 6, 7, 8, 9, 10, 11]
    assert talk.turn("s", "d", [BOS, 2], [], rid=None) == [BOS, 2], "a second root begins anew"


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [5, 6, 7, 8, 9]),
        ({"offset": 0}, [5, 6, 7, 8, 9]),
        ({"offset": None}, [5, 6, 7, 8, 9]),
        ({"offset": 3}, [5, 6, 7, 9]),
        ({"offset": -1}, [5, 6, 7, 9]),
        ({"offset": 99}, [5, 6, 7, 8, 9]),
        ({"offset": -99}, [9]),
        ({"drop_previous_output": True}, [5, 6, 9]),
        ({"drop_previous_output": True, "offset": 1}, [5, 9]),
        ({"replace": True}, [5, 6, 7, 8, 9]),
    ],
)
def test_how_much_of_a_turn_stays(talk, params, expected):
    open_session(talk)
    talk.turn("s", "a", [5, 6], [7, 8])
    assert talk.turn("s", "b", [9], [], rid="a", **params) == expected


def test_branches_go_on_from_one_turn(talk):
    open_session(talk)
    talk.turn("s", "root", [5], [6])
    assert talk.turn("s", "left", [7], [8], rid="root") == [5, 6, 7]
    assert talk.turn("s", "right", [9], [10], rid="root") == [5, 6, 9]
    assert talk.turn("s", "leaf", [11], [], rid="left") == [5, 6, 7, 8, 11]
    origin = talk.origin("s", rid="root")
    several = [make_request([1], rid=name) for name in ("x_0", "x_1")]
    assert talk.sessions.add(origin, several) == [], "samples are branches"
    assert {"x_0", "x_1"} < origin.session.turns.keys()


def test_replacing_forgets_what_went_on_from_the_turn(talk):
    open_session(talk)
    for name, before in (("a", None), ("b", "a"), ("c", "b"), ("other", None)):
        talk.turn("s", name, [5], [6], rid=before)
    talk.turn("s", "new", [9], [], rid="a", replace=True)
    for gone in ("b", "c"):
        with pytest.raises(ValueError, match=f"has no turn '{gone}'"):
            talk.begin("s", "x", [1], rid=gone)
    assert talk.turn("s", "d", [1], [], rid="other") == [5, 6, 1], "elsewhere nothing changes"
    talk.turn("s", "only", [9], [], replace=True)
    with pytest.raises(ValueError, match="has no turn 'other'"):
        talk.begin("s", "x", [1], rid="other")


def test_replacing_names_the_unfinished_that_go(talk):
    open_session(talk)
    talk.turn("s", "a", [5], [6])
    talk.turn("s", "b", [5], [6], rid="a")
    talk.begin("s", "c", [7], rid="b")
    assert talk.begin("s", "d", [8], rid="a", replace=True) == ["c"]
    assert talk.begin("s", "e", [8], replace=True) == ["d"]


def test_an_unfinished_turn_can_be_replaced_and_not_appended_to(talk):
    open_session(talk)
    talk.begin("s", "a", [5])
    with pytest.raises(ValueError, match="turn 'a' is unfinished"):
        talk.begin("s", "b", [6], rid="a")
    assert talk.ended == []
    talk.begin("s", "b", [6], rid="a", replace=True)
    assert talk.ended == ["a"] and list(talk.requests["b"].prompt_ids) == [5, 6]


def test_turns_that_never_began_are_forgotten(talk):
    open_session(talk)
    talk.turn("s", "a", [5], [6])
    origin = talk.origin("s", rid="a")
    talk.sessions.add(origin, [make_request([1], rid="b")])
    talk.sessions.forget(origin, [make_request([1], rid="b")])
    assert "b" in origin.session.turns, "another request of that name is left alone"
    talk.sessions.forget(origin, [turn.request for turn in origin.parent.children])
    assert origin.parent.children == []
    with pytest.raises(ValueError, match="has no turn 'b'"):
        talk.origin("s", rid="b")


@pytest.mark.parametrize("kind", ["closed", "reopened", "replaced"])
def test_a_session_that_changes_meanwhile_is_noticed(talk, kind):
    open_session(talk)
    talk.turn("s", "a", [5], [6])
    talk.turn("s", "b", [5], [6], rid="a")
    origin = talk.origin("s", rid="b")
    if kind == "replaced":
        talk.turn("s", "new", [5], [6], rid="a", replace=True)
    else:
        talk.sessions.close("s")
    if kind == "reopened":
        open_session(talk)
    expected = {"closed": "no open session", "reopened": "changed", "replaced": "no turn 'b'"}
    with pytest.raises(ValueError, match=expected[kind]):
        talk.sessions.add(origin, [make_request([1], rid="c")])


def test_a_streaming_session_goes_on_from_its_last_completed_turn(talk):
    open_session(talk, is_streaming=True)
    assert talk.turn("s", "a", [BOS, 5], [6]) == [BOS, 5]
    assert talk.turn("s", "b", [BOS, 7], [8]) == [BOS, 5, 6, 7]
    talk.begin("s", "lost", [9])
    with pytest.raises(ValueError, match="has an unfinished turn"):
        talk.begin("s", "c", [9])
    talk.end("lost", [1, 2])
    assert talk.turn("s", "c", [9], [], rid="lost") == [BOS, 5, 6, 7, 8, 9], "as if never begun"
    assert list(talk.origin("s").session.turns) == ["c"], "it keeps one turn"


@pytest.mark.parametrize(
    "params", [{"replace": True}, {"offset": -1}, {"drop_previous_output": True}]
)
def test_a_streaming_session_only_appends(talk, params):
    open_session(talk, is_streaming=True)
    talk.turn("s", "a", [5], [6])
    with pytest.raises(ValueError, match=f"{next(iter(params))}: a streaming session only appends"):
        talk.begin("s", "b", [7], **params)


def test_of_threads_that_append_at_once_one_does(talk):
    open_session(talk, is_streaming=True)
    talk.turn("s", "first", [5], [6])
    at_once = threading.Barrier(16)

    def append(index: int) -> bool:
        origin = talk.origin("s")
        at_once.wait(30)
        try:
            talk.sessions.add(origin, [make_request([7], rid=str(index))])
        except ValueError as error:
            assert "has an unfinished turn" in str(error)
            return False
        return True

    with ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(append, range(16))) == 1


@pytest.mark.parametrize("where", ["streaming", "replace"])
def test_only_one_turn_at_a_time_where_another_would_undo_it(talk, where):
    open_session(talk, is_streaming=where == "streaming")
    origin = talk.origin("s", replace=where == "replace")
    with pytest.raises(ValueError, match="expected a single prompt with n = 1"):
        talk.sessions.add(origin, [make_request([1], rid=name) for name in "ab"])
    assert origin.session.turns == {}


def test_the_capacity_bounds_a_turn_s_prompt(talk):
    open_session(talk, capacity=4)
    talk.turn("s", "a", [5, 6], [7, 8])
    with pytest.raises(ValueError, match="5 prompt tokens exceed the capacity_of_str_len = 4"):
        talk.begin("s", "b", [9], rid="a")
    assert talk.turn("s", "b", [9], [], rid="a", offset=3) == [5, 6, 7, 9]


def test_the_name_of_a_turn_is_its_own(talk):
    open_session(talk)
    talk.turn("s", "a", [5], [6])
    with pytest.raises(ValueError, match="rid: 'a' is a turn of session 's' already"):
        talk.begin("s", "a", [7], rid="a")
    assert talk.turn("s", "a", [7], [], replace=True) == [7], "but of one that goes"


def test_ids_of_sessions(talk):
    names = {open_session(talk, session_id=None) for _ in range(3)}
    assert len(names) == 3 and all(isinstance(name, str) for name in names)
    assert open_session(talk) == "s"
    with pytest.warns(UserWarning, match="a session 's' is open already"):
        assert open_session(talk) is None
    talk.sessions.close("s")
    with pytest.raises(ValueError, match="no open session 's'.*open_session"):
        talk.begin("s", "a", [1])
    with pytest.warns(UserWarning, match="no open session 's'"):
        talk.sessions.close("s")
    assert open_session(talk) == "s"


def test_an_idle_session_is_closed_after_its_timeout(talk, clock):
    open_session(talk, timeout=10)
    clock(9)
    talk.turn("s", "a", [5], [6])
    clock(9)
    talk.begin("s", "b", [7], rid="a")
    clock(100)
    assert talk.origin("s", rid="a"), "a turn is under way"
    talk.end("b", [8], "length")
    clock(9)
    assert talk.origin("s", rid="b")
    clock(2)
    with pytest.raises(ValueError, match="idle for longer than its timeout"):
        talk.origin("s", rid="b")
    open_session(talk, timeout=None)
    clock(1e9)
    assert talk.origin("s")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": -1}, "capacity_of_str_len: expected a whole number"),
        ({"capacity": 1.5}, "capacity_of_str_len: expected a whole number"),
        ({"session_id": 7}, "session_id: expected a string, got 7"),
        ({"timeout": 0}, "timeout: expected seconds above 0"),
        ({"timeout": "1"}, "timeout: expected seconds above 0"),
    ],
)
def test_mistakes_in_opening_a_session(talk, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_session(talk, **arguments)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([("id", "s")], TypeError, "session_params: expected a dict"),
        (
            {"id": "s", "ofset": 1},
            TypeError,
            "unexpected 'ofset'; expected some of id, rid, offset",
        ),
        ({"rid": "a"}, ValueError, "session_params: id: expected str, got None"),
        ({"id": 1}, ValueError, "session_params: id: expected str, got 1"),
        ({"id": "s", "rid": {}}, ValueError, "session_params: rid: expected str"),
        ({"id": "s", "offset": 1.5}, ValueError, "session_params: offset: expected int, got 1.5"),
        ({"id": "s", "replace": 1}, ValueError, "session_params: replace: expected bool, got 1"),
    ],
)
def test_mistakes_in_session_params(given, error, message):
    with pytest.raises(error, match=message):
        SessionParams.from_dict(given)
