"""The tiny checkpoint: its files, what it can do, that Hugging Face's classes read it as we do. And what made
it: scenes, training, evaluation.
"""

import copy
import itertools
import json
import random
import re
import shutil
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import boxes
import evaluate_tiny
import numpy as np
import pytest
import scenes
import torch
import train_tiny
from conftest import TINY, assert_equal, write
from hugging_face import hf_inputs, hf_logits
from transformers import Qwen2_5_VLForConditionalGeneration

from load_weights import load_config, load_generation_config, load_model, load_processor
from sampling import generate
from vision import VisionConfig

# ---------------------------------------------------------------------------- the checkpoint

STILL = [kind for kind in scenes.KINDS if kind != "video"]


def kind_of(asked):
    question, _ = asked
    return question.kind


def their_tiny(dtype, attention="sdpa"):
    """The tiny checkpoint as Hugging Face loads it."""
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=dtype, attn_implementation=attention)
    return hf.eval().requires_grad_(False)


def test_engines_agree_about_the_tiny_checkpoint():
    """Bug: from its files we make other inputs than Hugging Face's parts, or another answer, in any token."""
    ours = load_model(TINY, dtype="float32")
    theirs = their_tiny(torch.float32)
    processor = load_processor(TINY)
    settings = load_generation_config(TINY)
    conversations = defaultdict(list)
    for question, sample in evaluate_tiny.asked(0, 10, STILL):
        conversations[question.kind].append(scenes.conversation(question, sample))
    assert sum(map(len, conversations.values())) >= 50

    for same_kind in conversations.values():
        for messages in same_kind:
            inputs = processor(messages)
            expected = hf_inputs(TINY, messages)
            assert inputs.keys() == expected.keys()
            for name, value in expected.items():
                assert_equal("inputs of the tiny checkpoint", inputs[name], value)

        # The answers, as a padded batch: those to questions of one kind are about equally long.
        inputs = processor(same_kind)
        theirs.model.rope_deltas = None     # left over from the kind before
        T = inputs["input_ids"].shape[1]
        said = theirs.generate(**inputs, max_new_tokens=256)[:, T:]
        answers = torch.stack(list(generate(ours, inputs, **settings)), dim=1)
        assert_equal("tokens of the tiny checkpoint, in float32", answers, said)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfloat16_is_as_near_to_float32_as_hugging_faces(attention):
    """Bug: something is rounded to bfloat16 that Hugging Face keeps in float32, anywhere in the model.

    The measure is the error's root mean square over all logits of a prompt, as a share of Hugging Face's.
    """
    ours = load_model(TINY, dtype="bfloat16", attention=attention)
    theirs = their_tiny(torch.bfloat16, attention)
    exact = their_tiny(torch.float32, attention)

    processor = load_processor(TINY)
    shares = []
    for question, sample in itertools.islice(evaluate_tiny.asked(0, 16, STILL), 16):
        inputs = processor(scenes.conversation(question, sample))
        expected = hf_logits(exact, inputs)
        our_error = (ours(**inputs) - expected).pow(2).mean().sqrt()
        their_error = (hf_logits(theirs, inputs) - expected).pow(2).mean().sqrt()
        shares.append((our_error / their_error).item())
    assert len(shares) == 16
    assert statistics.median(shares) <= 1.1


def test_tiny_knows_its_shapes(tmp_path, monkeypatch, capsys):
    """Bug: it has forgotten them, in its own bfloat16, as it is used. The README's table is of 500 scenes."""
    # Questions of one kind at a time: a batch takes as long as its longest answer.
    asked = evaluate_tiny.asked
    monkeypatch.setattr(evaluate_tiny, "BATCH", 10)
    monkeypatch.setattr(evaluate_tiny, "asked", lambda *scenes: iter(sorted(asked(*scenes), key=kind_of)))

    wrong = tmp_path / "wrong.png"
    evaluate_tiny.main(["tiny", "--scenes", "10", "--seed", "9", "--failures", str(wrong)])
    reached = [float(share) for share in re.findall(r"\| ([\d.]+)% \|", capsys.readouterr().out)]
    assert len(reached) == 8
    assert min(reached) >= 70
    assert sum(reached) / len(reached) >= 95
    assert wrong.stat().st_size > 5000


