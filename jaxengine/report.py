"""An HTML report of scored or generated text: one file that needs no network.

`write_report` takes the engine's result dictionaries as they are and computes here whatever is a
number: ranks, the entropy bound, the sums. `assets/report.html` is the page; its script colours the
tokens, draws the curves, and renders a result once it is looked at. The data stands in the page as
JSON, one block for the vocabulary, one for the overview, and one for each result:

    vocabulary  [[token id, text or null, is special], ...]; the rest names tokens by place in it
    overview    [{"id", "finish", "unscored", "parts": [{"name", "preview", "tokens", ...}]}, ...]
    a result    [{"tokens", "logprobs", "ranks", "entropies", "alternatives"}, ...], columns of the
                prompt and of the output; alternatives are [] or [tokens, logprobs] per position

Logprobs are natural, and so is the entropy. JSON has no infinities: they are "inf" and "-inf".
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from jaxengine.tokenizer import REPLACEMENT

Entry = tuple[float | None, int, str | None]  # logprob, token id, text

IMPOSSIBLE = -6e4
"""Logprobs below are -inf, clamped to the least number of a dtype: that of float16 is -65504."""

NEGLIGIBLE = 1e-6
"""A rest of the probability below is what rounding in float32 leaves."""

PREVIEW_TOKENS, ESCAPE = 48, "surrogateescape"
KEYS = [f"{side}_{of}_logprobs" for of in ("token", "top") for side in ("input", "output")]
WAY_OUT = "generate with return_logprob=True, logprob_start_len=0, top_logprobs_num=10"


def write_report(
    path: str | os.PathLike[str],
    results: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    title: str | None = None,
) -> Path:
    """Write the page about one result or several of `generate`, and return where it is.

    `tokenizer` (that of transformers) gives the texts of tokens where the results hold only ids. A
    file at `path` is overwritten, but not by results that cannot be shown: ValueError.
    """
    listed = [results] if isinstance(results, Mapping) else list(results)
    if not listed:
        raise ValueError("results: expected one result of generate or several, got none")
    vocabulary = Vocabulary(tokenizer)
    overview, blocks = [], []
    for index, result in enumerate(listed):
        about, parts = _section(result, f"results[{index}]", vocabulary)
        overview.append(about)
        blocks.append(_script(parts, f"result-{index}"))
    name = title or ("1 result" if len(listed) == 1 else f"{len(listed):,} results")
    data = [_script(vocabulary.rows, "vocabulary"), _script(overview, "overview"), *blocks]
    page = (files("jaxengine") / "assets" / "report.html").read_text(encoding="utf-8")
    before, _, rest = page.partition("{{title}}")
    middle, _, after = rest.partition("{{data}}")
    heading = escape(name).encode("ascii", "xmlcharrefreplace").decode()
    text = "".join([before, heading, middle, "\n".join(data), after])
    Path(path).write_text(text, encoding="utf-8")
    return Path(path)


class Vocabulary:
    """The tokens that occur, each once, and what they say."""

    def __init__(self, tokenizer: Any):
        self.rows: list[tuple[int, str | None, int]] = []
        self._places: dict[tuple[int, str | None], int] = {}
        self._tokenizer = tokenizer
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))

    def place(self, token_id: int, given: str | None) -> int:
        """Where the token stands. An id has two places if the results give it two texts."""
        key = (token_id, given)
        if (place := self._places.get(key)) is None:
            place = self._places[key] = len(self.rows)
            text = token_text(self._tokenizer, token_id, given)
            self.rows.append((token_id, text, int(token_id in self._special)))
        return place

    def num_bytes(self, place: int) -> int | None:
        """UTF-8 bytes of the token's text: 0 of a special one, None where that is unknown."""
        _, text, is_special = self.rows[place]
        if is_special:
            return 0
        return None if text is None or REPLACEMENT in text else len(text.encode(errors=ESCAPE))

    def preview(self, places: Sequence[int]) -> str:
        """The text of tokens in a row, in which characters that they cut in two are whole again."""
        rows = [self.rows[place] for place in places]
        texts = [f"⟨{token_id}⟩" if text is None else text for token_id, text, _ in rows]
        return "".join(texts).encode(errors=ESCAPE).decode(errors="replace")


