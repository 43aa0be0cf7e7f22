"""tools/cases.py and tools/random_checkpoint.py: questions with known answers, and a judge that notices."""

import dataclasses
import json

import cases
import compare
import pytest
import torch
from hugging_face import hf_inputs
from random_checkpoint import random_checkpoint
from test_compare import doubled_sections
from transformers import Qwen2_5_VLForConditionalGeneration

import model as decoder
import rope
import sampling
from load_weights import load_processor
from sampling import generate

# ---------------------------------------------------------------------------- the tiny checkpoint's cases

@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A folder of cases, of fewer scenes than usual, and what stands in it."""
    folder = tmp_path_factory.mktemp("cases")
    with pytest.MonkeyPatch.context() as patch:
        for name, number in dict(SCENES=2, PAIRS=2, VIDEOS=1).items():
            patch.setattr(cases, name, number)
        assert cases.main([str(folder)]) == 0
    return folder, json.loads((folder / "cases.json").read_text())


def say(folder, changes):
    """A file of our own answers with some changed, or left out where the change is None."""
    known = json.loads((folder / "cases.json").read_text())["cases"]
    answers = {one["id"]: one["ours"] for one in known} | changes
    file = folder / "answers.json"
    file.write_text(json.dumps({name: said for name, said in answers.items() if said is not None}))
    return [str(folder), str(file)]


def test_cases_hold_all_that_an_engine_needs(few):
    """Bug: a kind of question that is missing, a file that is not there, an answer of another seed."""
    folder, said = few
    kinds = {one["kind"] for one in said["cases"]}
    assert kinds == {"describe", "locate", "count", "two pictures", "video at 2 fps", "video at 4 fps",
                     "text alone", "resized", "padded batch"}
    for one in said["cases"]:
        for item in one["content"]:
            assert item["type"] == "text" or (folder / item[item["type"]]).exists()
            assert (item["type"] == "video") == ("fps" in item)
        assert (one["truth"] is None) == (not one["content"][:-1])
        assert isinstance(one["ours"], str)

    # Rows of a batch are answered as they are alone.
    ours = {one["id"]: one["ours"] for one in said["cases"]}
    batch = [name for name in ours if name.startswith("batch-")]
    assert len(batch) == 4 and all(ours[name] == ours[name.removeprefix("batch-")] for name in batch)


def test_a_seed_is_a_folder(few, tmp_path, monkeypatch):
    """Bug: cases that differ from run to run, so that answers cannot be kept."""
    for name, number in dict(SCENES=2, PAIRS=2, VIDEOS=1).items():
        monkeypatch.setattr(cases, name, number)
    again = cases.tiny_cases(tmp_path, 0)
    folder, said = few
    assert [one | dict(ours=None) for one in said["cases"]] == [one | dict(ours=None) for one in again]
    for file in tmp_path.rglob("*.png"):
        assert file.read_bytes() == (folder / file.relative_to(tmp_path)).read_bytes()


def test_answers_are_judged_by_kind(few, capsys):
    """Bug: an answer that is missing or wrong, and nobody says so."""
    folder, said = few
    truth = {one["id"]: one["truth"] for one in said["cases"]}
    assert compare.main(say(folder, {})) == 0
    assert "count            2 of 2 as ours, 2 right (ours: 2 of 2)\n" in capsys.readouterr().out

    assert compare.main(say(folder, {"count-00": "many", "describe-01": None})) == 1
    out = capsys.readouterr().out
    different = f"count-00: 'many', ours '{truth['count-00']}'"
    assert f"count            1 of 2 as ours, 1 right (ours: 2 of 2); {different}\n" in out
    assert "describe         1 of 2 as ours, 1 right (ours: 1 of 1); MISSING: describe-01\n" in out

    assert compare.main(say(folder, {"describe-01": None})) == 1
    capsys.readouterr()

    assert compare.main([str(folder), str(folder / "nowhere.json")]) == 2
    assert "a JSON file of answers" in capsys.readouterr().err


def test_a_box_is_right_if_it_overlaps():
    """Bug: a box one pixel off counts as wrong, or one around another thing as right."""
    box = '[{"bbox_2d": [10, 10, 50, 50], "label": "red star"}]'
    assert cases.is_right(box, box.replace("[10, 10,", "[12, 11,"))
    assert not cases.is_right(box, box.replace("red", "blue"))
    assert not cases.is_right(box, box.replace("[10, 10,", "[40, 40,"))
    assert not cases.is_right(box, "a red star") and cases.is_right("2", " 2\n")


# ---------------------------------------------------------------------------- the random judge

@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The folder of the random checkpoint, its model, its cases and their inputs."""
    folder = tmp_path_factory.mktemp("random")
    model = random_checkpoint(folder)
    asked = cases.random_cases(folder)
    cases.answer(folder, model, load_processor(folder), asked, max_new_tokens=cases.RANDOM_TOKENS)
    inputs = {one["id"]: cases.inputs_of(folder, load_processor(folder), [one]) for one in asked}
    return folder, model, {one["id"]: one["ours"] for one in asked}, inputs


