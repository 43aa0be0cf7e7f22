"""tools/look.py: the page has the numbers of its run, and nothing that a user wrote becomes markup.

tests/check_look.py looks at the page in a browser.
"""

import base64
import io
import json
import re
from functools import partial
from html.parser import HTMLParser
from types import SimpleNamespace

import look
import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from train_tiny import Trainer

from load_weights import load_config, load_generation_config, load_model, load_processor
from processing import patchify
from sampling import generate
from vision import attention_weights, eager

PROMPT = "Locate the red star."
PARTS = 65535


def looked(picture, prompt, new=64, **settings):
    """A model in float32 and its inputs, the numbers of its run, and the model as it was before."""
    model = load_model(TINY, "cpu", "float32")
    processor = load_processor(TINY)
    inputs = processor([{"role": "user", "content": [{"image": picture}, {"text": prompt}]}])
    settings = load_generation_config(TINY) | dict(max_new_tokens=new) | settings
    return SimpleNamespace(
        processor=processor,
        inputs=inputs,
        settings=settings,
        data=look.look(model, processor, inputs, settings),
        model=load_model(TINY, "cpu", "float32"),
    )


@pytest.fixture(scope="module")
def demo():
    return looked(look.DEMO_IMAGE, PROMPT)


def unpacked(text, heads):
    """A row (heads, keys), in parts of 65535."""
    return np.frombuffer(base64.b64decode(text), "<u2").reshape(heads, -1).astype(int)


def answer_of(run):
    """The ids of the answer, and the logits that each was chosen from, by a loop of its own."""
    compute = run.model.logits
    logits = []

    def keep(*args, **kwargs):
        logits.append(compute(*args, **kwargs))
        return logits[-1]

    run.model.logits = keep
    ids = [token.item() for token in generate(run.model, run.inputs, **run.settings)]
    run.model.logits = compute
    return ids, torch.stack(logits)[:, 0, -1]


# ---------------------------------------------------------------------------- attention

def test_rows_add_up_to_one(demo):
    """Bug: each share is rounded by itself, and a row of many small ones loses them."""
    data = demo.data
    for rows, heads in ((data["decoder"], data["heads"]), (data["tower"], data["tower_heads"])):
        for row in sum(rows, []):
            assert (unpacked(row, heads).sum(axis=1) == PARTS).all()

    small = torch.full((1, 20_000), 1 / 20_000)
    assert unpacked(look.packed(small), 1).sum() == PARTS


def test_rows_of_words_are_eagers(demo):
    """Bug: the row of the word before or after, of another layer or head, or without the newest slot."""
    kept = []

    def attend(q, k, v, mask, causal):
        kept.append(attention_weights(q, k, mask, causal)[0])
        return eager(q, k, v, mask, causal)

    # Prompt and answer, read in one go.
    ids, _ = answer_of(demo)
    for layer in demo.model.model.layers:
        layer.self_attn.attend = attend
    whole = torch.cat((demo.inputs["input_ids"], torch.tensor([ids])), dim=1)
    pictures = {name: demo.inputs[name] for name in ("pixel_values", "image_grid_thw")}
    demo.model(whole, **pictures)

    T = demo.inputs["input_ids"].shape[1]
    assert len(demo.data["decoder"]) == len(kept) == 5
    for rows, weights in zip(demo.data["decoder"], kept):
        assert len(rows) == len(ids)
        for n, row in enumerate(rows):
            expected = weights[:, T + n - 1, :T + n]
            assert np.abs(unpacked(row, 6) / PARTS - expected.numpy()).max() < 2 / PARTS


