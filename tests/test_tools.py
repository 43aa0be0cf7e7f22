"""The scripts in tools/, each run as its docstring says."""

import importlib
import json
import os
import re
import subprocess
import sys
from functools import reduce

import benchmark
import boxes
import bugs
import explain
import pytest
import torch
from conftest import TINY
from PIL import Image

from load_weights import load_generation_config, load_model, load_processor
from sampling import generate

# ---------------------------------------------------------------------------- boxes

@pytest.mark.parametrize("answer, expected", [
    ('```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "red circle"}]\n```', [((1, 2, 30, 40), "red circle")]),
    ('[{"label": "a", "bbox_2d": [1, 2, 3, 4]}, {"bbox_2d":[5,6,7,8]}]',
     [((1, 2, 3, 4), "a"), ((5, 6, 7, 8), "")]),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6', [((1, 2, 3, 4), "a")]),
    ('[{"bbox_2d": [1, 2, 3], "label": "a"}, {"bbox_2d": "x"}, {not json}]', []),
    ("```json\n[]\n```", []),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "sign {A}"}, {"bbox_2d": [5, 6, 7, 8], "label": "}{"}]',
     [((1, 2, 3, 4), "sign {A}"), ((5, 6, 7, 8), "}{")]),
    ('[{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8.5]], "label": "a"}]',
     [((1, 2, 3, 4), "a"), ((5, 6, 7, 8.5), "a")]),
    ('{"bbox_2d": [1, 2, 3, 4], "label": "x", "attributes": {"color": "red"}}', [((1, 2, 3, 4), "x")]),
    ('{"objects": {"cup": {"bbox_2d": [1, 2, 3, 4], "label": null}}}', [((1, 2, 3, 4), "")]),
    ('{"bbox_2d": [1, 2, 3, 4], "label": "\\ud83d"}', [((1, 2, 3, 4), "?")]),
], ids=["fenced", "listed", "cut off", "broken", "none", "braces", "several", "attributes", "nested", "half"])
def test_boxes_are_read_from_any_answer(answer, expected):
    """Bugs: boxes of an answer that was cut off are lost, of several one is taken, or what is nested is
    dropped; a broken one, or half of a surrogate pair, ends in a traceback.
    """
    assert boxes.read_boxes(answer) == expected


@pytest.mark.parametrize("broken", [
    "[10, 20, 1e999, 60]", "[10, 20, -Infinity, 60]", "[NaN, 20, 30, 60]", f"[10, 20, 1{400 * '0'}, 60]",
    f"[10, 20, 1{5000 * '0'}, 60]", "[10, 20, 30]", "[true, 20, 30, 60]", '"10, 20, 30, 60"', "null", "[]",
    "[[1, 2], [3, 4]]", "[10, 20, 30", 2000 * '{"a":',
], ids=lambda broken: broken[:24])
def test_box_that_cannot_be_read_costs_no_other(broken, tmp_path, capsys, monkeypatch):
    """Bugs: a traceback; the other boxes are lost; nobody is told that one is missing."""
    answer = '[{"bbox_2d": [112, 84, 12, 4], "label": "b"}, {"bbox_2d": BROKEN, "label": "a"}]'
    answer = answer.replace("BROKEN", broken)
    monkeypatch.setattr(boxes, "locate", lambda *args, **settings: (answer, (168, 224)))
    out = tmp_path / "out.png"
    assert boxes.main([str(boxes.ROOT / "assets" / "demo.png"), "x", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == "b: 12, 4, 112, 84\n"
    assert said.err.count("\n") == 1 and said.err.startswith("boxes left out")
    assert said.err.endswith(": 2\n" if broken == "[[1, 2], [3, 4]]" else ": 1\n")
    assert out.exists()


def test_boxes_are_said_although_they_cannot_be_drawn(tmp_path, capsys, monkeypatch):
    """Bug: minutes of a large model are lost to a folder that isn't there."""
    answer = '[{"bbox_2d": [10, 20, 50, 60], "label": "thing"}]'
    monkeypatch.setattr(boxes, "locate", lambda *args, **settings: (answer, (168, 224)))
    assert boxes.main([str(boxes.ROOT / "assets" / "demo.png"), "x", str(tmp_path / "no" / "boxes.png")]) == 2
    said = capsys.readouterr()
    assert said.out == "thing: 10, 20, 50, 60\n"
    assert said.err.startswith("error: ") and said.err.count("\n") == 1


def test_name_that_is_no_pictures_costs_no_answer(tmp_path, capsys, monkeypatch):
    """Bug: minutes of a large model pass before a suffix is met that Pillow doesn't know."""
    monkeypatch.setattr(boxes, "locate", None)
    assert boxes.main([str(boxes.ROOT / "assets" / "demo.png"), "x", str(tmp_path / "boxes")]) == 2
    assert "boxes: not the name of a picture; name it, for instance, boxes.png" in capsys.readouterr().err


def test_boxes_are_drawn_in_original_pixels(tmp_path, capsys, monkeypatch):
    """Bug: they are printed or drawn as the model says them, in pixels of the resized picture."""
    picture = tmp_path / "in.png"
    out = tmp_path / "out.png"
    Image.new("RGB", (224, 336)).save(picture)

    # The model is given a picture of half the height.
    answer = '[{"bbox_2d": [10, 20, 50, 60], "label": "thing"}]'
    monkeypatch.setattr(boxes, "locate", lambda *args, **settings: (answer, (168, 224)))
    arguments = [str(picture), "Locate every object.", str(out)]
    assert boxes.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"bbox_2d": [10, 40, 50, 120], "label": "thing"}]
    assert boxes.main(arguments) == 0
    assert capsys.readouterr().out == "thing: 10, 40, 50, 120\n"

    drawn = Image.open(out)
    assert drawn.getpixel((11, 100)) == (255, 255, 255)
    assert drawn.getpixel((11, 30)) == (0, 0, 0)
    assert boxes.main(["nowhere.png", "x", str(out)]) == 2


