"""The HTML report: what the file holds, and how it behaves in a browser where there is one."""

import json
import math
import shutil
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from jaxengine.report import entropy_bound, rank, summary, token_text, write_report
from jaxengine.tokenizer import load_tokenizer

PROSE = (
    "The import statement combines two operations; it searches for the named module, then it "
    "binds the results of that search to a name in the local scope.\n\n\t>>> import spam\n"
)
HOSTILE = (
    "</script><script>document.title = 'owned'</script><!-- <img src=x onerror=alert(1)> "
    '{{data}} {{title}} "it\'s" &amp; \x00 \u202eabc\u202c \u200f \u2028 naïve 文字 🙂 مرحبا\r\n'
)
LEAST = float(np.finfo(np.float32).min)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(files("jaxengine") / "assets" / "demo"))


def scored(ids: list[int], rng: np.random.Generator, vocab: int, k: int) -> tuple[list, list]:
    """Entries as the engine writes them, of a model that mostly expects what comes."""
    tokens, tops = [], []
    for token in ids:
        logits = rng.normal(size=vocab) * rng.uniform(1, 2.5)
        logits[token] += rng.gamma(2, 4)
        logprobs = logits - np.logaddexp.reduce(logits)
        best = np.argsort(-logprobs)[:k]
        tokens.append((float(logprobs[token]), token, None))
        tops.append([(float(logprobs[other]), int(other), None) for other in best])
    return tokens, tops


def result(tokenizer: Any, prompt: str, output: str, *, k: int = 5, rid: str = "7") -> dict:
    rng = np.random.default_rng(len(prompt + output))
    prompt_ids, output_ids = tokenizer(prompt).input_ids, tokenizer(output).input_ids
    inputs, input_tops = scored(prompt_ids, rng, len(tokenizer), k)
    outputs, output_tops = scored(output_ids, rng, len(tokenizer), k)
    inputs[0], input_tops[0] = (None, prompt_ids[0], None), None
    meta_info = {
        "id": rid,
        "finish_reason": {"type": "length", "length": len(output_ids)},
        "prompt_tokens": len(prompt_ids),
        "completion_tokens": len(output_ids),
        "input_token_logprobs": inputs,
        "output_token_logprobs": outputs,
        "input_top_logprobs": input_tops,
        "output_top_logprobs": output_tops,
    }
    return {"text": output, "output_ids": output_ids, "meta_info": meta_info}


class Page(HTMLParser):
    """The tags of a page and its JSON."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = [("", {})]
        self.texts: dict[str, str] = {}
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attrs = self.tags[-1]
        name = attrs.get("id", tag)
        self.texts[name] = self.texts.get(name, "") + data

    def json(self, name: str) -> Any:
        return json.loads(self.texts[name])

    def entries(self, index: int, part: int) -> list[tuple[float | None, int]]:
        """(logprob, token id) of each token, from a result's block and the vocabulary."""
        columns, rows = self.json(f"result-{index}")[part], self.json("vocabulary")
        numbers = [x if x is None else float(x) for x in columns["logprobs"]]
        return [(x, rows[at][0]) for x, at in zip(numbers, columns["tokens"], strict=True)]


# The file


def test_the_data_in_the_page_is_that_of_the_results(tokenizer: Any, tmp_path: Path) -> None:
    results = [result(tokenizer, PROSE, HOSTILE), result(tokenizer, HOSTILE, PROSE, k=3)]
    path = write_report(str(tmp_path / "a.html"), results, tokenizer=tokenizer)
    assert path == tmp_path / "a.html"
    page = Page(path)
    rows = page.json("vocabulary")
    for index, one in enumerate(results):
        for part, side in enumerate(("input", "output")):
            meta, block = one["meta_info"], page.json(f"result-{index}")[part]
            given = meta[f"{side}_token_logprobs"]
            for written, (logprob, token, _) in zip(page.entries(index, part), given, strict=True):
                assert written == (logprob and pytest.approx(logprob, abs=1e-4), token)
            for cell, top in zip(block["alternatives"], meta[f"{side}_top_logprobs"], strict=True):
                if top is None:
                    assert cell == []
                    continue
                assert [rows[place][0] for place in cell[0]] == [token for _, token, _ in top]
                assert cell[1] == pytest.approx([x for x, _, _ in top], abs=1e-4)
    raw = [rows[place][1] for place in page.json("result-1")[0]["tokens"]]
    assert "".join(raw).encode(errors="surrogateescape").decode() == HOSTILE