@pytest.mark.parametrize("columns, rows", [(8, 6), (9, 5)])
def test_rows_of_groups_are_eagers(columns, rows, monkeypatch):
    """Bug: rows or columns in the order of the windows, of another block, patches for groups."""
    monkeypatch.setattr(look, "QUERIES", 12)        # so that there are several parts
    picture = Image.effect_noise((28 * columns, 28 * rows), 90).convert("RGB")
    run = looked(picture, "Describe the image.", new=1)
    groups = np.arange(rows * columns)
    y, x = np.divmod(groups, columns)
    window = y // 4 * 9 + x // 4

    # Groups as the tower keeps them: whole windows, the right edge, the bottom, the corner.
    edge = 2 * (y >= rows // 4 * 4) + (x >= columns // 4 * 4)
    order = torch.from_numpy(np.lexsort((groups, window, edge)))
    patches = (4 * order[:, None] + torch.arange(4)).flatten()

    # The tower once more, with its queries and keys kept.
    calls = []

    def attend(q, k, v, mask, causal):
        calls.append((q, k))
        return eager(q, k, v, mask, causal)
    for block in run.model.visual.blocks:
        block.attn.attend = attend
    run.model.visual(run.inputs["pixel_values"], run.inputs["image_grid_thw"])

    for full, text in zip([False, True, False, True], run.data["tower"], strict=True):
        # All of a block's queries and keys in reading order, and one mask for all of its windows.
        q = torch.empty(1, 4, len(patches), 32)
        k = torch.empty(1, 4, len(patches), 32)
        start = 0
        while start < len(patches):
            for part in zip(*calls.pop(0)):
                here = patches[start:start + part[0].shape[1]]
                q[0, :, here], k[0, :, here] = part
                start += len(here)
        same = torch.from_numpy(window[:, None] == window).repeat_interleave(4, 0).repeat_interleave(4, 1)
        mask = torch.zeros(same.shape).masked_fill(~same & (not full), -torch.inf)
        weights = attention_weights(q, k, mask, False)[0].unflatten(2, (-1, 4)).sum(3)
        weights = weights.unflatten(1, (-1, 4)).mean(2).numpy()

        for group, row in enumerate(text):
            seen = groups if full else groups[window == window[group]]
            assert np.abs(unpacked(row, 4) / PARTS - weights[:, group, seen]).max() < 2 / PARTS


def test_heads_that_do_not_fit_are_named(monkeypatch):
    """Bug: heads are left out in silence, the mean is one of them, or a page grows with the checkpoint."""
    full = looked(look.DEMO_IMAGE, "How many objects are there?", new=4).data
    assert full["left_out"] == ["where tokens of the prompt look in the decoder"]
    monkeypatch.setattr(look, "BUDGET", 9000)
    mean = looked(look.DEMO_IMAGE, "How many objects are there?", new=4).data
    assert "heads of the decoder, but for their mean" in mean["left_out"]
    assert "attention in the tower" in mean["left_out"]
    assert (mean["heads"], mean["tower_heads"], mean["tower"]) == (1, 0, [])
    for rows, every in zip(mean["decoder"], full["decoder"]):
        for row, heads in zip(rows, every, strict=True):
            assert np.abs(unpacked(row, 1) - unpacked(heads, 6).mean(axis=0)).max() < 2

    monkeypatch.setattr(look, "BUDGET", 1000)
    with pytest.raises(ValueError, match="too many for a page; use a smaller --max-pixels"):
        looked(look.DEMO_IMAGE, PROMPT)


def test_trained_heads_are_those_of_the_recipe():
    """Bug: other heads are said to have been trained to point."""
    config = load_config(TINY)
    step = config.num_attention_heads // config.num_key_value_heads
    assert look.TRAINED == [(Trainer.POINTING, h) for h in range(0, config.num_attention_heads, step)]
    (layer, one), (_, other) = look.TRAINED
    said = f"Heads {one} and {other} of layer {layer} of tiny were trained to point"
    assert said in look.TEMPLATE.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------- positions and probabilities

def test_places_are_those_of_the_prompt(demo):
    """Bug: the position of another token, the window or patches of another group. The demo: 6 x 8 groups."""
    data = demo.data
    ids = demo.inputs["input_ids"]
    positions, _ = demo.model.positions(ids, image_grid_thw=demo.inputs["image_grid_thw"])
    assert data["positions"] == positions[:, 0].T.tolist()
    prompt = demo.processor.tokenizer.decode(ids[0].tolist(), skip_special_tokens=False)
    assert "".join(data["prompt"]) == prompt
    assert data["prompt"][data["first"]:][:48] == ["<|image_pad|>"] * 48
    assert (data["rows"], data["columns"], data["first"]) == (6, 8, 15)

    windows = [2 * (g // 8 // 4) + g % 8 // 4 for g in range(48)]
    kept = sorted(range(48), key=lambda g: (windows[g], g))
    assert data["windows"] == windows
    assert data["places"] == [kept.index(g) for g in range(48)]
    assert data["patches"][:6] == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]
    assert data["full"] == [False, True, False, True]


@pytest.mark.parametrize("penalty", [1.0, 5.0])
def test_probabilities_are_those_of_the_loop(penalty):
    """Bug: of another token, or with the penalty where it should be without or on other ids."""
    run = looked(look.DEMO_IMAGE, "Describe the image.", repetition_penalty=penalty)
    ids, logits = answer_of(run)
    text = partial(run.processor.tokenizer.decode, skip_special_tokens=False)
    seen = torch.zeros(512, dtype=torch.bool)
    seen[run.inputs["input_ids"][0]] = True
    for token, row, said in zip(ids, logits, run.data["answer"], strict=True):
        penalized = row.clone()
        penalized[seen & (row > 0)] /= penalty
        penalized[seen & (row < 0)] *= penalty
        assert penalized.argmax() == token
        assert said["text"] == text([token])

        for told, x in ((said["before"], row), (said["after"], penalized)):
            chances = x.softmax(dim=0)
            others = sorted(set(range(512)) - {token}, key=lambda i: -chances[i])[:5]
            assert told["chosen"] == pytest.approx(chances[token].item(), abs=1e-5)
            assert [p for _, p in told["others"]] == pytest.approx(chances[others].tolist(), abs=1e-5)
            assert told["others"][0][0] == text(others[:1])
        seen[token] = True


# ---------------------------------------------------------------------------- the page

class Page(HTMLParser):
    """What a browser makes of a page without running it: its tags with their attributes, its texts."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.texts = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.texts.append(text.strip())


def written(tmp_path, *arguments):
    """The page that the script writes."""
    out = tmp_path / "look.html"
    assert look.main([*arguments, "--max-new-tokens", "4", "-o", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def told(page):
    """The data in a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


@pytest.mark.parametrize("text", [
    "<script>alert(1)</script>",
    "</script></title></b><img src=x onerror=alert(1)>",
    "<!--<script>",
    r"{{data}} \1 \g<0> &lt;",
])
def test_what_is_written_stays_text(text):
    """Bug: a prompt or an answer that opens or closes a tag, or is taken for a place in the template."""
    def filled(text):
        page = look.page({"said": text}, Image.new("RGB", (28, 28)), model=text, question=text, answer=text)
        return Page(page), told(page)

    page, data = filled(text)
    plain, _ = filled("x")
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert page.texts.count(text) == 3 and f"Look inside: {text}" in page.texts
    assert data["said"] == text


def test_prompt_of_markup_is_told_as_tokens(tmp_path):
    """Bug: a prompt that is a tag is lost on its way to the page, or runs."""
    prompt = "<script>alert(1)</script>"
    page = written(tmp_path, "--prompt", prompt)
    assert prompt in "".join(told(page)["prompt"])
    assert Page(page).texts.count(prompt) == 1
    assert page.count("<script") == 2


def test_page_asks_for_nothing_else(tmp_path):
    """Bug: a script, style, font or picture from elsewhere, which a page from disk would wait for."""
    text = written(tmp_path)
    page = Page(text)
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert re.match("#|data:image/png;base64,", attributes.get("href", "#"))
    (policy,) = [attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes]
    assert policy.startswith("default-src 'none'; img-src data:;")

    template = look.TEMPLATE.read_text(encoding="utf-8")
    assert not re.search(r"//\w|url\(|@import|\bimport\b|fetch|XMLHttp|WebSocket|innerHTML", template)
    assert len(template.splitlines()) <= 350


def test_picture_is_the_one_that_the_model_has_seen(tmp_path):
    """Bug: the original, or one that is resized otherwise or compressed with loss."""
    photo = look.ROOT / "assets" / "photo.jpg"
    page = Page(written(tmp_path, "--image", str(photo)))
    (url,) = [attributes["href"] for tag, attributes in page.tags if tag == "image"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    patches, _ = patchify(np.asarray(picture)[None], patch=14, temporal_patch=2, merge=2)

    processor = load_processor(TINY)
    inputs = processor([{"role": "user", "content": [{"image": photo}]}])
    assert torch.equal(processor.normalize(patches), inputs["pixel_values"])


def test_demo_is_the_commands_output(tmp_path):
    """Bug: assets/look.html is of an older template or checkpoint. Shares and PNGs differ by machine."""
    demo = (look.ROOT / "assets" / "look.html").read_text(encoding="utf-8")
    out = tmp_path / "look.html"
    assert look.main(["--prompt", PROMPT, "-o", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert len(demo) < 2e6

    def without_shares(page):
        data = told(page)
        words = [word["text"] for word in data.pop("answer")]
        del data["tower"], data["decoder"]
        return data, words, re.sub(r'id="data">.*?</script>|base64,[^"]*', "", page)
    assert without_shares(demo) == without_shares(page)
    assert told(demo)["said"].strip() in Page(demo).texts       # without a script, too


@pytest.mark.parametrize("arguments, message", [
    (["--image", "nowhere.png"], "nowhere.png: no such file"),
    (["--model", "nowhere/"], "nowhere"),
    (["--prompt", " "], "the prompt is empty"),
    (["--max-new-tokens", "0"], "must be at least 1"),
    (["--max-new-tokens", "many"], "invalid int value"),
    (["--max-pixels", "0"], "must be above 0"),
    (["--layers"], "see python tools/look.py --help"),
    (["-o", "nowhere/look.html"], "nowhere/look.html"),
])
def test_mistakes_are_one_line(tmp_path, capsys, arguments, message):
    """Bug: a traceback, a usage in front of it, or another exit status."""
    assert look.main(["-o", str(tmp_path / "look.html"), *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ") and message in said[-1]
    assert all(line.endswith(" ...") for line in said[:-1])         # progress
    assert not list(tmp_path.iterdir())


def test_output_must_be_named(capsys):
    """Bug: it writes a file that nobody has asked for."""
    assert look.main([]) == 2
    assert capsys.readouterr().err.startswith("error: the following arguments are required: -o")