def token_text(tokenizer: Any, token_id: int, given: str | None = None) -> str | None:
    """What a token says by itself, None where nobody knows.

    Bytes that are no character are U+DC80 to U+DCFF, as Python's "surrogateescape" has them.
    `given`, the text in the results, is preferred unless such bytes are lost in it.
    """
    if given is not None:  # halves of surrogate pairs would be taken for bytes
        given = given.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if tokenizer is None or (given is not None and REPLACEMENT not in given):
        return given
    if not hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer.decode([token_id])
    piece = tokenizer.backend_tokenizer.id_to_token(token_id)
    if piece is None:
        return given  # a row of the embedding that the tokenizer does not use
    decoder = repr(tokenizer.backend_tokenizer.decoder)
    if "ByteLevel" in decoder and all(char in BYTE_OF for char in piece):
        return bytes(BYTE_OF[char] for char in piece).decode(errors=ESCAPE)
    if "ByteFallback" in decoder and re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)]).decode(errors=ESCAPE)
    # Decoded alone, a word would lose the space that it begins with.
    return piece.replace("▁", " ") if "▁" in decoder else tokenizer.decode([token_id])


# The byte that a character of a byte-level vocabulary stands for: itself where that is printable in
# Latin-1; the others are numbered from U+0100 on (as in GPT-2's, the first).
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(0x100) if byte not in PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF |= {chr(0x100 + index): byte for index, byte in enumerate(OTHERS)}


def rank(chosen: Entry, alternatives: Sequence[Entry]) -> int | None:
    """1 if no alternative is likelier than the token. One more than their number where it is not
    among them, which says "at least". None without a logprob or alternatives."""
    logprob, token_id, _ = chosen
    if logprob is None or not alternatives:
        return None
    if all(other != token_id for _, other, _ in alternatives):
        return len(alternatives) + 1
    # Its own logprob among them may be another by a rounding.
    others = [other for other, same, _ in alternatives if same != token_id]
    return 1 + sum(other is not None and other > logprob for other in others)


def entropy_bound(chosen: Entry, alternatives: Sequence[Entry]) -> float | None:
    """The least entropy, in nats, of any distribution that has these likeliest tokens.

    With p the probabilities of the alternatives and of the token itself, r = 1 - sum(p) that of all
    the others, and q that of the least likely alternative: none of the others is likelier than q,
    nor than r, so to -sum(p ln p) they add at least -r ln(min(q, r)). Exact where r is 0.
    """
    known = {token_id: logprob for logprob, token_id, _ in (*alternatives, chosen)}
    if not alternatives or None in known.values():
        return None
    p = [math.exp(min(logprob, 0.0)) for logprob in known.values() if logprob is not None]
    rest = 1 - math.fsum(p)
    entropy = -math.fsum(x * math.log(x) for x in p if x > 0)
    if rest > NEGLIGIBLE:
        least = math.exp(min(known[token_id] or 0.0 for _, token_id, _ in alternatives))
        entropy -= rest * math.log(min(least, rest) or rest)
    return max(entropy, 0.0)


