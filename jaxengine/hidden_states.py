"""What a request asks about hidden states, and what it was given: books of the host. Values stay
arrays of the device until somebody looks at them."""

from typing import NamedTuple


class WantedStates(NamedTuple):
    """What a step tells of hidden states. Static: another choice is another program."""

    places: tuple[tuple[str, int | None], ...]  # as `models.taps` names them
    of_inputs: bool  # of all tokens read, not of each row's last alone
