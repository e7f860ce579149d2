"""The open sessions of an engine, and where in one of them a request stands. For any thread; host
only."""

import threading
import uuid
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxengine.request import Request
from jaxengine.turns import Session, SessionParams, Turn


class Origin(NamedTuple):
    """What a request goes on from."""

    session: Session
    params: SessionParams
    parent: Turn | None

    def followed_by(self, ids: Sequence[Any], bos_token_id: int | None) -> Sequence[Any]:
        """The tokens of the whole prompt: those of the turns before, then `ids` without the token
        that begins a text."""
        if self.parent is None:
            return ids
        request = self.parent.request
        before = request.prompt_ids if self.params.drop_previous_output else request.token_ids
        has_bos = len(ids) > 0 and bos_token_id is not None and ids[0] == bos_token_id
        return [*before[: self.params.offset or None], *ids[int(has_bos) :]]


class Sessions:
    """One that was idle for its timeout is closed when somebody looks for any: until then it holds
    nothing but lists of tokens."""

    def __init__(self):
        self._lock = threading.Lock()
        self._open: dict[str, Session] = {}

    def open(
        self, capacity: int, session_id: str | None, is_streaming: bool, timeout: float | None
    ) -> str | None:
        """The id of a new session, or None (with a warning) where that id is taken."""
        _check(capacity, session_id, timeout)
        name = uuid.uuid4().hex if session_id is None else session_id
        with self._lock:
            self._close_expired()
            is_new = name not in self._open
            if is_new:
                self._open[name] = Session(name, capacity, is_streaming, timeout)
        if not is_new:
            warnings.warn(f"session_id: a session {name!r} is open already", stacklevel=3)
        return name if is_new else None

    def close(self, session_id: str) -> None:
        """Forgets a session; what it has under way ends as it would. Warns where there is none."""
        with self._lock:
            self._close_expired()
            session = self._open.pop(session_id, None)
        if session is None:
            warnings.warn(f"session_id: there is no open session {session_id!r}", stacklevel=3)

    def origin(self, params: SessionParams, end: Callable[[str], None]) -> Origin:
        """Where a request with these parameters goes on.

        Args:
            end: ends the request of that id and returns once it has; called for an unfinished turn
                that is to be replaced.

        Raises:
            ValueError: no such session or turn, or an unfinished one that is not to be replaced.
        """
        with self._lock:
            session = self._session(params.id)
            parent = session.parent(params)
        if parent is not None and not parent.is_finished:
            if not params.replace:
                raise ValueError(
                    f"session_params: turn {params.rid!r} is unfinished; wait for its end, or end "
                    "it with replace=True"
                )
            end(parent.request.rid)  # without the lock, as it waits
        return Origin(session, params, parent)

    def add(self, origin: Origin, requests: Sequence[Request]) -> list[str]:
        """Makes the requests turns. Returns the ids of unfinished ones that they replace.

        Raises:
            ValueError: the session or the turn to go on from is gone by now, or `Session.add` tells
                what is wrong. Then none was added.
        """
        session, params, parent = origin
        with self._lock:
            if self._session(params.id) is not session or session.parent(params) is not parent:
                raise ValueError(
                    f"session_params: session {params.id!r} changed during the call; make its "
                    "calls one after the other"
                )
            replaced = session.add(params, parent, requests)
        return [turn.request.rid for turn in replaced if not turn.is_finished]

    def forget(self, origin: Origin, requests: Sequence[Request]) -> None:
        """Takes out turns whose requests were never begun."""
        with self._lock:
            origin.session.forget(origin.parent, requests)

    def _session(self, session_id: str) -> Session:
        self._close_expired()
        if session_id not in self._open:
            raise ValueError(
                f"session_params: there is no open session {session_id!r}: it was never opened, "
                "was closed, or was idle for longer than its timeout; open_session() opens one"
            )
        return self._open[session_id]

    def _close_expired(self) -> None:
        for name in [name for name, session in self._open.items() if session.is_expired()]:
            del self._open[name]


def _check(capacity: Any, session_id: Any, timeout: Any) -> None:
    if type(capacity) is not int or capacity < 0:
        raise ValueError(
            f"capacity_of_str_len: expected a whole number, 0 for no bound, got {capacity!r}"
        )
    if session_id is not None and not isinstance(session_id, str):
        raise ValueError(f"session_id: expected a string, got {session_id!r}")
    if timeout is not None and (type(timeout) not in (int, float) or not timeout > 0):
        raise ValueError(f"timeout: expected seconds above 0, or None, got {timeout!r}")
