"""The methods of an engine about sessions, and the call whose requests become turns of one. What a
session is stands in `sessions` and `turns`."""

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from jaxengine.delivery import Call
from jaxengine.loop import Loop
from jaxengine.sessions import Origin, Sessions
from jaxengine.turns import SessionParams

REPLACED = "replaced by another turn of its session"


class SessionMethods:
    """Of a class that has `_loop` and `_sessions`."""

    _loop: Loop
    _sessions: Sessions

    def open_session(
        self,
        capacity_of_str_len: int,
        session_id: str | None = None,
        *,
        streaming: bool = False,
        timeout: float | None = None,
    ) -> str | None:
        """Begins a conversation whose turns `generate(..., session_params={"id": ...})` adds.

        A turn's prompt is that of the turn it goes on from, its output, and the new text. A session
        holds the tokens of its turns in the host's memory until it is closed, and nothing on the
        device, where the prefix cache finds what it still has of them.

        Args:
            capacity_of_str_len: tokens that a turn's whole prompt may have (as many characters are
                no more tokens); 0: as many as the engine takes.
            session_id: its name, by default a unique one.
            streaming: a turn goes on from the last completed one, whatever its `rid` says; there is
                one at a time, and no branch. Only the last turn is kept.
            timeout: closes the session after so many seconds without a turn; None: never.

        Returns:
            Its name, or None (with a warning) where one of that name is open.

        Raises:
            ValueError: an argument that makes no sense.
        """
        return self._sessions.open(capacity_of_str_len, session_id, streaming, timeout)

    def close_session(self, session_id: str) -> None:
        """Forgets a session. A turn under way ends as it would. Warns where there is none."""
        self._sessions.close(session_id)

    def _origin(self, session_params: Mapping[str, Any] | None) -> Origin | None:
        """What the requests of a call go on from; None without a session.

        An unfinished turn that is to be replaced is ended first, which takes the rest of a step:
        its tokens are part of the prompt.
        """
        if not session_params:
            return None
        end = lambda rid: self._loop.abort([rid], REPLACED).result()
        return self._sessions.origin(SessionParams.from_dict(session_params), end)


class SessionCall(Call):
    """A call whose requests are turns of a session, unless the loop refuses them."""

    def __init__(self, sessions: Sessions, origin: Origin, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sessions = sessions
        self._origin = origin

    def start(self) -> Future:
        """Raises: ValueError where the session has changed since the call began."""
        replaced = self._sessions.add(self._origin, self.requests)
        if replaced:
            self._loop.abort(replaced, REPLACED)
        started = super().start()
        started.add_done_callback(self._forget_refused)
        return started

    def _forget_refused(self, started: Future) -> None:
        if started.cancelled() or started.exception() is not None:
            self._sessions.forget(self._origin, self.requests)
