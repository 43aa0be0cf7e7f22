"""The scripts in tools/, each run as its docstring says."""

import json

import benchmark
import boxes
import bugs
import explain
import pytest
import scenes
import torch
import train_tiny
from PIL import Image

from processing import load_processor


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


def batch_of(kind):
    batches = train_tiny.Batches(load_processor("tiny"), seed=5, size=6, steps=40)
    return next(batch for batch in map(batches.__getitem__, range(20, 40))
                if kind in {asked for asked, *_ in batch["answers"]})


@pytest.mark.parametrize("kind", train_tiny.KINDS)
def test_tree_differs_from_the_conversation_it_stands_for(kind):
    """What a branch is trained on is what the processor makes of that question alone: ids, positions, logits.
    """
    trainer, batch = train_tiny.Trainer(train_tiny.load_config("tiny"), seed=0, rate=0.0), batch_of(kind)
    trainer.model.float()
    t, h, w = batch["grid"]
    pixels = batch["pixels"].unflatten(0, (len(batch["input_ids"]), -1))
    name, extra = ("video", dict(second_per_grid_ts=[1.0])) if batch["video"] else ("image", {})
    with torch.no_grad():
        logits = trainer.forward(batch)
        _, b, place = next(answer for answer in batch["answers"] if answer[0] == kind)
        ids = batch["input_ids"][b, batch["visible"][b, place.stop - 1]][None]
        causal = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
        trainer.attend.mask = torch.zeros(causal.shape).masked_fill(causal, -1e30)[None, None]
        expected = trainer.model(ids, **extra, **{
            "pixel_values_videos" if batch["video"] else "pixel_values": pixels[b],
            f"{name}_grid_thw": torch.tensor([[t, h, w]] * batch["pictures"])})
    assert torch.allclose(logits[b, place], expected[0, place.start - place.stop:], atol=1e-4)
    assert f"{batch['pictures']} {name}" == {"video": "1 video", "compare": "2 image"}.get(kind, "1 image")


def test_target_of_another_token_or_thing():
    """Labels spell the answer, and a color word points at a thing of that color."""
    processor, colors = load_processor("tiny"), list(scenes.COLORS)
    batch, looked_at = batch_of("every"), 0
    for kind, b, place in batch["answers"]:
        labels, points, things = batch["labels"][b, place], batch["points"][b, place], batch["targets"][b]
        said = processor.decode(labels[labels != train_tiny.UNKNOWN])
        for box, label in boxes.read_boxes(said):
            here = things[(things[:, 3:7] == torch.tensor(box)).all(dim=1)]
            assert label == f"{colors[here[0, 2] - 1]} {scenes.SHAPES[here[0, 1] - 1]}"
        for token, number in zip(labels.tolist(), points.tolist()):
            word = processor.decode([token]).strip() if token != train_tiny.UNKNOWN else ""
            if word in colors:
                assert colors[things[things[:, 0] == number][0, 2] - 1] == word, (kind, said)
                looked_at += 1
    assert looked_at > 20


def test_motion_leaves_the_picture_or_goes_elsewhere():
    for seed in range(30):
        seen = scenes.motion(train_tiny.random.Random(seed), 140, 112, 6)
        x, y = seen.offset(5)
        assert {"left": x < 0, "right": x > 0, "up": y < 0, "down": y > 0}[seen.way]
        for frame in range(6):
            x1, y1, x2, y2 = scenes.shifted(seen.scene.things[seen.moving].box, *seen.offset(frame))
            assert 0 <= x1 < x2 <= 140 and 0 <= y1 < y2 <= 112


def test_training_does_not_resume(tmp_path, capsys):
    settings = dict(seed=1, tower_steps=1, size=2, rate=1e-3)
    train_tiny.train(tmp_path, steps=3, **settings)
    first, again = (train_tiny.Batches(load_processor(tmp_path), 1, 2, 3)[1] for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in ("input_ids", "pixels", "visible"))
    train_tiny.train(tmp_path, steps=4, **settings)
    assert "on from step 3" in capsys.readouterr().err
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [3, 4]
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_f1_counts_a_box_twice():
    one, two = (f'{{"bbox_2d": [0, 0, 40, 40], "label": "red {shape}"}}' for shape in ("circle", "star"))
    question = lambda expected: scenes.Question("every", "", [(expected, 0)])
    f1 = lambda expected, got: train_tiny.f1([train_tiny.Answer(question(expected), None, got)])
    assert f1(one, one) == 1 and f1(one, one + one) == pytest.approx(2 / 3) and f1(one, two) == 0
    assert train_tiny.iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)


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
