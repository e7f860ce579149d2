"""What is given to an engine as functions, checked: as declarations, and on shapes alone before
anything is compiled."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from reprlib import repr as short
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.functions import SAMPLER, Functions
from jaxengine.models.taps import IN_LAYERS, OF_MODEL
from jaxengine.sampling import empty_state
from jaxengine.sampling.extensions import (
    Function,
    Intervention,
    LogitsProcessor,
    Row,
    Sampler,
    Token,
)

ROWS, TOKENS = 2, 64  # of the trial


def registered(processors: Any, sampler: Any, interventions: Any) -> Functions:
    """Those given to an engine, of which plain functions have no parameters.

    Raises:
        ValueError: a name that is taken, or something that is not callable.
    """
    for field, given in (("logits_processors", processors), ("interventions", interventions)):
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(f"{field}: expected a dict of name to function, got {short(given)}")
    processors, interventions = dict(processors or {}), dict(interventions or {})
    twice = [name for name in processors if name in interventions] + [
        name
        for name in (*processors, *interventions)
        if name == SAMPLER or not isinstance(name, str)
    ]
    if twice:
        raise ValueError(f"logits_processors, interventions: the name {twice[0]!r} is taken")
    return Functions(
        {
            name: _declared(f"logits_processors[{name!r}]", each, LogitsProcessor)
            for name, each in processors.items()
        },
        None if sampler is None else _declared("sampler", sampler, Sampler),
        {
            name: _declared(f"interventions[{name!r}]", each, Intervention)
            for name, each in interventions.items()
        },
    )


def _declared(where: str, given: Any, kind: type[Any]) -> Any:
    if type(given) is kind:
        return given
    if isinstance(given, Function) or not callable(given):
        raise ValueError(f"{where}: expected a {kind.__name__} or a function, got {given!r}")
    return kind(function=given)


def validate(functions: Functions, vocab_size: int, hidden_size: int, num_layers: int) -> None:
    """
    Raises:
        ValueError: a function that fails, or that returns something else than it has to.
    """
    logits = jax.ShapeDtypeStruct((ROWS, vocab_size), jnp.float32)
    drawn = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    for name, each in functions.of_logits.items():
        where = SAMPLER if name == SAMPLER else f"logits_processors[{name!r}]"
        made = drawn if name == SAMPLER else logits
        with _named(where):
            _check_function(each, logits, made, functions.defaults[name])
    for name, each in functions.interventions.items():
        with _named(f"interventions[{name!r}]"):
            _check_intervention(each, functions.defaults[name], hidden_size, num_layers)


def _check_function(
    each: LogitsProcessor,
    logits: jax.ShapeDtypeStruct,
    made: jax.ShapeDtypeStruct,
    defaults: Mapping[str, np.ndarray],
) -> None:
    """As a step calls it, on a few rows."""
    params = {name: np.stack([value] * ROWS) for name, value in defaults.items()}
    row = Row(
        tokens=jnp.zeros((ROWS, TOKENS), jnp.int32),
        length=jnp.ones(ROWS, jnp.int32),
        prompt_len=jnp.ones(ROWS, jnp.int32),
        key=jax.random.split(jax.random.key(0), ROWS),
        sampling=empty_state(ROWS, 1, 1),
    )
    call = each.over_rows(each.function)
    if each.init is None:
        _expect("it", jax.eval_shape(call, logits, params, row), made)
        return
    state = jax.eval_shape(each.over_rows(each.init), params)
    result = jax.eval_shape(call, logits, params, row, state)
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"with an init it returns what it made and the state, not {short(result)}")
    _expect("it", result[0], made)
    _expect("its state", result[1], state)
    if each.after is not None:
        drawn = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
        after = jax.eval_shape(each.over_rows(each.after), state, params, row, drawn, logits)
        _expect("after", after, state)


def _check_intervention(
    each: Intervention, defaults: Mapping[str, np.ndarray], hidden_size: int, num_layers: int
) -> None:
    if each.at not in (*OF_MODEL, *IN_LAYERS):
        raise ValueError(
            f"at: expected one of {', '.join((*OF_MODEL, *IN_LAYERS))}, got {each.at!r}"
        )
    wrong = [layer for layer in each.layers or () if layer not in range(num_layers)]
    if wrong or (each.layers is not None and each.at in OF_MODEL):
        raise ValueError(
            f"layers: expected some of 0 to {num_layers - 1}, or None at points of the whole "
            f"model, got {short(each.layers)}"
        )
    value = jax.ShapeDtypeStruct((hidden_size,), jnp.float32)
    number = jnp.zeros((), jnp.int32)
    _expect(
        "it", jax.eval_shape(each.function, value, defaults, Token(number, number, number)), value
    )


def _expect(what: str, got: Any, expected: Any) -> None:
    forms = [
        jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", t) for t in (got, expected)
    ]
    if forms[0] != forms[1]:
        raise ValueError(f"{what} returned {forms[0]}, expected {forms[1]} (of two rows)")


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors of a function say which one it is."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{where}: {error}") from error
