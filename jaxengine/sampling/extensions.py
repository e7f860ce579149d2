"""Functions of a researcher's own that are compiled into every step: what they are given, and what
they are declared as. How an engine runs them is told in `jaxengine.functions`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Int, Key
from numpy.typing import ArrayLike

from jaxengine.sampling.state import SamplingState


class Row(NamedTuple):
    """One request, as a function of its logits sees it; for a `batched` one every leaf has a
    leading B."""

    tokens: Int[Array, "*B C"]  # prompt and output so far; unspecified behind `length`
    length: Int[Array, "*B"]  # of these; the position of the token to come
    prompt_len: Int[Array, "*B"]
    key: Key[Array, "*B"]  # of the request's seed and the position: equal in every run
    sampling: SamplingState  # temperature (0: greedy), top_k and so on, each a scalar


class Token(NamedTuple):
    """One token, as a function of its activations sees it."""

    position: Int[Array, ""]  # in its sequence, from 0
    prompt_len: Int[Array, ""]
    layer: Int[Array, ""]  # -1 at points that are of no layer


@dataclass(frozen=True, kw_only=True, eq=False)
class Function:
    """What is common to all kinds.

    `params` are the defaults of the numbers that a request may set in `custom_params`; they say
    which shape and kind of number each has. Another value never compiles anything.
    """

    function: Callable[..., Any]
    params: Mapping[str, ArrayLike] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitsProcessor(Function):
    """`(logits [V] float32, params, row: Row) -> logits`, after penalties, grammar and biases, and
    before temperature and the filters.

    With `init(params) -> state`, any pytree of arrays that every request has for itself, it is
    `(logits, params, row, state) -> (logits, state)`. `after(state, params, row, token, logits) ->
    state` is told which token was drawn, and from which logits. `batched` functions get all rows
    at once, `logits [B, V]` and everything else with a leading B.

    XLA may compute a value twice and round it differently, so that `x <= x.min()` holds nowhere:
    what must stay is told by its index, `x.argmin()`. A row of -inf alone ends its request.
    """

    init: Callable[..., Any] | None = None
    after: Callable[..., Any] | None = None
    batched: bool = False

    def __post_init__(self):
        if self.after is not None and self.init is None:
            raise ValueError("after: keeps a state, and there is no init that makes one")

    def over_rows(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function if self.batched else jax.vmap(function)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampler(LogitsProcessor):
    """`(logits [V], params, row) -> token`, int32, with a state `(token, state)`: draws for every
    request that is not greedy, instead of temperature, filters and the engine's own draw."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention(Function):
    """`(value [D] float32, params, token: Token) -> value`, for each token at a point of the
    forward pass.

    Points are `embedding`, `block_input`, `attention_output`, `mlp_output` and `final_norm`, as
    `jaxengine.models.taps` tells; `layers` are those it is for, by default all. A request with an
    intervention shares no prefix with others, as its K and V are its own.
    """

    at: str = "block_input"
    layers: Collection[int] | None = None