def summary(logprobs: Sequence[float | None], sizes: Sequence[int | None]) -> dict[str, Any]:
    """Of the tokens of a prompt or an output: how many, and how likely they are together.

    `sizes` are their numbers of bytes. Bits per byte are over the tokens that have a logprob and
    are not special (whose size is 0), None where the text of one of them is unknown.
    """
    scored = [(x, size) for x, size in zip(logprobs, sizes, strict=True) if x is not None]
    total = math.fsum(x for x, _ in scored) if scored else None
    mean = None if total is None else total / len(scored)
    spoken = [(x, size) for x, size in scored if size != 0]
    num_bytes = sum(size or 0 for _, size in spoken)
    is_known = spoken and all(size for _, size in spoken)
    bits = -math.fsum(x for x, _ in spoken) / math.log(2) / num_bytes if is_known else None
    perplexity = None if mean is None else math.exp(-mean) if mean > -700 else math.inf
    numbers = {"sum": total, "mean": mean, "perplexity": perplexity, "bits_per_byte": bits}
    counts = {"tokens": len(logprobs), "scored": len(scored)}
    return counts | {name: _number(value) for name, value in numbers.items()}


def _section(result: Any, where: str, vocabulary: Vocabulary) -> tuple[dict, list[dict]]:
    """What the overview says of a result, and the result's own block."""
    meta = result.get("meta_info") if isinstance(result, Mapping) else None
    if not isinstance(meta, Mapping):
        raise ValueError(f"{where}: expected a dictionary of generate's, got {result!r:.80}")
    if absent := [key for key in KEYS if meta.get(key) is None]:
        raise ValueError(f"{where}: meta_info has no {', '.join(absent)}; {WAY_OUT}")
    prompt, output = (_part(name, meta, where, vocabulary) for name in ("input", "output"))
    if not result.get("output_ids") and len(output[1]["tokens"]) == 1:
        output[0]["name"] = "next"  # nothing was generated: the prediction after the prompt
    about = {
        "id": str(meta.get("id", "")),
        "finish": meta.get("finish_reason"),
        "unscored": max(int(meta.get("prompt_tokens", 0)) - len(prompt[1]["tokens"]), 0),
        "parts": [prompt[0], output[0]],
    }
    return about, [prompt[1], output[1]]


def _part(name: str, meta: Mapping, where: str, vocabulary: Vocabulary) -> tuple[dict, dict]:
    """The prompt or the output of a result: its summary and its columns."""
    tokens, tops = meta[f"{name}_token_logprobs"], meta[f"{name}_top_logprobs"]
    try:
        chosen = [_entry(entry) for entry in tokens]
        alternatives = [[_entry(entry) for entry in top or ()] for top in tops]
        pairs = list(zip(chosen, alternatives, strict=True))
    except (TypeError, ValueError) as error:
        expected = f"a (logprob, id, text) and a list of them for each token of the {name}"
        raise ValueError(f"{where}: expected {expected} ({error})") from error
    place = lambda entry: vocabulary.place(entry[1], entry[2])
    columns = {
        "tokens": [place(entry) for entry in chosen],
        "logprobs": [_number(entry[0]) for entry in chosen],
        "ranks": [rank(*pair) for pair in pairs],
        "entropies": [_number(entropy_bound(*pair)) for pair in pairs],
        "alternatives": [
            top and [list(map(place, top)), [_number(entry[0]) for entry in top]]
            for top in alternatives
        ],
    }
    sizes = [vocabulary.num_bytes(place) for place in columns["tokens"]]
    preview = vocabulary.preview(columns["tokens"][:PREVIEW_TOKENS])
    numbers = summary([entry[0] for entry in chosen], sizes)
    return {"name": name, "preview": preview} | numbers, columns


def _entry(entry: Sequence[Any]) -> Entry:
    """With -inf instead of the least number of a dtype, and None instead of NaN."""
    logprob, token_id, text = entry
    if logprob is not None and not (logprob := float(logprob)) > IMPOSSIBLE:
        logprob = None if math.isnan(logprob) else -math.inf
    return logprob, int(token_id), text


def _number(value: float | None) -> float | str | None:
    """As JSON has it."""
    return value if value is None else round(value, 4) if math.isfinite(value) else str(value)


def _script(value: Any, name: str) -> str:
    """JSON in an element that no text can end or break: ASCII without < > &."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'
