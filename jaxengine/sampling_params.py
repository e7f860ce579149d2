"""How one request is to be continued: every field of SGLang's sampling parameters, validated.
It imports no arrays and knows no model; `validate_for` checks what depends on a vocabulary."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxengine import sampling_values

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
    "beam_width": "beam search",
    "watermark": "watermarking",
}
"""Fields known by name whose feature does not exist yet: setting one is refused, never ignored."""

GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")
"""Fields that say what form the completion must have; one of them at most."""


class GrammarSpec(NamedTuple):
    """What form a completion must have: the name of the field that says so, and its text."""

    field: str
    text: str


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
    json_schema: str | Mapping[str, Any] | None = None  # kept as text, as are the next three
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    logits_processors: str | list[str] | tuple[str, ...] | None = None  # registered ones, by name
    interventions: str | list[str] | tuple[str, ...] | None = None
    custom_params: dict[str, Any] | None = None  # of these, and of a custom logit processor
    group: str | int | None = None  # requests of a call and of one group draw in the same steps
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
        self._set_grammars()
        if self.logit_bias is not None:
            self._set("logit_bias", sampling_values.biases(self.logit_bias))
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
        known = cls.__dataclass_fields__
        for name in values:
            if name not in known:
                raise TypeError(_unknown(name, list(known)))
        return cls(**values)

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of all registered functions that it chooses."""
        return (*(self.logits_processors or ()), *(self.interventions or ()))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def grammar(self) -> GrammarSpec | None:
        """The form that the completion must have; None: any."""
        for name in GRAMMARS:
            if (text := getattr(self, name)) is not None:
                return GrammarSpec(name, text)
        return None

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
        if not sampling_values.is_finite(value) or not accepts(value):
            raise ValueError(f"{name}: expected a finite number {expected}, got {value!r}")
        self._set(name, float(value))

    def _set_integer(self, name: str, expected: str, accepts: Any) -> None:
        value = getattr(self, name)
        if value is None and name != "max_new_tokens":
            value = _default_of(name)
        if value is not None:
            if not sampling_values.is_integer(value) or not accepts(value):
                raise ValueError(f"{name}: expected an integer {expected}, got {value!r}")
            value = value if value is _default_of(name) else int(value)
        self._set(name, value)

    def _set_flags(self) -> None:
        for name in FLAGS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise ValueError(f"{name}: expected True or False, got {value!r}")
            self._set(name, _default_of(name) if value is None else value)

    def _set_functions(self) -> None:
        for name in ("logits_processors", "interventions"):
            limit = sampling_values.MAX_FUNCTIONS
            self._set(name, sampling_values.strings(name, getattr(self, name), limit))
        params = self.custom_params
        if params is not None and not isinstance(params, Mapping):
            raise ValueError(f"custom_params: expected a dict, got {params!r}")
        if not isinstance(self.group, str | int | None):
            raise ValueError(f"group: expected a name or a number, got {self.group!r}")

    def _set_stops(self) -> None:
        for name, limit in (
            ("stop", sampling_values.MAX_STOP_STRINGS),
            ("stop_regex", sampling_values.MAX_STOP_REGEXES),
        ):
            self._set(name, sampling_values.strings(name, getattr(self, name), limit))
        for pattern in self.stop_regex or ():
            sampling_values.check_regex(pattern)
        if self.stop_token_ids is not None:
            self._set("stop_token_ids", sampling_values.stop_token_ids(self.stop_token_ids))

    def _set_grammars(self) -> None:
        for name in GRAMMARS:
            self._set(name, sampling_values.grammar(name, getattr(self, name)))
        given = [name for name in GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{given[1]}: expected at most one of {', '.join(GRAMMARS)}, got "
                f"{' and '.join(given)}; leave out all but one"
            )


FLAGS = tuple(
    field.name for field in dataclasses.fields(SamplingParams) if isinstance(field.default, bool)
)


def _unknown(name: Any, known: list[str]) -> str:
    import difflib  # costs a millisecond that only a mistake should pay

    close = difflib.get_close_matches(str(name), known, 1)
    meant = OTHER_SPELLINGS.get(name) or (close[0] if close else None)
    way_out = f"did you mean {meant!r}?" if meant else f"expected one of {', '.join(known)}"
    return f"sampling_params: unknown parameter {name!r}; {way_out}"


def _default_of(name: str) -> Any:
    return SamplingParams.__dataclass_fields__[name].default
