"""The scripts in tools/, each run as its docstring says."""

import json

import benchmark
import boxes
import bugs
import explain
import pytest
import torch
from PIL import Image


@pytest.mark.parametrize("answer, expected", [
    ('```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "red circle"}]\n```', [((1, 2, 30, 40), "red circle")]),
    ('[{"label": "a", "bbox_2d": [1, 2, 3, 4]}, {"bbox_2d":[5,6,7,8]}]',
     [((1, 2, 3, 4), "a"), ((5, 6, 7, 8), "")]),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6', [((1, 2, 3, 4), "a")]),
    ('[{"bbox_2d": [1, 2, 3], "label": "a"}, {"bbox_2d": "x"}, {not json}]', []),
    ("```json\n[]\n```", []),
])
def test_boxes_read_wrongly(answer, expected):
    assert boxes.read_boxes(answer) == expected


def test_boxes_drawn_in_resized_pixels(tmp_path, capsys, monkeypatch):
    """A picture that is twice as high as the model sees it: the box on paper is, too."""
    Image.new("RGB", (224, 336)).save(tmp_path / "in.png")
    answer = '[{"bbox_2d": [10, 20, 50, 60], "label": "thing"}]'
    monkeypatch.setattr(boxes, "locate", lambda *args, **settings: (answer, (168, 224)))
    arguments = [str(tmp_path / "in.png"), "Locate every object.", str(tmp_path / "out.png")]
    assert boxes.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"bbox_2d": [10, 40, 50, 120], "label": "thing"}]
    assert boxes.main(arguments) == 0
    assert capsys.readouterr().out == "thing: 10, 40, 50, 120\n"
    drawn = Image.open(tmp_path / "out.png")
    assert drawn.getpixel((11, 100)) == (255, 255, 255) and drawn.getpixel((11, 30)) == (0, 0, 0)
    assert boxes.main(["nowhere.png", "x", str(tmp_path / "out.png")]) == 2


def test_bug_entries_are_stale():
    """Every line is found once and every test exists; that they catch the bugs is for the script to say."""
    tests = "".join(file.read_text() for file in bugs.ROOT.glob("tests/test_*.py"))
    for bug in bugs.BUGS:
        assert (bugs.ROOT / bug.file).read_text().count(bug.right) == 1, bug.name
        assert tests.count(f"def {bug.test}(") == 1, bug.name
    assert len({bug.name for bug in bugs.BUGS}) == len(bugs.BUGS)


def test_explanation_of_another_run(capsys):
    """The numbers that it prints, for the demo: 168 x 224 pixels, 12 x 16 patches, 48 tokens."""
    assert explain.main([]) == 0
    out = capsys.readouterr().out
    for expected in (
        "original: 224 x 168 pixels", "grid: 1 x 12 x 16 patches (time, rows, columns), 48 tokens; windows "
        "in each frame: 2 of 64 patches, 2 of 32 patches", "prompt: 73 tokens, 48 of them", "slot 73, at "
        "position 33", "token 62 at (15, 20, 22), token 63 at (23, 23, 23)", "1,280 bytes per token",
    ):
        assert expected in out
    assert explain.main(["--image", "nowhere.png"]) == 2


def test_ratio_of_outputs_that_disagree(monkeypatch):
    monkeypatch.setattr(benchmark, "PAIRS", 1)
    monkeypatch.setattr(benchmark, "COPY_BYTES", 2**20)
    with torch.no_grad():
        rows = benchmark.rows_of("host", "cpu", torch.float32, benchmark.copy_bandwidth("cpu"))
        assert [row.what.split(",")[0] for row in rows] == [
            "loading", "vision", "vision", "first token of 128", "decode"]
        assert all(row.text().count("|") == 8 and len(row.ours) == len(row.hf) == 1 for row in rows)

        made = benchmark.ours_of
        def wrong(hf):
            ours = made(hf)
            ours.model.norm.eps = 0.1
            return ours
        monkeypatch.setattr(benchmark, "ours_of", wrong)
        with pytest.raises(ValueError, match="host: logits differ by .*; no ratio for what does not agree"):
            benchmark.rows_of("host", "cpu", torch.float32, 1.0)
        with pytest.raises(ValueError, match="tiny: logits differ"):
            benchmark.rows_of("tiny", "cpu", torch.float32, 1.0)
