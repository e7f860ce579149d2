"""What `generate` is asked of hidden states, for each prompt of a call."""

from collections.abc import Mapping, Sequence
from reprlib import repr as short
from typing import Any, NamedTuple

from jaxengine.hidden_states import PlaceName, StateBooks
from jaxengine.models.taps import IN_LAYERS, OF_MODEL, hidden_state


class AskedStates(NamedTuple):
    """Of one prompt, as it was written."""

    layers: Sequence[Any] = (-1,)
    positions: Any = "all"  # or "last", or places in the sequence; below 0: from the prompt's end


def states_of(given: Any, count: int) -> list[AskedStates | None]:
    """For each of `count` prompts, of one value for all or a list of one each."""
    values = list(given) if isinstance(given, list | tuple) else [given] * count
    if len(values) != count:
        raise ValueError(f"return_hidden_states: expected {count} values, got {short(given)}")
    return [_asked(value) for value in values]


def _asked(value: Any) -> AskedStates | None:
    if value is None or value is False:
        return None
    if value is True:
        return AskedStates()
    if value == "last":
        return AskedStates(positions="last")
    if isinstance(value, Mapping) and set(value) <= set(AskedStates._fields):
        return AskedStates(**value)
    raise ValueError(
        "return_hidden_states: expected True, 'last', or a dict of `layers` and `positions`, got "
        f"{short(value)}"
    )


def books_of(asked: AskedStates, prompt_len: int, num_layers: int) -> StateBooks:
    """The books of what is asked of a prompt.

    Raises:
        ValueError: a layer or a position that there is not.
    """
    if isinstance(asked.layers, str) or not isinstance(asked.layers, Sequence) or not asked.layers:
        raise ValueError(
            f"return_hidden_states: layers: expected a list of some, got {short(asked.layers)}"
        )
    places = tuple(dict.fromkeys(_place(layer, num_layers) for layer in asked.layers))
    if asked.positions in ("all", "last"):
        return StateBooks(places=places, only_last=asked.positions == "last")
    positions = asked.positions
    if not isinstance(positions, list | tuple | range) or not all(
        type(p) is int for p in positions
    ):
        raise ValueError(
            "return_hidden_states: positions: expected 'all', 'last' or a list of ints, got "
            f"{short(positions)}"
        )
    if positions and min(positions) < -prompt_len:
        raise ValueError(
            f"return_hidden_states: positions: expected {-prompt_len} or more for a prompt of "
            f"{prompt_len}, got {min(positions)}"
        )
    absolute = {position % prompt_len if position < 0 else position for position in positions}
    return StateBooks(places=places, positions=tuple(sorted(absolute)))


def _place(layer: Any, num_layers: int) -> PlaceName:
    """Of a number as transformers counts `hidden_states`, or of `point` or `point.layer`."""
    if type(layer) is int and -num_layers - 1 <= layer <= num_layers:
        return hidden_state(layer % (num_layers + 1), num_layers)
    point, _, number = layer.partition(".") if isinstance(layer, str) else ("", "", "")
    if point in OF_MODEL and not number:
        return point, None
    if point in IN_LAYERS and number.isdigit() and int(number) < num_layers:
        return point, int(number)
    raise ValueError(
        f"return_hidden_states: layers: expected numbers from {-num_layers - 1} to {num_layers}, "
        f"{' or '.join(OF_MODEL)}, or {', '.join(IN_LAYERS)} with a layer, as 'mlp_output.0'; got "
        f"{layer!r}"
    )
