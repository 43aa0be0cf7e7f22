"""The scripts in tools/, each run as its docstring says."""

import json
import os
import subprocess
import sys

import benchmark
import boxes
import bugs
import explain
import pytest
import torch
from PIL import Image

# ---------------------------------------------------------------------------- boxes

@pytest.mark.parametrize("answer, expected", [
    ('```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "red circle"}]\n```', [((1, 2, 30, 40), "red circle")]),
    ('[{"label": "a", "bbox_2d": [1, 2, 3, 4]}, {"bbox_2d":[5,6,7,8]}]',
     [((1, 2, 3, 4), "a"), ((5, 6, 7, 8), "")]),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6', [((1, 2, 3, 4), "a")]),
    ('[{"bbox_2d": [1, 2, 3], "label": "a"}, {"bbox_2d": "x"}, {not json}]', []),
    ("```json\n[]\n```", []),
], ids=["fenced", "listed", "cut off", "broken", "none"])
def test_boxes_are_read_from_any_answer(answer, expected):
    """Bugs: boxes of an answer that was cut off are lost, or a broken one ends in a traceback."""
    assert boxes.read_boxes(answer) == expected


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


# ---------------------------------------------------------------------------- explain

def test_explanation_has_this_runs_numbers(capsys):
    """Bug: a number is another run's. The demo: 168 x 224 pixels, 12 x 16 patches, 48 tokens."""
    assert explain.main([]) == 0
    out = capsys.readouterr().out
    for expected in (
        "original: 224 x 168 pixels\n",
        "grid: 1 x 12 x 16 patches (time, rows, columns), 48 tokens; "
        "windows in each frame: 2 of 64 patches, 2 of 32 patches\n",
        "prompt: 73 tokens, 48 of them",
        "token 62 at (15, 20, 22), token 63 at (23, 23, 23)",
        "slot 73, at position 33",
        "1,280 bytes per token",
        "first token: 'a' ",
    ):
        assert expected in out
    assert explain.main(["--image", "nowhere.png"]) == 2


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
    rows = benchmark.rows_of("host", "cpu", torch.float32, benchmark.copy_bandwidth("cpu"))
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
