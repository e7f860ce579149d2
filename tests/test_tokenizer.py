"""Encoding, templates, end-of-sequence ids; and text that grows with no letter wrong."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import TEMPLATE, byte_level, with_byte_fallback

from jaxengine.tokenizer import (
    AT_ONCE,
    Detokenizer,
    encode,
    encode_all,
    eos_token_ids,
    load_tokenizer,
    render_chat,
)

WORDS = "naïve 😀👩‍👩‍👧 日本語 the import statement, don't  stop\n\tऽ é \ufffd end"


BYTES = byte_level()
FALLBACK = with_byte_fallback()
EOS = BYTES.backend_tokenizer.token_to_id("<eos>")


def stepwise(tokenizer, ids, prompt_ids=(), chunk=1, **kwargs):
    """The final text when ids come in pieces; each text on the way must begin the next."""
    detokenizer = Detokenizer(tokenizer, prompt_ids, **kwargs)
    before = ""
    for begin in range(0, len(ids), chunk):
        detokenizer.add(ids[begin : begin + chunk])
        assert detokenizer.text.startswith(before)
        before = detokenizer.text
    whole = detokenizer.finish()
    assert whole.startswith(before)
    return whole


def at_once(tokenizer, ids, prompt_ids=(), **kwargs):
    detokenizer = Detokenizer(tokenizer, prompt_ids, **kwargs)
    detokenizer.add(ids)
    return detokenizer.finish()


def plain(tokenizer, ids, skip_special_tokens=True):
    return tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


byte_ids = st.one_of(
    st.lists(st.integers(0, 261), max_size=120),
    st.lists(
        st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0xE4, 0xBD, 0xFF, 0x41, 259, EOS]), max_size=200
    ),
    st.text(max_size=40).map(lambda text: encode(BYTES, text, add_special_tokens=False)),
)


@settings(max_examples=300)
@given(ids=byte_ids, skips=st.booleans())
def test_one_by_one_all_at_once_and_decoded_whole_are_the_same_text(ids, skips):
    whole = plain(BYTES, ids, skips)
    assert stepwise(BYTES, ids, skip_special_tokens=skips) == whole
    assert at_once(BYTES, ids, skip_special_tokens=skips) == whole


@given(ids=byte_ids, chunk=st.integers(1, 50))
def test_the_size_of_the_pieces_makes_no_difference(ids, chunk):
    assert stepwise(BYTES, ids, chunk=chunk) == plain(BYTES, ids)


@given(prompt=st.text(max_size=20), text=st.text(min_size=1, max_size=60))
def test_the_text_of_a_continuation_is_what_the_prompt_lacks(prompt, text):
    prompt_ids = encode(BYTES, prompt)
    ids = encode(BYTES, text, add_special_tokens=False)
    assert stepwise(BYTES, ids, prompt_ids) == at_once(BYTES, ids, prompt_ids) == text


@given(text=st.text("the stop, a é😀日ཀྵ ", min_size=1, max_size=60))
def test_byte_fallback_keeps_the_leading_space_and_every_character(text):
    prompt_ids = encode(FALLBACK, "the")
    ids = encode(FALLBACK, "the" + text)[len(prompt_ids) :]
    whole = FALLBACK.backend_tokenizer.decode(prompt_ids + ids)
    assert stepwise(FALLBACK, ids, prompt_ids) == whole[len("the") :]
    assert at_once(FALLBACK, ids, prompt_ids) == whole[len("the") :]


@given(ids=st.lists(st.integers(0, len(FALLBACK) - 1), max_size=80))
def test_noise_of_a_byte_fallback_tokenizer_does_no_harm(ids):
    stepwise(FALLBACK, ids, [1])


def test_half_a_character_is_withheld_until_it_is_whole():
    detokenizer = Detokenizer(BYTES)
    seen = []
    for byte in "a😀b".encode():
        detokenizer.add([byte])
        seen.append(detokenizer.text)
    assert seen == ["a", "a", "a", "a", "a😀", "a😀b"]


def test_half_a_character_at_the_end_is_shown_at_last():
    detokenizer = Detokenizer(BYTES)
    detokenizer.add("a😀".encode()[:-1])
    assert detokenizer.text == "a"
    assert detokenizer.finish() == "a\ufffd"


def test_a_prompt_that_ends_within_a_character_is_completed():
    first, *rest = "é".encode()
    assert stepwise(BYTES, [*rest, 0x41], [0x40, first]) == "éA"


def test_without_new_ids_there_is_no_text():
    for prompt in ([], [0x41], [0xF0], encode(BYTES, "\ufffd")):
        assert Detokenizer(BYTES, prompt).text == ""
        assert Detokenizer(BYTES, prompt).finish() == ""


def test_special_tokens_are_shown_on_request():
    ids = [0x41, EOS, 0x42]
    assert at_once(BYTES, ids) == "AB"
    assert stepwise(BYTES, ids, skip_special_tokens=False) == "A<eos>B"


@pytest.mark.parametrize(
    "unit", [b"a word ", "😀".encode(), [0xFF], [0xF0, 0x9F, 0x98], [EOS], [0xE4, EOS]]
)
def test_the_work_grows_with_the_number_of_ids_and_no_faster(unit):
    class Counting:
        """A tokenizer that counts the ids it decodes."""

        num_ids = 0

        @property
        def backend_tokenizer(self):
            return self

        def decode(self, ids, skip_special_tokens):
            self.num_ids += len(ids)
            return BYTES.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    counting = Counting()
    ids = (list(unit) * 4000)[:4000]
    assert stepwise(counting, ids, [0x41]) == plain(BYTES, ids)
    assert counting.num_ids < 300 * len(ids)


def test_text_ids_are_those_of_the_tokenizer_with_its_default_special_tokens():
    assert encode(BYTES, WORDS) == BYTES(WORDS)["input_ids"]
    assert encode(BYTES, WORDS)[1:] == encode(BYTES, WORDS, add_special_tokens=False)
    assert encode(BYTES, "") == [BYTES.bos_token_id]


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(ValueError, match="prompt: .*surrogate"):
        encode(BYTES, "a\ud83d")
    with pytest.raises(ValueError, match="prompt: .*surrogate"):
        list(encode_all(BYTES, ["a", "a\ud83d"]))


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["bytes", "fallback"])
@pytest.mark.parametrize("count", [0, 1, AT_ONCE, 2 * AT_ONCE + 3])
def test_many_texts_are_encoded_as_each_of_them(tokenizer, count):
    texts = [WORDS[i % len(WORDS) :] + str(i) for i in range(count)]
    found = [each.ids for each in encode_all(tokenizer, iter(texts))]
    assert found == [encode(tokenizer, text) for text in texts]


def test_a_folder_round_trips(tmp_path):
    BYTES.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert encode(loaded, WORDS) == encode(BYTES, WORDS)
    assert loaded.eos_token == "<eos>" and loaded.chat_template == TEMPLATE


def test_a_tokenizer_file_that_truncates_and_pads_does_neither(tmp_path):
    BYTES.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert encode(load_tokenizer(tmp_path), WORDS) == encode(BYTES, WORDS)


def test_code_named_by_a_tokenizer_is_not_run(tmp_path):
    BYTES.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content["auto_map"] = {"AutoTokenizer": [None, "evil.Evil"]}
    path.write_text(json.dumps(content))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json.*skip_tokenizer_init"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"tokenizer_path: cannot read that of {tmp_path}"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_nowhere_is_refused():
    with pytest.raises(ValueError, match="tokenizer_path: there is no folder"):
        load_tokenizer("/no/such/tokenizer")


def test_a_chat_is_rendered_up_to_the_assistants_turn():
    pytest.importorskip("jinja2", reason="chat templates need jinja2")
    messages = [{"role": "user", "content": "hi"}]
    assert render_chat(BYTES, messages) == "<user>hi<assistant>"
    assert render_chat(BYTES, messages, add_generation_prompt=False) == "<user>hi"


def test_what_a_template_refuses_is_a_value_error():
    pytest.importorskip("jinja2", reason="chat templates need jinja2")
    with pytest.raises(ValueError, match="messages: .*role tool"):
        render_chat(BYTES, [{"role": "tool", "content": "hi"}])


def test_a_model_without_a_template_says_so():
    with pytest.raises(ValueError, match="messages: .*no chat template"):
        render_chat(FALLBACK, [{"role": "user", "content": "hi"}])


def test_end_of_sequence_ids_are_the_union_of_all_that_are_named():
    assert eos_token_ids({}, None, None) == frozenset()
    assert eos_token_ids({"eos_token_id": None}, {}, BYTES) == {EOS}
    assert eos_token_ids({"eos_token_id": 3}, {"eos_token_id": [4, 5]}, BYTES) == {3, 4, 5, EOS}


def test_the_end_of_a_message_ends_a_sequence_too():
    tokenizer = byte_level()
    tokenizer.add_tokens(["<|eom_id|>"], special_tokens=True)
    assert eos_token_ids({}, None, tokenizer) == {
        EOS,
        tokenizer.backend_tokenizer.token_to_id("<|eom_id|>"),
    }


@pytest.mark.parametrize("value", ["2", 2.0, [1, None], True, -1, {}])
def test_end_of_sequence_ids_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match=r"eos_token_id in generation_config\.json"):
        eos_token_ids({}, {"eos_token_id": value}, None)


def test_many_threads_may_encode_and_decode():
    import threading

    errors = []

    def work():
        try:
            for _ in range(200):
                assert at_once(BYTES, encode(BYTES, WORDS)) == WORDS
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