def differs(judge, name):
    """Whether the model, as it is now, answers a case otherwise."""
    _, model, ours, inputs = judge
    for token, said in zip(generate(model, inputs[name], cases.RANDOM_TOKENS), ours[name], strict=True):
        if token.item() != said:
            return True
    return False


def test_random_answers_are_long_and_varied(judge):
    """Bug: a judge that says one word again and again, or an end token, or ids beyond the tokenizer's."""
    _, _, ours, _ = judge
    assert ours.keys() == {"picture", "pictures", "video-at-1", "video-at-2", "video-at-4"}
    for ids in ours.values():
        assert len(ids) == 40 and len(set(ids)) >= 20 and max(ids) < 438
    assert len({tuple(ids) for ids in ours.values()}) == 5


def test_hugging_face_reads_the_random_checkpoint_and_agrees(judge):
    """Bug: a file that others cannot read, or answers that only we give."""
    folder, _, ours, _ = judge
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for one in cases.random_cases(folder)[:2]:
        content = [item | {"image": str(folder / item["image"])} if "image" in item else item
                   for item in one["content"]]
        inputs = hf_inputs(folder, [{"role": "user", "content": content}])
        hf.model.rope_deltas = None
        ids = hf.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None)
        assert ids[0, inputs["input_ids"].shape[1]:].tolist() == ours[one["id"]]


# What engines take for the seconds between frame pairs, whatever they really are.
RULES = {
    "seconds truncated, as HF 4.57.6": lambda interval: int(interval),
    "seconds ignored, as mlx-vlm": lambda interval: 0.5,
    "rate fixed, as OpenVINO": lambda interval: 1.0,
}


@pytest.mark.parametrize("seconds", RULES.values(), ids=RULES)
def test_every_rule_for_seconds_is_told_apart(judge, monkeypatch, seconds):
    """Bug: a judge that answers the same whatever the times of a video are, as the tiny checkpoint does."""
    positions = rope.item_positions
    monkeypatch.setattr(rope, "item_positions", lambda start, item, *sizes: positions(
        start, (*item[:3], seconds(item[3])), *sizes))
    same = {1: seconds(2.0) == 2.0, 2: seconds(1.0) == 1.0, 4: seconds(0.5) == 0.5}
    for fps, right in same.items():
        assert differs(judge, f"video-at-{fps}") != right, fps


@pytest.mark.parametrize("fps", [1, 2, 4])
def test_text_that_resumes_too_early_is_noticed(judge, monkeypatch, fps):
    """Bug: text after a video begins by its larger side, as in HF 5.23.0, and the judge agrees."""
    right = rope.prompt_positions

    def resume_by_side(*args):
        positions, _ = right(*args)
        last = max(i for i, (t, h, w) in enumerate(positions) if not t == h == w)      # of the video
        start = 1 + max(positions[last][1:])
        following = start + len(positions) - last - 1
        return positions[:last + 1] + [[p] * 3 for p in range(start, following)], following

    monkeypatch.setattr(rope, "prompt_positions", resume_by_side)
    assert differs(judge, f"video-at-{fps}")


def windows_left_out(model, patch):
    config = dataclasses.replace(model.visual.config, fullatt_block_indexes=tuple(range(4)))
    patch.setattr(model.visual, "config", config)


def tanh_gelu(model, patch):
    patch.setattr(model.visual.merger.mlp[1], "approximate", "tanh")


def sections_doubled(model, patch):
    patch.setattr(decoder, "mrope_rotary", doubled_sections)


def one_position_too_far(model, patch):
    step = sampling.decode_step
    patch.setattr(sampling, "decode_step", lambda model, token, position, mask, cache: step(
        model, token, position + 1, mask, cache))


@pytest.mark.parametrize("bug", [windows_left_out, tanh_gelu, sections_doubled, one_position_too_far])
def test_the_random_judge_notices(judge, monkeypatch, bug):
    """Bug: all answers stay the same with it, or nearly all, as the tiny checkpoint's do."""
    bug(judge[1], monkeypatch)
    assert differs(judge, "picture") and differs(judge, "pictures")
