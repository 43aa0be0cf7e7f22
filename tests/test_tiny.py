"""The tiny checkpoint: its files, what it can do, and that Hugging Face's classes read it as we do."""

import json
import re
from pathlib import Path
from trace import hf_inputs

import torch
import train_tiny
from conftest import assert_equal
from transformers import Qwen2_5_VLForConditionalGeneration

from generate import generate
from load_weights import load_generation_config, load_model
from processing import load_processor

TINY = Path(__file__).parent.parent / "tiny"


def test_engines_disagree_about_the_tiny_checkpoint():
    """Our dict equals Hugging Face's parts' tensors, and from it both models say the same, token by token."""
    ours, processor = load_model(TINY, dtype="float32"), load_processor(TINY)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    questions = list(train_tiny.asked(0, 10, ("describe", "locate", "count", "color", "every", "compare")))
    assert len(questions) >= 50
    for pair in questions:
        messages = train_tiny.conversation(*pair)
        mine, inputs = processor(messages), hf_inputs(TINY, messages)
        assert mine.keys() == inputs.keys()
        for name, value in inputs.items():
            assert_equal("inputs of the tiny checkpoint", mine[name], value)
        theirs.model.rope_deltas = None
        expected = theirs.generate(**mine, max_new_tokens=256)[0, inputs["input_ids"].shape[1]:]
        answer = torch.cat(list(generate(ours, mine, **load_generation_config(TINY))))
        assert_equal("tokens of the tiny checkpoint, in float32", answer, expected)


def test_tiny_has_forgotten(tmp_path, capsys, monkeypatch):
    """In its own bfloat16, as it is used, by the command whose table of 500 scenes the README shows."""
    monkeypatch.setattr("sys.argv", ["train_tiny.py", "--evaluate", "tiny", "--scenes", "10", "--seed", "9",
                                     "--failures", str(tmp_path / "wrong.png")])
    train_tiny.main()
    reached = [float(share) for share in re.findall(r"\| ([\d.]+)% \|", capsys.readouterr().out)]
    assert len(reached) == 8 and min(reached) >= 70 and sum(reached) / 8 >= 95
    assert (tmp_path / "wrong.png").exists()


def test_files_are_large_or_incomplete():
    sizes = {file.name: file.stat().st_size for file in TINY.iterdir()}
    assert sizes.keys() == {
        "config.json", "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert sum(sizes.values()) <= 6_000_000
    model = load_model(TINY)
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    config = json.loads((TINY / "config.json").read_text())
    published = set(train_tiny.vision.VisionConfig.__dataclass_fields__)
    assert published <= config["vision_config"].keys()


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