def test_no_text_gets_out_of_its_place(tokenizer: Any, tmp_path: Path) -> None:
    plain = write_report(tmp_path / "plain.html", result(tokenizer, "a", "b"), tokenizer=tokenizer)
    one = result(tokenizer, HOSTILE, HOSTILE, rid=HOSTILE)
    one["meta_info"]["finish_reason"] = {"type": "stop", "matched": HOSTILE}
    for key in ("input_token_logprobs", "output_token_logprobs"):
        one["meta_info"][key] = [(x, token, HOSTILE) for x, token, _ in one["meta_info"][key]]
    path = write_report(tmp_path / "hostile.html", one, title=HOSTILE + "\ud83d")
    assert Page(path).tags == Page(plain).tags
    assert Page(path).json("vocabulary")[0][1] == HOSTILE
    assert Page(path).json("overview")[0]["id"] == HOSTILE
    lines = path.read_text(encoding="utf-8").splitlines()
    data = [line for line in lines if line.startswith('<script type="application/json"')]
    assert len(data) == 3
    for line in data:
        inside = line[line.index(">") + 1 : line.rindex("<")]
        assert inside.isascii() and not set("<>&") & set(inside)


def test_the_file_needs_nothing_else(tokenizer: Any, tmp_path: Path) -> None:
    path = write_report(tmp_path / "a.html", result(tokenizer, PROSE, PROSE))
    assert not [tag for tag, _ in Page(path).tags if tag in {"link", "img", "iframe", "base"}]
    assert not [attrs for _, attrs in Page(path).tags if {"src", "href"} & set(attrs)]
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text
    assert text.count("http") == text.count("http://www.w3.org/2000/svg") + text.count("http-equiv")


def test_one_result_is_a_list_of_one_and_json_makes_no_difference(
    tokenizer: Any, tmp_path: Path
) -> None:
    one = result(tokenizer, PROSE, PROSE)
    paths = [tmp_path / name for name in ("a", "b", "c")]
    write_report(paths[0], one)
    write_report(paths[1], iter([one]))
    write_report(paths[2], json.loads(json.dumps(one)))
    assert len({path.read_text(encoding="utf-8") for path in paths}) == 1


KEYS = [f"{side}_{of}_logprobs" for side in ("input", "output") for of in ("token", "top")]


@pytest.mark.parametrize("missing", [*([key] for key in KEYS), KEYS])
def test_a_missing_key_is_named_with_the_arguments_that_give_it(
    tokenizer: Any, tmp_path: Path, missing: list[str]
) -> None:
    good, bad = result(tokenizer, "a b", "c"), result(tokenizer, "a b", "c")
    for key in missing:
        del bad["meta_info"][key]
    path = tmp_path / "a.html"
    path.write_text("kept")
    with pytest.raises(ValueError) as raised:
        write_report(path, [good, bad])
    message = str(raised.value)
    assert message.startswith("results[1]: meta_info has no ")
    assert all((key in message) == (key in missing) for key in KEYS)
    for argument in ("return_logprob=True", "logprob_start_len=0", "top_logprobs_num="):
        assert argument in message
    assert path.read_text() == "kept"


