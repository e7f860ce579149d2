"""The turns of one session: requests that go on from one another, a tree by their request ids.

It knows tokens, and neither text nor pages: that the beginning of a turn is not computed again is
what the prefix tree does for every request.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxengine.request import Request

KINDS = {"id": str, "rid": str, "offset": int, "replace": bool, "drop_previous_output": bool}


@dataclass(frozen=True, kw_only=True)
class SessionParams:
    """From which turn a request goes on, and with how much of it."""

    id: str  # of the session
    rid: str | None = None  # of the turn; None: the request begins anew
    offset: int | None = None  # tokens that stay, or -n: all but the last n; None and 0: all
    replace: bool | None = None  # what went on from the turn is forgotten; without `rid`, all is
    drop_previous_output: bool | None = None  # of the turn itself only the prompt stays

    def __post_init__(self):
        for name, kind in KINDS.items():
            value = getattr(self, name)
            if type(value) is not kind and (value is not None or name == "id"):
                raise ValueError(f"session_params: {name}: expected {kind.__name__}, got {value!r}")

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "SessionParams":
        """Raises: TypeError for a name that does not exist, ValueError for a wrong value."""
        if not isinstance(given, Mapping):
            raise TypeError(f"session_params: expected a dict, got {given!r}")
        unknown = [name for name in given if name not in KINDS]
        if unknown:
            raise TypeError(
                f"session_params: got an unexpected {unknown[0]!r}; expected some of "
                f"{', '.join(KINDS)}"
            )
        return cls(**{"id": None, **given})


@dataclass(eq=False)
class Turn:
    """A request of a session, and the turns that went on from it."""

    request: Request
    children: list["Turn"] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return self.request.finish_reason is not None

    def descendants(self) -> list["Turn"]:
        found, todo = [], [*self.children]
        while todo:
            found.append(todo.pop())
            todo += found[-1].children
        return found


class Session:
    """All turns of a conversation and its branches. Not thread-safe."""

    def __init__(self, session_id: str, capacity: int, is_streaming: bool, timeout: float | None):
        self.id = session_id
        self.turns: dict[str, Turn] = {}
        self._capacity = capacity
        self._is_streaming = is_streaming
        self._timeout = timeout
        self._last_used = time.time()

    def parent(self, params: SessionParams) -> Turn | None:
        """The turn to go on from. Raises: ValueError where there is none of that name."""
        if self._is_streaming:
            return self._last(params)
        if params.rid is None:
            return None
        if params.rid not in self.turns:
            raise ValueError(
                f"session_params: session {self.id!r} has no turn {params.rid!r}; it never had, or "
                "another turn replaced it"
            )
        return self.turns[params.rid]

    def _last(self, params: SessionParams) -> Turn | None:
        """A streaming session has its last completed turn, and perhaps one under way."""
        for name in ("offset", "replace", "drop_previous_output"):
            if getattr(params, name):
                raise ValueError(
                    f"session_params: {name}: a streaming session only appends; leave it out, or "
                    "open the session without streaming"
                )
        reasons = {rid: turn.request.finish_reason for rid, turn in self.turns.items()}
        if None in reasons.values():
            raise ValueError(
                f"session_params: streaming session {self.id!r} has an unfinished turn; wait for "
                "its end or abort it"
            )
        completed = [rid for rid, reason in reasons.items() if reason and reason["type"] != "abort"]
        self.turns = {rid: self.turns[rid] for rid in completed[-1:]}
        return next(iter(self.turns.values()), None)

    def add(
        self, params: SessionParams, parent: Turn | None, requests: Sequence[Request]
    ) -> list[Turn]:
        """Makes the requests turns, and returns those that they replace.

        Raises:
            ValueError: they are too many, too long, or have the name of a turn; none was added.
        """
        replaced = []
        if params.replace:
            replaced = list(self.turns.values()) if parent is None else parent.descendants()
        kept = self.turns.keys() - {turn.request.rid for turn in replaced}
        self._check(params, requests, kept)
        for turn in replaced:
            del self.turns[turn.request.rid]
        siblings = [] if parent is None else parent.children
        if params.replace:
            siblings.clear()
        for request in requests:
            self.turns[request.rid] = Turn(request)
            siblings.append(self.turns[request.rid])
        self._last_used = time.time()
        return replaced

    def _check(self, params: SessionParams, requests: Sequence[Request], kept: set[str]) -> None:
        if len(requests) > 1 and (params.replace or self._is_streaming):
            what = "replace" if params.replace else "a streaming session"
            raise ValueError(f"session_params: {what}: expected a single prompt with n = 1")
        for request in requests:
            if request.rid in kept:
                raise ValueError(f"rid: {request.rid!r} is a turn of session {self.id!r} already")
            if self._capacity and len(request.prompt_ids) > self._capacity:
                raise ValueError(
                    f"session_params: {len(request.prompt_ids)} prompt tokens exceed the "
                    f"capacity_of_str_len = {self._capacity} of session {self.id!r}; open one with "
                    "more, or with 0 for no bound"
                )

    def forget(self, parent: Turn | None, requests: Sequence[Request]) -> None:
        """Takes out turns whose requests were never begun."""
        for request in requests:
            turn = self.turns.get(request.rid)
            if turn is not None and turn.request is request:
                del self.turns[request.rid]
                if parent is not None and turn in parent.children:
                    parent.children.remove(turn)

    def is_expired(self) -> bool:
        """Whether nothing was added and nothing ran for longer than its timeout."""
        now = time.time()
        if self._timeout is None or now - self._last_used <= self._timeout:
            return False
        ends = [turn.request.finish_time or now for turn in self.turns.values()]
        return now - max(ends, default=self._last_used) > self._timeout
