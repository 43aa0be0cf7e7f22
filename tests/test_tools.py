"""The scripts in tools/, each run as its docstring says."""

import json

import benchmark
import boxes
import bugs
import explain
import figures
import pytest
import torch
import train_tiny
from PIL import Image

from processing import load_processor
from vision import window_order


@pytest.mark.parametrize("answer, expected", [
    ('```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "red circle"}]\n```', [((1, 2, 30, 40), "red circle")]),
    ('{"bbox_2d": [1, 2, 30, 40.5], "label": "a"}', [((1, 2, 30, 40.5), "a")]),
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
    assert drawn.getpixel((10, 100)) == (255, 255, 255) and drawn.getpixel((10, 30)) == (0, 0, 0)
    assert boxes.main(["nowhere.png", "x", str(tmp_path / "out.png")]) == 2


def test_tree_differs_from_the_conversation_it_stands_for():
    """What a branch is trained on is what the processor makes of that question alone: ids, positions, logits.
    """
    processor = load_processor("tiny")
    batch = train_tiny.Batches(processor, seed=5, size=2, steps=1)[0]
    trainer = train_tiny.Trainer(train_tiny.load_config("tiny"), seed=0, rate=0.0)
    trainer.model.float()
    with torch.no_grad():
        logits = trainer.forward(batch)
        _, h, w = batch["grid"]
        for kind, b, start, stop in batch["answers"][:8]:
            picture = batch["pixels"].view(2, h * w, -1)[b]
            alone = batch["visible"][b, stop - 1]       # what the last token before <|im_end|> sees
            ids = batch["input_ids"][b, alone][None]
            trainer.attend.mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1]).masked_fill(
                torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool(), -1e30)
            expected = trainer.model(ids, pixel_values=picture, image_grid_thw=torch.tensor([[1, h, w]]))
            assert torch.allclose(logits[b, start:stop], expected[0, start - stop:], atol=1e-4), kind


def test_training_does_not_resume(tmp_path, capsys):
    settings = dict(seed=1, tower_steps=1, size=2, rate=1e-3)
    train_tiny.train(tmp_path / "whole", steps=3, **settings)
    first = train_tiny.Batches(load_processor("tiny"), 1, 2, 3)[1]
    again = train_tiny.Batches(load_processor("tiny"), 1, 2, 3)[1]
    assert all(torch.equal(first[name], again[name]) for name in ("input_ids", "pixels", "visible"))
    train_tiny.train(tmp_path / "whole", steps=4, **settings)
    assert "on from step 3" in capsys.readouterr().err
    log = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [3, 4]
    assert (tmp_path / "whole" / "loss.png").stat().st_size > 5000


def test_evaluation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_tiny.py", "--evaluate", "tiny", "--scenes", "3", "--seed", "9",
                                     "--failures", str(tmp_path / "wrong.png")])
    train_tiny.main()
    rows = capsys.readouterr().out.strip().splitlines()
    assert len(rows) == 9 and rows[2].startswith("| Describe the image. | exact | ")
    assert (tmp_path / "wrong.png").exists()


def test_f1_counts_a_box_twice():
    def answer(kind, expected, got):
        expected, got = train_tiny.boxes_answer(expected), train_tiny.boxes_answer(got)
        return train_tiny.Answer(kind, "", expected, got, None)
    box = (0, 0, 40, 40)
    one, two = train_tiny.Thing("red", "circle", box), train_tiny.Thing("red", "star", box)
    assert train_tiny.f1([answer("every", [one], [one])]) == 1
    assert train_tiny.f1([answer("every", [one], [one, one])]) == pytest.approx(2 / 3)
    assert train_tiny.f1([answer("every", [one], [two])]) == 0
    assert train_tiny.iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)


def test_bug_entries_are_stale():
    """Every line of tools/bugs.py is found once; that the tests catch them is for the script itself to say.
    """
    for bug in bugs.BUGS:
        assert (bugs.ROOT / bug.file).read_text().count(bug.right) == 1, bug.name
        assert len({bug.name for bug in bugs.BUGS}) == len(bugs.BUGS)


def test_figures_show_other_numbers(tmp_path):
    first, windows, prompt = (draw(tmp_path) for draw in figures.FIGURES)
    assert first["windows"].tolist() == [[0] * 4 + [1] * 4] * 4 + [[2] * 4 + [3] * 4] * 2
    assert len(first["boxes"]) >= 1
    order, _ = window_order(torch.tensor([[1, 12, 20]]), merge_size=2, window=4)
    assert torch.equal(windows["order"], order) and windows["full"] == [7, 15, 23, 31]
    numbers = windows["windows"].flatten()
    assert torch.equal(numbers[order], numbers.sort().values)
    assert prompt["positions"][:, 15:22].tolist() == [
        [15, 15, 15, 15, 15, 15, 18], [15, 15, 15, 16, 16, 16, 18], [15, 16, 17, 15, 16, 17, 18]]
    assert {file.name for file in tmp_path.iterdir()} == {"first.png", "windows.png", "positions.png"}


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
        with pytest.raises(ValueError, match="tiny: from the float32 logits|tiny: logits differ"):
            benchmark.rows_of("tiny", "cpu", torch.float32, 1.0)