@pytest.mark.parametrize("wrong", [[], ["text"], [{"text": "a"}], [{"meta_info": None}]])
def test_what_is_no_result_is_refused(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(ValueError, match="results"):
        write_report(tmp_path / "a.html", wrong)


@pytest.mark.parametrize("key", ["output_token_logprobs", "output_top_logprobs"])
@pytest.mark.parametrize("broken", [[], [(-1.0, 3)], [-1.0]])
def test_broken_entries_are_refused_with_their_place(
    tokenizer: Any, tmp_path: Path, key: str, broken: list
) -> None:
    one = result(tokenizer, "a b", "c")
    one["meta_info"][key] = broken
    with pytest.raises(ValueError, match=r"results\[0\]: expected .* of the output"):
        write_report(tmp_path / "a.html", one)


def test_a_scored_prompt_ends_with_its_prediction(tokenizer: Any, tmp_path: Path) -> None:
    one = result(tokenizer, PROSE, "x")
    one["output_ids"], one["text"] = [], ""
    one["meta_info"]["prompt_tokens"] += 11  # logprob_start_len=11
    page = Page(write_report(tmp_path / "a.html", one))
    about = page.json("overview")[0]
    assert [part["name"] for part in about["parts"]] == ["input", "next"]
    assert about["unscored"] == 11


def test_numbers_that_json_lacks(tokenizer: Any, tmp_path: Path) -> None:
    one = result(tokenizer, "a b", "some more text")
    entries = one["meta_info"]["output_token_logprobs"]
    for index, value in enumerate((LEAST, -math.inf, -65504.0)):
        entries[index] = (value, entries[index][1], None)
    page = Page(write_report(tmp_path / "a.html", one, tokenizer=tokenizer))
    assert [x for x, _ in page.entries(0, 1)[:3]] == [-math.inf] * 3
    about = page.json("overview")[0]["parts"][1]
    assert about["sum"] == about["mean"] == "-inf"
    assert about["perplexity"] == about["bits_per_byte"] == "inf"
    entries[:3] = [(math.nan, token, None) for _, token, _ in entries[:3]]
    page = Page(write_report(tmp_path / "a.html", one, tokenizer=tokenizer))
    about = page.json("overview")[0]["parts"][1]
    assert about["tokens"] - about["scored"] == 3 and math.isfinite(about["sum"])
    assert page.json("result-0")[1]["entropies"][:3] == [None] * 3


# What tokens say


def test_bytes_of_a_character_cut_in_two_are_kept(tokenizer: Any) -> None:
    ids = tokenizer(HOSTILE).input_ids
    texts = [token_text(tokenizer, token) for token in ids]
    assert any("\udc80" <= char <= "\udcff" for text in texts for char in text or "")
    assert "".join(map(str, texts)).encode(errors="surrogateescape").decode() == HOSTILE
    cut = next(token for token in ids if tokenizer.decode([token]) == "\ufffd")
    assert token_text(tokenizer, cut, "\ufffd") == token_text(tokenizer, cut) != "\ufffd"


def test_the_text_of_the_results_comes_first_and_the_id_last(tokenizer: Any) -> None:
    assert token_text(tokenizer, 300, "given") == token_text(None, 300, "given") == "given"
    assert token_text(None, 300) is None
    assert token_text(tokenizer, 10**6) is None
    assert token_text(tokenizer, 1) == "<|im_start|>"
    assert token_text(None, 1, "a\udc80\ud83d") == "a\ufffd\ufffd"


def test_words_keep_their_space_and_bytes_that_stand_for_themselves_are_read() -> None:
    vocab = {"<unk>": 0, "▁the": 1, "<0xE6>": 2, "<0x0A>": 3, "s": 4}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    strip = decoders.Strip(" ", 1, 0)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    texts = [token_text(tokenizer, token) for token in range(5)]
    assert texts == ["<unk>", " the", "\udce6", "\n", "s"]


def test_anything_that_decodes_will_do() -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    assert token_text(Letters(), 65) == "A"


def test_results_of_two_models_keep_their_own_texts(tokenizer: Any, tmp_path: Path) -> None:
    results = [result(tokenizer, "a", "b"), result(tokenizer, "a", "b")]
    for text, one in zip(("x", "y"), results, strict=True):
        one["meta_info"]["output_token_logprobs"] = [(-1.0, 5, text)]
        one["meta_info"]["output_top_logprobs"] = [[(-1.0, 5, text)]]
    page = Page(write_report(tmp_path / "a.html", results))
    rows = page.json("vocabulary")
    places = [page.json(f"result-{index}")[1]["tokens"][0] for index in range(2)]
    assert [rows[place] for place in places] == [[5, "x", 0], [5, "y", 0]]


# Numbers


def entries(probabilities: Any, k: int) -> list[tuple[float, int, None]]:
    order = np.argsort(-np.asarray(probabilities))[:k]
    return [(math.log(probabilities[token]), int(token), None) for token in order]


@pytest.mark.parametrize("concentration", [0.02, 0.3, 5.0])
@pytest.mark.parametrize("k", [1, 2, 5, 49])
def test_the_entropy_is_a_lower_bound(
    rng: np.random.Generator, concentration: float, k: int
) -> None:
    for _ in range(20):
        p = np.maximum(rng.dirichlet(np.full(50, concentration)), 1e-12)
        p /= p.sum()
        token = int(rng.choice(50, p=p))
        top = entries(p, k)
        found = entropy_bound((math.log(p[token]), token, None), top)
        known = p[sorted({token, *(other for _, other, _ in top)})]
        rest = 1 - known.sum()
        by_hand = -(known * np.log(known)).sum()
        if rest > 1e-6:
            by_hand -= rest * np.log(min(rest, np.sort(p)[-k]))
        exact = -(p * np.log(p)).sum()
        assert found == pytest.approx(by_hand, abs=1e-9)
        assert found is not None and found <= exact + 1e-5


def test_the_entropy_bound_is_reached() -> None:
    p = [0.4, 0.2, 0.2, 0.2]
    exact = -sum(x * math.log(x) for x in p)
    for k in (2, 3, 4):  # the rest is made of tokens as likely as the last alternative
        assert entropy_bound((math.log(0.4), 0, None), entries(p, k)) == pytest.approx(exact)


def test_the_entropy_at_the_edges() -> None:
    assert entropy_bound((-1.0, 3, None), []) is None
    assert entropy_bound((None, 3, None), [(-1.0, 4, None)]) is None
    certain: list = [(0.0, 3, None), (-math.inf, 4, None)]
    assert entropy_bound(certain[0], certain) == 0
    assert entropy_bound((1e-7, 3, None), [(1e-7, 3, None)]) == 0
    half: list = [(math.log(0.5), 3, None), (-math.inf, 4, None)]
    assert entropy_bound(half[0], half) == pytest.approx(math.log(2))


def test_the_rank_is_a_count(rng: np.random.Generator) -> None:
    p = rng.dirichlet(np.ones(30))
    for token in range(30):
        top = entries(p, 10)
        place = int((p > p[token]).sum()) + 1
        assert rank((math.log(p[token]), token, None), top) == min(place, 11)
    ties: list = [(-1.0, 8, None), (-1.0, 9, None), (-2.0, 7, None)]
    assert [rank(entry, ties) for entry in ties] == [1, 1, 3]
    assert rank((-1.0, 8, None), [(-0.99999, 8, None), (-2.0, 7, None)]) == 1, "itself, rounded"
    assert rank((None, 8, None), ties) is None and rank((-1.0, 8, None), []) is None


def test_the_summary_is_plain_arithmetic() -> None:
    found = summary([None, -1.0, -2.0, -0.5], [3, 4, 6, 0])
    assert (found["tokens"], found["scored"], found["sum"]) == (4, 3, -3.5)
    assert found["mean"] == pytest.approx(-3.5 / 3, abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(3.5 / 3), abs=1e-4)
    assert found["bits_per_byte"] == pytest.approx(3 / math.log(2) / 10, abs=1e-4)
    assert summary([-1.0, -2.0], [3, None])["bits_per_byte"] is None
    nothing = summary([None], [3])
    assert nothing == {"tokens": 1, "scored": 0} | dict.fromkeys(
        ("sum", "mean", "perplexity", "bits_per_byte")
    )
    assert summary([-1e4], [1])["perplexity"] == "inf"


# In a browser


@pytest.fixture(scope="module")
def browser() -> Any:
    api = pytest.importorskip(
        "playwright.sync_api", reason="needs a browser: `pip install playwright`, and Chromium"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        if not (path := found or (own if Path(own).exists() else None)):
            pytest.skip("needs a browser: Chromium on the PATH, or `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, tokenizer: Any, tmp_path: Path) -> Any:
    """Opens a report on results, and checks in the end that nothing went wrong or out."""
    troubles: list[str] = []
    urls: list[str] = []
    pages = []

    def visit(results: Any, **options: Any) -> Any:
        path = write_report(tmp_path / "a.html", results, tokenizer=tokenizer)
        page = browser.new_page(viewport={"width": 1200, "height": 900}, **options)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text))
        page.on("dialog", lambda dialog: troubles.append(dialog.message) or dialog.dismiss())
        page.on("request", lambda request: urls.append(request.url))
        pages.append(page)
        page.goto(path.as_uri())
        page.wait_for_selector(".text > span")
        return page

    yield visit
    for page in pages:
        page.close()
    assert not troubles
    assert all(url.startswith("file:") for url in urls)


def until(page: Any, expression: str) -> None:
    """Waits as `wait_for_function` would, which the page's content security policy forbids."""
    for _ in range(100):
        if page.evaluate(f"!!({expression})"):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never came true: {expression}")


def hovered(page: Any) -> str:
    page.wait_for_selector("#tip:not([hidden])")
    return page.inner_text("#tip")


def test_hovering_shows_the_token_and_its_alternatives(visit: Any, tokenizer: Any) -> None:
    one = result(tokenizer, PROSE, PROSE, k=6)
    page = visit(one)
    tokens = page.locator(".part.output .text > span")
    assert page.locator(".part.input .text > span").count() == len(tokenizer(PROSE).input_ids)
    meta = one["meta_info"]
    pairs = list(zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True))
    ranks = [rank(*pair) for pair in pairs]
    for index in (0, ranks.index(2), ranks.index(7), tokens.count() - 1):
        (logprob, token, _), top = pairs[index]
        tokens.nth(index).hover(position={"x": 2, "y": 6})
        text = hovered(page)
        assert f"id {token}\n" in text and f"{index} of the output" in text
        assert f"{logprob:.4f}".replace("-", "−") in text
        place = rank((logprob, token, None), top)
        assert (f"> {len(top)}" if place == 7 else f"{place} of 6 alternatives") in text
        widths = page.eval_on_selector_all(
            ".bars > div:not(.rest) > div", "bars => bars.map(bar => parseFloat(bar.style.width))"
        )
        known = {other: x for x, other, _ in top} | {token: logprob}
        assert widths == pytest.approx([100 * math.exp(x) for x in known.values()], rel=1e-2)
        assert page.locator("svg .cursor[visibility=visible]").count() == 3
    assert page.locator(".plot:last-child .beyond").get_attribute("d").count("M") >= ranks.count(7)
    page.mouse.move(5, 890)
    assert page.locator("#tip").is_hidden()
    assert page.locator("svg .cursor[visibility=visible]").count() == 0


