"""How one request is to be continued: every field of SGLang's sampling parameters, validated.
It imports no arrays and knows no model; `validate_for` checks what depends on a vocabulary."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

MAX_STOP_STRINGS = 32
MAX_STOP_REGEXES = 32
MAX_STOP_REGEX_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
MAX_FUNCTIONS = 64
MAX_LOGIT_BIAS = 1024
"""Entries of `logit_bias`: every running request has room for so many on the device."""

GREEDY_BELOW = 1e-6
"""A temperature below this decodes greedily."""

OTHER_SPELLINGS = {
    "best_of": "n",
    "guided_grammar": "ebnf",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "include_stop_str_in_output": "no_stop_trim",
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "num_return_sequences": "n",
    "random_seed": "sampling_seed",
    "seed": "sampling_seed",
    "stop_strings": "stop",
    "stop_words": "stop",
}
"""What other libraries call a field, so that the error can name ours."""

UNAVAILABLE = {
    "json_schema": "structured output",
    "regex": "structured output",
    "ebnf": "structured output",
    "structural_tag": "structured output",
    "beam_width": "beam search",
    "watermark": "watermarking",
}
"""Fields known by name whose feature does not exist yet: setting one is refused, never ignored."""


class DefaultLength(int):
    """`max_new_tokens` where nobody asked for any: unlike the same number written out, it gives way
    to what fits."""


DEFAULT_MAX_NEW_TOKENS = DefaultLength(128)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request. `None` for a number means its default.

    Raises ValueError naming the field, what was expected and what came.
    """

    max_new_tokens: int | None = (
        DEFAULT_MAX_NEW_TOKENS  # None: as many as context and KV pool allow
    )
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    stop_regex: str | list[str] | tuple[str, ...] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1: the whole vocabulary
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    n: int = 1
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    logits_processors: str | list[str] | tuple[str, ...] | None = None  # registered ones, by name
    interventions: str | list[str] | tuple[str, ...] | None = None
    custom_params: dict[str, Any] | None = None  # of these, and of a custom logit processor
    stream_interval: int | None = None  # None: the engine's
    logit_bias: Mapping[str | int, float] | None = None
    sampling_seed: int | None = None  # None: the engine draws one
    beam_width: int | None = None
    watermark: Any = None

    def __post_init__(self):
        self._refuse_unavailable()
        self._set_numbers()
        self._set_flags()
        self._set_stops()
        self._set_functions()
        if self.logit_bias is not None:
            self._set("logit_bias", _biases(self.logit_bias))
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: expected at most max_new_tokens = {self.max_new_tokens}, "
                f"got {self.min_new_tokens}; raise max_new_tokens"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> "SamplingParams":
        """The parameters a dictionary asks for; TypeError naming a key that is none."""
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            kind = type(values).__name__
            raise TypeError(f"sampling_params: expected a dict of parameters, got a {kind}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise TypeError(_unknown(name, known))
        return cls(**values)

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of all registered functions that it chooses."""
        return (*(self.logits_processors or ()), *(self.interventions or ()))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def validate_for(self, vocab_size: int) -> None:
        """Raises ValueError if a token id is not below `vocab_size`, the width of the logits."""
        for name in ("stop_token_ids", "logit_bias"):
            bad = [token for token in getattr(self, name) or () if token >= vocab_size]
            if bad:
                raise ValueError(
                    f"{name}: expected token ids below the vocabulary size {vocab_size}, "
                    f"got {', '.join(map(str, bad[:10]))}; remove them"
                )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _refuse_unavailable(self) -> None:
        for name, feature in UNAVAILABLE.items():
            value = getattr(self, name)
            if value is not None and value != "" and value != {} and value is not False:
                raise ValueError(f"{name}: {feature} is not available yet; leave it out")
            self._set(name, None)

    def _set_numbers(self) -> None:
        real, integer = self._set_real, self._set_integer
        integer("max_new_tokens", ">= 0", lambda v: v >= 0)
        real("temperature", ">= 0 (0 decodes greedily)", lambda v: v >= 0)
        real("top_p", "in (0, 1]", lambda v: 0 < v <= 1)
        integer("top_k", "-1 (the whole vocabulary) or >= 1", lambda v: v == -1 or v >= 1)
        real("min_p", "in [0, 1]", lambda v: 0 <= v <= 1)
        real("frequency_penalty", "in [-2, 2]", lambda v: -2 <= v <= 2)
        real("presence_penalty", "in [-2, 2]", lambda v: -2 <= v <= 2)
        real("repetition_penalty", "in (0, 2]", lambda v: 0 < v <= 2)
        integer("min_new_tokens", ">= 0", lambda v: v >= 0)
        integer("n", ">= 1", lambda v: v >= 1)
        integer("stream_interval", ">= 1", lambda v: v >= 1)
        integer("sampling_seed", "of 64 bits, signed", lambda v: -(2**63) <= v < 2**63)

    def _set_real(self, name: str, expected: str, accepts: Any) -> None:
        value = _default_of(name) if getattr(self, name) is None else getattr(self, name)
        if not _is_finite(value) or not accepts(value):
            raise ValueError(f"{name}: expected a finite number {expected}, got {value!r}")
        self._set(name, float(value))

    def _set_integer(self, name: str, expected: str, accepts: Any) -> None:
        value = getattr(self, name)
        if value is None and name != "max_new_tokens":
            value = _default_of(name)
        if value is not None:
            if not _is_integer(value) or not accepts(value):
                raise ValueError(f"{name}: expected an integer {expected}, got {value!r}")
            value = value if value is _default_of(name) else int(value)
        self._set(name, value)

    def _set_flags(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(field.default, bool):
                value = getattr(self, field.name)
                if value is not None and not isinstance(value, bool):
                    raise ValueError(f"{field.name}: expected True or False, got {value!r}")
                self._set(field.name, field.default if value is None else value)

    def _set_functions(self) -> None:
        for name in ("logits_processors", "interventions"):
            self._set(name, _strings(name, getattr(self, name), MAX_FUNCTIONS))
        params = self.custom_params
        if params is not None and not isinstance(params, Mapping):
            raise ValueError(f"custom_params: expected a dict, got {params!r}")

    def _set_stops(self) -> None:
        self._set("stop", _strings("stop", self.stop, MAX_STOP_STRINGS))
        self._set("stop_regex", _strings("stop_regex", self.stop_regex, MAX_STOP_REGEXES))
        for pattern in self.stop_regex or ():
            _check_regex(pattern)
        if self.stop_token_ids is not None:
            self._set("stop_token_ids", _stop_token_ids(self.stop_token_ids))


def _unknown(name: Any, known: list[str]) -> str:
    import difflib  # costs a millisecond that only a mistake should pay

    close = difflib.get_close_matches(str(name), known, 1)
    meant = OTHER_SPELLINGS.get(name) or (close[0] if close else None)
    way_out = f"did you mean {meant!r}?" if meant else f"expected one of {', '.join(known)}"
    return f"sampling_params: unknown parameter {name!r}; {way_out}"


def _default_of(name: str) -> Any:
    return SamplingParams.__dataclass_fields__[name].default


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def _strings(name: str, value: Any, limit: int) -> tuple[str, ...] | None:
    if value is None:
        return None
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple):
        raise ValueError(f"{name}: expected a string or a list of strings, got {value!r}")
    if len(strings) > limit:
        raise ValueError(f"{name}: expected at most {limit} strings, got {len(strings)}")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"{name}: expected non-empty strings, got {string!r}")
    return tuple(strings)


def _check_regex(pattern: str) -> None:
    size = len(pattern.encode(errors="surrogatepass"))
    if size > MAX_STOP_REGEX_BYTES:
        raise ValueError(
            f"stop_regex: expected at most {MAX_STOP_REGEX_BYTES} bytes a pattern, got {size}"
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"stop_regex: expected a Python regular expression, got {pattern!r}: {error}"
        ) from error


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise ValueError(f"stop_token_ids: expected a list of token ids, got {value!r}")
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise ValueError(
            f"stop_token_ids: expected at most {MAX_STOP_TOKEN_IDS} ids, got {len(value)}"
        )
    for token in value:
        if not _is_integer(token) or token < 0:
            raise ValueError(f"stop_token_ids: expected integers >= 0, got {token!r}")
    return tuple(int(token) for token in value)


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias: expected a dict of token id to bias, got {value!r}")
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(
            f"logit_bias: expected at most {MAX_LOGIT_BIAS} entries, got {len(value)}; "
            "bias fewer tokens"
        )
    biases: dict[int, float] = {}
    for key, bias in value.items():
        token = int(key) if _is_token_key(key) else -1
        if token < 0:
            raise ValueError(f"logit_bias: expected token ids >= 0 as keys, got {key!r}")
        if token in biases:
            raise ValueError(f"logit_bias: expected each token id once, got {key!r} again")
        if not _is_finite(bias):
            raise ValueError(f"logit_bias: expected finite numbers, got {bias!r} for {key!r}")
        biases[token] = float(bias)
    return biases


def _is_token_key(key: Any) -> bool:
    """JSON has string keys only, so decimal digits count as the integer they write."""
    is_digits = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 19
    return is_digits or _is_integer(key)