def test_files_are_small_and_complete():
    """Bug: a file of a published checkpoint is missing, or the repository grows by megabytes."""
    sizes = {file.name: file.stat().st_size for file in TINY.iterdir()}
    assert sizes.keys() == {
        "config.json", "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert sum(sizes.values()) <= 6_000_000

    parameters = list(load_model(TINY).parameters())
    assert sum(p.numel() for p in parameters) <= 3_000_000
    assert {p.dtype for p in parameters} == {torch.bfloat16}

    # Nothing falls back on a default.
    config = json.loads((TINY / "config.json").read_text())
    assert VisionConfig.__dataclass_fields__.keys() <= config["vision_config"].keys()


# ---------------------------------------------------------------------------- scenes

def test_thing_moves_its_way_inside_the_picture():
    """Bug: it goes elsewhere, or leaves the picture."""
    for seed in range(30):
        motion = scenes.motion(random.Random(seed), 140, 112, 6)
        x, y = motion.offset(5)
        assert {"left": x < 0, "right": x > 0, "up": y < 0, "down": y > 0}[motion.way]
        for frame in range(6):
            x1, y1, x2, y2 = motion.boxes(*motion.offset(frame))[motion.moving]
            assert 0 <= x1 < x2 <= 140
            assert 0 <= y1 < y2 <= 112


# ---------------------------------------------------------------------------- training

@pytest.fixture
def narrow(tmp_path):
    """A copy of tiny/ without weights, for a model that trains in no time: a step of Muon on a CPU that has
    no instructions for bfloat16 takes seconds at tiny's own widths.
    """
    directory = tmp_path / "narrow"
    shutil.copytree(TINY, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((directory / "config.json").read_text())
    config |= dict(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    config["vision_config"] |= dict(
        depth=1,
        fullatt_block_indexes=[0],
        hidden_size=32,
        intermediate_size=32,
        num_heads=1,
        out_hidden_size=64,
    )
    return write(directory, config)


def batch_of(kind, size=6):
    """A batch in which a question of this kind is asked."""
    batches = train_tiny.Batches(load_processor(TINY), seed=5, size=size, steps=40)
    for step in range(20, 40):
        batch = batches[step]
        if any(place.kind == kind for place in batch.places):
            return batch
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_branch_equals_the_conversation_it_stands_for(kind):
    """Bug: a branch is trained on other ids, positions or visible tokens than the question has alone."""
    batch = batch_of(kind)
    trainer = train_tiny.Trainer(load_config(TINY), seed=0, rate=0.0)
    _, row, tokens = next(place for place in batch.places if place.kind == kind)
    assert batch.is_video == (kind == "video")
    assert batch.pictures == (2 if kind == "compare" else 1)

    # The question alone: what its last token sees, and the pictures of its row.
    ids = batch.input_ids[row, batch.visible[row, tokens.stop - 1]][None]
    pixels = batch.pixels.unflatten(0, (len(batch.input_ids), -1))[row]
    grids = torch.tensor([batch.grid] * batch.pictures)
    if batch.is_video:
        media = dict(pixel_values_videos=pixels, video_grid_thw=grids, second_per_grid_ts=[1.0])
    else:
        media = dict(pixel_values=pixels, image_grid_thw=grids)
    later = torch.ones(ids.shape[1], ids.shape[1]).triu(1)

    with torch.no_grad():
        logits = trainer.forward(batch)[row, tokens]
        trainer.attend.mask = (-1e30 * later)[None, None]
        expected = trainer.model(ids, **media)[0, -len(logits):]
    assert torch.allclose(logits, expected, atol=1e-4)


def test_targets_are_of_the_thing_spoken_of():
    """Bug: labels don't spell the answer, a target is another thing's, or a color word points at another."""
    processor = load_processor(TINY)
    batch = batch_of("every")
    colors = list(scenes.COLORS)
    looked_at = 0
    for _, row, tokens in batch.places:
        labels = batch.labels[row, tokens]
        points = batch.points[row, tokens]
        targets = train_tiny.columns(batch.targets[row], train_tiny.TARGETS)

        # Every box of the answer is that of a cell, which is of the thing that the label names.
        said = processor.decode(labels[labels != train_tiny.UNKNOWN])
        for box, label in boxes.read_boxes(said):
            cell = (targets["box"] == torch.tensor(box)).all(dim=1).nonzero()[0].item()
            color = colors[targets["color"][cell] - 1]
            shape = scenes.SHAPES[targets["shape"][cell] - 1]
            assert label == f"{color} {shape}"

        for token, number in zip(labels.tolist(), points.tolist(), strict=True):
            word = "" if token == train_tiny.UNKNOWN else processor.decode([token]).strip()
            if word in colors:
                cell = (targets["thing"] == number).nonzero()[0].item()
                assert colors[targets["color"][cell] - 1] == word
                looked_at += 1
    assert looked_at > 20


def test_batch_is_the_same_for_a_seed():
    """Bug: a run that goes on is not the run that was interrupted."""
    first, again = (train_tiny.Batches(load_processor(TINY), seed=1, size=2, steps=3)[1] for _ in range(2))
    other = train_tiny.Batches(load_processor(TINY), seed=2, size=2, steps=3)[1]
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.pixels[:100], other.pixels[:100])


def test_interrupted_training_goes_on(narrow, tmp_path, monkeypatch, capsys):
    """Bug: a second run begins anew, or its log does."""
    taken = []
    step = train_tiny.Trainer.step

    def noted(trainer, batch, *rest):
        taken.append(batch.step)
        return step(trainer, batch, *rest)

    monkeypatch.setattr(train_tiny.Trainer, "step", noted)
    monkeypatch.setattr(train_tiny, "TINY", narrow)
    work = tmp_path / "work"
    settings = dict(seed=1, tower_steps=1, size=2, rate=1e-3)
    train_tiny.train(work, steps=3, **settings)
    assert "on from step" not in capsys.readouterr().err
    train_tiny.train(work, steps=4, **settings)
    assert "on from step 3" in capsys.readouterr().err
    assert taken == [0, 1, 2, 3]

    log = (work / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [3, 4]
    assert (work / "loss.png").stat().st_size > 5000
    load_model(work)


def test_restored_trainer_takes_the_same_step(narrow):
    """Bug: training goes on without its masters, its weights or what its optimizers remember."""
    batch = batch_of("describe", size=2)
    config = load_config(narrow)
    trainer = train_tiny.Trainer(config, seed=0, rate=1e-3)
    trainer.step(batch, tower_only=False, progress=0.5)
    restored = train_tiny.Trainer(config, seed=1, rate=1e-3)
    assert restored.restore(copy.deepcopy(trainer.state(1))) == 1

    for each in (trainer, restored):
        each.step(batch, tower_only=False, progress=0.5)
    for master, other in zip(trainer.masters, restored.masters, strict=True):
        assert torch.equal(master, other)


def test_start_begins_with_the_checkpoints_weights(tmp_path):
    """Bug: `--start` trains from nothing, or what it saves is not what it trained."""
    train_tiny.train(tmp_path, seed=1, steps=1, tower_steps=1, size=2, rate=0.0, start=TINY)
    ours = load_model(tmp_path).state_dict()
    for name, weight in load_model(TINY).state_dict().items():
        assert torch.equal(ours[name], weight), name


def test_recipe_for_a_shape_of_your_own_draws_it():
    """Bug: the page's two edits don't fit the file any more, or draw another shape."""
    page = (TINY.parent / "docs" / "tiny.md").read_text(encoding="utf-8")
    shapes, corners = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    source = Path(scenes.__file__).read_text(encoding="utf-8")
    source, first = re.subn(r"^SHAPES = .*\n", shapes, source, flags=re.MULTILINE)
    source, second = re.subn(r"^    else:       # a star", rf"{corners}\g<0>", source, flags=re.MULTILINE)
    assert (first, second) == (1, 1)

    edited = ModuleType("scenes_with_diamonds")
    sys.modules[edited.__name__] = edited       # where a dataclass looks its module up
    exec(source, edited.__dict__)
    mask = np.asarray(edited.shape_mask("diamond", 21, smooth=False)) > 0
    assert mask[0].sum() <= 3 and mask[10].all() and mask[20].sum() <= 3
    assert "diamond" in {thing.shape for seed in range(9) for thing in edited.make_sample(
        random.Random(seed), "picture", 168, 168, 4).scenes[0].things}


# ---------------------------------------------------------------------------- evaluation

def test_box_is_found_once():
    """Bug: a box that is said twice counts twice, or one with another label counts."""
    circle = '{"bbox_2d": [0, 0, 40, 40], "label": "red circle"}'
    star = '{"bbox_2d": [0, 0, 40, 40], "label": "red star"}'
    question = scenes.Question("every", "", [(circle, 0)])
    for got, expected in ((circle, 1), (circle + circle, 2 / 3), (star, 0)):
        answer = evaluate_tiny.Answer(question, None, got)
        assert evaluate_tiny.f1([answer]) == pytest.approx(expected)
        assert evaluate_tiny.good(answer) == (expected == 1)


def test_iou_is_intersection_over_union():
    """Bug: the overlap is divided by one box, or boxes that don't meet overlap."""
    assert evaluate_tiny.iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert evaluate_tiny.iou((0, 0, 10, 10), (20, 20, 30, 30)) == 0