def test_the_keyboard_does_what_the_mouse_does(visit: Any, tokenizer: Any) -> None:
    page = visit(result(tokenizer, PROSE, PROSE))
    page.locator(".text > span").first.focus()
    assert "none: the first token" in hovered(page)
    page.keyboard.press("ArrowRight")
    until(page, "document.activeElement.at?.i === 1")
    assert "1 of the prompt" in hovered(page)
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    assert page.locator(".text > span[tabindex='0']").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_a_curve_leads_to_its_token(visit: Any, tokenizer: Any) -> None:
    page = visit(result(tokenizer, PROSE, PROSE))
    total = page.locator(".text > span").count()
    for plot in range(3):
        box = page.locator("svg").nth(plot).bounding_box()
        index = 5 + 7 * plot
        x = box["x"] + (index + 0.5) * box["width"] / total
        page.mouse.move(x, box["y"] + box["height"] / 2)
        assert f"{index} of the prompt" in hovered(page)
        assert page.evaluate("document.querySelector('.text > .at').at.i") == index
        page.mouse.move(x + 0.2, box["y"] + 5)  # onto the cursor that has appeared
        assert f"{index} of the prompt" in hovered(page)
    page.mouse.click(x, box["y"] + 5)
    until(page, f"document.activeElement.at?.i === {index}")


