"""Text to token ids and back: encoding, the chat template, and detokenisation while ids still come.
It knows neither requests nor the model."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxengine.hub import TOKENIZER_FILES, resolve_folder

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast as Tokenizer
else:
    Encoding = Tokenizer = Any

REPLACEMENT = "\ufffd"
"""What bytes decode to that are no character, or not yet."""

CONTEXT = 8
"""Tokens of the prompt that the first new ones are decoded with."""

LONGEST_WINDOW = 16
"""Tokens that are decoded anew each time, at most (but for text that is not text)."""

MOST_WITHHELD = 64
"""Undecoded characters at the end that may still become text. Byte-level tokenizers need one, those
that fall back to bytes as many as a run of such bytes is long; more is taken for noise."""

HALF_SURROGATE = (
    "expected text, got a string with half a surrogate pair, which no encoding has; clean it with "
    "`text.encode('utf-8', 'replace').decode()`"
)

AT_ONCE = 256
"""Texts that several threads encode side by side. Until all of them are done, what is told of each
token takes a hundred times the memory of its id."""

END_OF_TURN_TOKENS = ("<|eom_id|>",)
"""Tokens that end a turn of some models though none of their files says so."""


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, download_dir: str | None = None
) -> Tokenizer:
    """The tokenizer of a local folder or hub repository, as its tokenizer.json describes it.

    Raises ValueError where the files are missing or damaged. Code in the folder is never run.
    """
    folder = resolve_folder(
        path,
        TOKENIZER_FILES,
        revision=revision,
        download_dir=download_dir,
        field="tokenizer_path",
    )
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"tokenizer_path: {folder} has no tokenizer.json; write one with transformers "
            "(`AutoTokenizer.from_pretrained(...).save_pretrained(...)`), pass another "
            "tokenizer_path, or skip_tokenizer_init=True to give and get token ids"
        )
    with _without_advice_on_torch():
        from transformers import PreTrainedTokenizerFast
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the Rust library raises nothing narrower for a damaged file
        raise ValueError(f"tokenizer_path: cannot read that of {folder} ({error})") from error
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of `text`, by default with what the tokenizer adds (a beginning-of-sequence token).

    A rendered chat has its special tokens already: give it `add_special_tokens=False`.
    """
    try:
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    except TypeError as error:
        raise ValueError(f"prompt: {HALF_SURROGATE}") from error


def encode_all(
    tokenizer: Tokenizer, texts: Iterable[str] | Iterable[tuple[str, str]]
) -> Iterator[Encoding]:
    """`ids` and `type_ids` (of a pair, 1 in the second text) of texts, or of pairs of texts put
    together as the tokenizer does it; on several threads."""
    texts = iter(texts)
    try:
        while some := list(islice(texts, AT_ONCE)):
            yield from tokenizer.backend_tokenizer.encode_batch_fast(some)
    except TypeError as error:
        raise ValueError(f"prompt: {HALF_SURROGATE}") from error


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The conversation as the model's template writes it, up to where the assistant is to speak."""
    if not tokenizer.chat_template:
        raise ValueError(
            "messages: this model has no chat template; give plain text as `prompt`, or use an "
            "instruction-tuned model"
        )
    from jinja2 import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"messages: the model's chat template refuses them ({error})") from error
    return str(rendered)


def eos_token_ids(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None,
    tokenizer: Tokenizer | None,
) -> frozenset[int]:
    """Ids that end a sequence: those that the model's files name, and the tokenizer's.

    `config` and `generation_config` are the contents of the files of those names.
    """
    ids: set[int] = set()
    for name, content in (("config", config), ("generation_config", generation_config or {})):
        named = content.get("eos_token_id")
        listed = [] if named is None else named if isinstance(named, list) else [named]
        if not all(type(token_id) is int and token_id >= 0 for token_id in listed):
            raise ValueError(f"eos_token_id in {name}.json: expected token ids, got {named!r}")
        ids.update(listed)
    if tokenizer is not None:
        vocabulary = tokenizer.backend_tokenizer
        texts = (tokenizer.eos_token, *END_OF_TURN_TOKENS)
        found = (vocabulary.token_to_id(str(text)) for text in texts if text is not None)
        ids.update(token_id for token_id in found if token_id is not None)
    return frozenset(ids)


class Detokenizer:
    """The text of one request, growing with its ids.

    Text is shown once later ids cannot change it: a character whose bytes have not all come is
    withheld. Ids one by one or all at once give the same final text, in time linear in their
    number. (Bytes that are no text are the exception, with tokenizers that fall back to bytes: how
    many replacement characters stand for them depends on when they are looked at.)

    What a token says depends on its neighbours, so a window of the last ids is decoded each time.
    It begins inside the prompt, which is how the first word keeps its leading space.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ):
        # The backend's own: transformers would tidy up spaces, across what was shown already.
        self._decode = partial(
            tokenizer.backend_tokenizer.decode, skip_special_tokens=skip_special_tokens
        )
        self._window = list(prompt_ids[-CONTEXT:])
        self._shown = self._decode(self._window)  # the window's text, as far as it was given out
        self._added: list[int] = []
        self._text = ""

    def add(self, ids: Sequence[int]) -> None:
        """Take in the next ids. They are decoded when the text is asked for."""
        self._added.extend(ids)

    @property
    def text(self) -> str:
        """What is certain so far of the text of the ids added."""
        if self._added:
            self._advance(is_last=False)
        return self._text

    def finish(self) -> str:
        """The whole text, with what was withheld; nothing may be added after."""
        self._advance(is_last=True)
        return self._text

    def _advance(self, is_last: bool) -> None:
        text = self._decode(self._window + self._added)
        if text == self._shown and text and not text.endswith(REPLACEMENT):
            self._added.clear()  # special tokens: they say nothing, now or later
            return
        self._window += self._added
        self._added.clear()
        end = len(text) if is_last else _certain_length(text)
        start = _common_length(text, self._shown)
        if end > start:
            self._text += text[start:end]
            self._shown = text[:end]
        if len(self._window) > LONGEST_WINDOW:
            self._halve_window(text)

    def _halve_window(self, text: str) -> None:
        """Drop the older half of the window, where the other half says the same without it.

        Of what remains, something must have been shown that is not a piece of a character cut in
        two: a character proper, or more than the three bytes such a piece can have.
        """
        half = self._window[len(self._window) // 2 :]
        tail = self._decode(half)
        num_shown = len(self._shown) - (len(text) - len(tail))
        is_whole = num_shown > 3 or (num_shown > 0 and tail[:num_shown].strip(REPLACEMENT))
        if is_whole and text.endswith(tail) and text.startswith(self._shown):
            self._window, self._shown = half, tail[:num_shown]


def _certain_length(text: str) -> int:
    """How much of `text` no later byte can change."""
    withheld = len(text) - len(text.rstrip(REPLACEMENT))
    return len(text) - (withheld if withheld <= MOST_WITHHELD else 3)


def _common_length(text: str, shown: str) -> int:
    """Length of the longest common beginning; nearly always that is all of `shown`."""
    if text.startswith(shown):
        return len(shown)
    pairs = zip(text, shown, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(shown)))


@contextmanager
def _without_advice_on_torch() -> Iterator[None]:
    """Keeps transformers from telling users, as it is imported, that they lack PyTorch."""
    logger = logging.getLogger("transformers")
    is_wanted = lambda record: "PyTorch was not found" not in record.getMessage()
    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)