# ---------------------------------------------------------------------------- bugs

def test_bug_entries_are_current():
    """Bug: a piece of code is found elsewhere too or not at all, or a test has another name now. (That the
    tests catch the bugs is for the script to say.)
    """
    tests = "".join(file.read_text() for file in bugs.ROOT.glob("tests/test_*.py"))
    for bug in bugs.BUGS:
        source = (bugs.ROOT / bug.file).read_text()
        assert source.count(bug.right) == 1, bug.name
        assert tests.count(f"def {bug.test}(") == 1, bug.name

    names = {bug.name for bug in bugs.BUGS}
    assert len(names) == len(bugs.BUGS)


def test_every_bug_has_its_row_in_the_docs():
    """Bug: docs/bugs.md names another report or test than the script, or code without commit and line."""
    page = (bugs.ROOT / "docs" / "bugs.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted((bug.name, bugs.linked(bug.reported), bug.test) for bug in bugs.BUGS)

    for link in re.findall(r"\((https://github.com/[^)]+)\)", page):
        assert re.search(r"/issues/\d+$|/blob/([0-9a-f]{40}|v[\d.]+)/\S+#L\d+(-L\d+)?$", link), link


# ---------------------------------------------------------------------------- explain

def explained(capsys, *arguments):
    """The page: its stages by function, the tokens of its answer, and the whole text."""
    assert explain.main(list(arguments)) == 0
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 100
    stages = dict(re.findall(r"^ +\d  ([\w.]+\.\w+)(?: x \d+)? +(.*)$", page, re.MULTILINE))
    answer = re.findall(r"^ +(\d+) +(\d+)  '(.*)' +([\d.]+)%   '(.*)' +([\d.]+)%$", page, re.MULTILINE)
    return stages, answer, page


def test_explanation_has_this_runs_numbers(capsys):
    """Bug: a number is another run's, or a function has another name now. The demo: 12 x 16 patches."""
    stages, _, page = explained(capsys, "--prompt", "Locate the red star.")
    for function in stages:
        module, path = function.split(".", 1)
        reduce(getattr, path.split("."), importlib.import_module(module))

    for function, shape, what in (
        ("processing.smart_resize", "(168, 224)", "from 224 x 168 pixels"),
        ("processing.patchify", "(192, 1176)", "1 x 12 x 16 patches"),
        ("vision.PatchEmbed", "(192, 128)", "a linear map of each"),
        ("vision.window_order", "(48,)", "2 of 64, 2 of 32 patches"),
        ("vision.VisionBlock", "(192, 128)", "whole frames in 1, 3"),
        ("vision.PatchMerger", "(48, 192)", "2 x 2 patches to a token"),
        ("model.Qwen2_5_VL.embed", "(1, 74, 192)", "48 of 74 are vision tokens"),
        ("model.DecoderLayer", "(1, 74, 192)", "6 heads share 2 keys"),
        ("model.KVCache", "(5, 1, 2, 74, 32)", "1,280 bytes per token"),
        ("model.Qwen2_5_VL.logits", "(1, 512)", "of the last token"),
    ):
        line = stages[function]
        assert line.startswith(shape + " ") and line.endswith("  " + what), line
    for line in (
        r"<|vision_start|><|image_pad|> x 48 <|vision_end|>Locate the red star.<|im_end|>\n",
        "picture          15 to 62           15     15 to 20     15 to 22",
        "the answer        from 74      from 34      from 34      from 34",
    ):
        assert f"      {line}\n" in page or f"    {line}\n" in page
    assert explain.main(["--image", "nowhere.png"]) == 2


@pytest.mark.parametrize("medium", ["image", "video"])
def test_explained_tokens_are_the_answers(medium, capsys):
    """Bug: the probability, the slot or the position of another token; a video's at another rate."""
    file = {"image": explain.DEMO_IMAGE, "video": explain.ROOT / "assets" / "demo.webp"}[medium]
    prompt = {"image": "Locate the red star.", "video": "Which way does the square move?"}[medium]
    _, answer, _ = explained(capsys, f"--{medium}", str(file), "--prompt", prompt)
    slots, positions, texts, chances, seconds, less = zip(*answer)

    # The answer, read again in one go.
    model = load_model(TINY)
    processor = load_processor(TINY)
    content = [{"type": medium, medium: file}, {"type": "text", "text": prompt}]
    inputs = processor([{"role": "user", "content": content}])
    tokens = torch.cat(list(generate(model, inputs, **load_generation_config(TINY))))
    T = inputs["input_ids"].shape[1]
    whole = {name: x for name, x in inputs.items() if name != "attention_mask"}
    whole["input_ids"] = torch.cat((inputs["input_ids"], tokens[None]), dim=1)
    best = model(**whole)[0, T - 1:-1].float().softmax(dim=-1).topk(2)

    def shown(ids):
        return [repr(processor.tokenizer.decode([i], skip_special_tokens=False))[1:-1] for i in ids]

    # What was chosen, and what came second wherever that was a near thing.
    assert list(texts) == shown(tokens.tolist())
    assert list(map(float, chances)) == pytest.approx((100 * best.values[:, 0]).tolist(), abs=4)
    for text, chance, p, i in zip(seconds, less, best.values[:, 1], best.indices[:, 1], strict=True):
        assert float(chance) == pytest.approx(100 * p.item(), abs=4)
        assert p < 0.05 or [text] == shown([i.item()])

    # Their tokens take 8 positions, for 8 columns; the video's last pair is only at 15 + 6.
    first = T - (inputs["mm_token_type_ids"] > 0).sum().item() + 8
    for n, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        assert (int(slot), int(position)) == (T + n, first + n)


def test_explanation_ends_silently_with_its_reader():
    """Bug: `| head` makes it end with an error."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, explain.ROOT / "tools" / "explain.py"]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (run.returncode, run.stderr) == (0, "")


# ---------------------------------------------------------------------------- benchmark

@pytest.fixture
def quick(monkeypatch):
    """The benchmark once instead of ten times, and as it runs: without gradients."""
    monkeypatch.setattr(benchmark, "PAIRS", 1)
    monkeypatch.setattr(benchmark, "COPY_BYTES", 2**20)
    with torch.no_grad():
        yield


def test_benchmark_times_both(quick):
    """Bug: a row is missing, or has a time of one side only."""
    rows = benchmark.rows_of("tiny", "cpu", torch.float32, benchmark.copy_bandwidth("cpu"))
    assert [row.what for row in rows] == [
        "loading, file in memory",
        "vision, 224 x 224",
        "vision, 448 x 448",
        "first token of 128",
        "decode, per token",
    ]
    for row in rows:
        assert len(row.ours) == len(row.hf) == 1
        assert row.text().count("|") == 8


def test_token_is_timed_without_prompt_and_capture(monkeypatch):
    """Bug: what happens once for an answer counts into every one of its tokens."""
    monkeypatch.setattr(benchmark, "seconds", lambda run, device: run())
    assert benchmark.seconds_per_token(lambda n: 100 + 3 * n, "cpu", count=8) == 3


def test_outputs_that_disagree_get_no_ratio(quick, monkeypatch):
    """Bug: the time of an answer that is wrong counts."""
    made = benchmark.ours_of

    def wrong(hf):
        ours = made(hf)
        ours.model.norm.eps = 0.1
        return ours

    monkeypatch.setattr(benchmark, "ours_of", wrong)
    for size in ("host", "tiny"):
        with pytest.raises(ValueError, match=f"{size}: logits differ by .*; no ratio"):
            benchmark.rows_of(size, "cpu", torch.float32, bandwidth=1.0)


def test_graph_that_differs_gets_no_ratio(quick, monkeypatch):
    """Bug: nothing notices a graph that repeats the step it was captured from. Here the step stands for it.
    """
    pair = benchmark.make_pair("host", "cpu", torch.float32, most=2)
    monkeypatch.setattr(benchmark, "capture", lambda step, cache: step)
    benchmark.check_graph(pair, context=20)

    def stale(step, cache):
        logits = step()

        def replay():
            cache.length += 1
            return logits
        return replay

    monkeypatch.setattr(benchmark, "capture", stale)
    with pytest.raises(ValueError, match="host: in step 0 the logits of the graph .*; no ratio"):
        benchmark.check_graph(pair, context=20)