def test_the_threshold_picks_surprising_tokens(visit: Any, tokenizer: Any) -> None:
    one = result(tokenizer, PROSE, PROSE)
    page = visit(one)
    page.select_option("#metric", "surprisal")
    page.fill("#threshold input[type=number]", "2.5")
    meta = one["meta_info"]
    logprobs = [x for x, _, _ in meta["input_token_logprobs"] + meta["output_token_logprobs"]]
    wanted = [i for i, x in enumerate(logprobs) if x is not None and x <= -2.5]
    hits = page.eval_on_selector_all(".text > .hit", "spans => spans.map(span => span.at.i)")
    assert hits == wanted and 0 < len(hits) < len(logprobs)
    for index in wanted[:2]:
        page.click("[data-step='1']")
        until(page, f"document.activeElement.at?.i === {index}")
    page.select_option("#metric", "")
    assert page.locator(".hit").count() == 0


def test_hostile_text_is_shown_and_does_nothing(visit: Any, tokenizer: Any) -> None:
    page = visit(result(tokenizer, HOSTILE, HOSTILE, rid=HOSTILE))
    text = page.inner_text(".part.input .text")
    assert "</script><script>document.title" in text and "<img src=x onerror=" in text
    assert r"\u0000" in text and r"\xe6\x96\x87" in text and "\u202e" not in text
    assert page.title() == "1 result" and page.locator("img").count() == 0


def test_what_cannot_be_and_what_was_not_generated_are_told(visit: Any, tokenizer: Any) -> None:
    one = result(tokenizer, PROSE, "x")
    one["output_ids"] = []
    entries = one["meta_info"]["input_token_logprobs"]
    entries[4] = (LEAST, entries[4][1], None)
    page = visit(one)
    page.locator(".text > span").nth(4).hover()
    assert "−∞ (probability 0 %)" in hovered(page)
    assert page.locator(".plot:first-child .beyond").get_attribute("d").count("M") == 1
    assert "not generated" in page.inner_text(".part.next").lower()
    assert page.locator("table tr").count() == 2  # its head and the prompt


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_can_be_read(visit: Any, tokenizer: Any, scheme: str) -> None:
    page = visit(result(tokenizer, PROSE, PROSE), color_scheme=scheme)
    pixels = page.evaluate("""() => {
      const context = document.createElement("canvas").getContext(
        "2d", {willReadFrequently: true});
      const page = getComputedStyle(document.body).backgroundColor;
      const rgb = colours => { for (const colour of colours) {
        context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3); };
      return [...document.querySelectorAll(".bins span")].map(bin => {
        const style = getComputedStyle(bin);
        return [rgb([page, style.backgroundColor]), rgb([style.color])]; });
    }""")
    values = np.array(pixels) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]  # (8, 2): behind, text
    high, low = luminance.max(axis=1), luminance.min(axis=1)
    assert ((high + 0.05) / (low + 0.05) >= 4.5).all()  # WCAG 2, level AA
    lightness = np.cbrt(luminance[:, 0])
    steps = np.diff(lightness) * (-1 if scheme == "light" else 1)
    assert (steps > 0.015).all()


def test_a_thousand_results_are_drawn_where_one_looks(visit: Any, tokenizer: Any) -> None:
    one = result(tokenizer, PROSE * 2, PROSE * 2)
    page = visit([one] * 1000)
    assert page.locator("section").count() == 1000
    page.click("#open")
    until(page, "document.querySelectorAll('.text').length > 2")
    for fraction in (0.3, 0.6, 1.0, 0.1):
        page.evaluate(f"scrollTo(0, document.body.scrollHeight * {fraction})")
        until(page, "document.elementFromPoint(600, 500).closest('section').querySelector('svg')")
        assert page.locator(".text").count() <= 30
    page.click("#close")
    until(page, "document.querySelectorAll('.text').length === 0")


def test_results_are_sorted_by_perplexity(visit: Any, tokenizer: Any) -> None:
    results = [result(tokenizer, PROSE[: 60 + 9 * n], PROSE) for n in range(4)]
    page = visit(results)
    page.select_option("#sort", "1")
    order = page.eval_on_selector_all("section .number", "all => all.map(n => +n.textContent)")
    means = [
        np.mean([x for x, _, _ in one["meta_info"]["input_token_logprobs"][1:]]) for one in results
    ]
    assert order == list(np.argsort(means))
