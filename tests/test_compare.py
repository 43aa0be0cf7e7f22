"""tools/compare.py: what it says about engines that are right, and about engines with one bug or two."""

import dataclasses
import os
import re

import compare
import numpy as np
import pytest
import rows
import scenes
import torch
from PIL import Image
from torch import nn

import rope
import sampling
import vision
from load_weights import checkpoint, load_config, load_model, load_processor
from model import Qwen2_5_VL

DEMO = "assets/demo.png"
PICTURE = [{"role": "user", "content": [{"image": DEMO}, {"text": "Describe the image."}]}]


@pytest.fixture(scope="module")
def engine():
    """engine() gives the rows of tiny/ as it is now, with whatever the test has broken."""
    model, processor = load_model("tiny", dtype="float32"), load_processor("tiny")

    def trace(messages=PICTURE, deep=False, model=model):
        return rows.trace_ours(model, processor(messages), deep)

    trace.model = model
    return trace


@pytest.fixture(scope="module")
def right(engine):
    return engine(deep=True)


def failing(ours, theirs, model, dtype="float32"):
    compared, missing = compare.compare(ours, theirs, dtype, model)
    assert not missing
    return [row.name for row in compared if row.fails]


def float16_patches(embed, x):
    """As a convolution does that first rounds the patches to float16."""
    return nn.functional.linear(x.half().float(), embed.proj.weight.flatten(1))


# ---------------------------------------------------------------------------- engines that are right

@pytest.fixture
def noise(tmp_path):
    """An uneven picture: several windows, ragged at both edges."""
    values = np.random.default_rng(0).integers(0, 256, (15, 19, 3), dtype=np.uint8)
    Image.fromarray(values).resize((532, 420), Image.Resampling.BICUBIC).save(tmp_path / "noise.png")
    return str(tmp_path / "noise.png")


@pytest.mark.parametrize("asked", [
    ["--deep"],
    ["--image", DEMO, "--prompt", "Which image has more objects?"],
    ["--prompt", "Describe the image.", "--prompt", "Hello", "--prompt", "And what is a star?"],
], ids=["picture", "two pictures", "padded batch"])
def test_no_step_of_hugging_face_leaves(asked, noise, tmp_path, capsys, request):
    """Any difference at all, on tiny/ or on the checkpoint of --checkpoint."""
    path = checkpoint(request.config.getoption("--checkpoint"))
    with torch.device("meta"):
        needed = 4 * sum(p.numel() for p in Qwen2_5_VL(load_config(path)).parameters())
    if needed > 0.8 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        pytest.skip(f"float32 takes {needed / 1e9:.0f} GB")

    files = [str(tmp_path / name) for name in ("ours.safetensors", "hf.safetensors")]
    for file, hf in zip(files, ([], ["--hf"])):
        assert compare.main([str(path), *hf, "-o", file, "--image", noise, *asked]) == 0
    capsys.readouterr()
    assert compare.main(files) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.endswith(f"{len(compare.load(files[0])[1])} rows compared\n"
                                            "no step differs by more than rounding\n")


def test_text_alone_is_compared(tmp_path, capsys):
    """A prompt without a picture has no rows of the tower, and is no error."""
    files = [str(tmp_path / name) for name in ("ours.safetensors", "hf.safetensors")]
    for file, hf in zip(files, ([], ["--hf"])):
        assert compare.main(["tiny", *hf, "-o", file, "--text", "--prompt", "Hello"]) == 0
    assert compare.main(files) == 0, capsys.readouterr().out


def test_other_shapes_of_the_same_numbers_are_accepted(right, engine, tmp_path):
    """A dump without batch axes, with the last tokens only, with fewer tokens, in window order, as .npz."""
    theirs = dict(right)
    for name in ("model.layers.0", "position_ids", "input_ids", "decode.1.position_ids"):
        theirs[name] = right[name].squeeze()
    for name in ("model.layers.4", "model.norm", "logits"):
        theirs[name] = right[name][0, -1]
    theirs["tokens"] = right["tokens"][0, :6].int()
    for n in (6, 7, 8):
        del theirs[f"decode.{n}.position_ids"], theirs[f"decode.{n}.logits"]
    order = right["visual.window_order"]
    for name in theirs:
        if name.startswith(("visual.blocks", "visual.merger")):
            theirs[name] = vision.reorder(right[name], order, len(right[name]) // len(order))

    np.savez(tmp_path / "theirs.npz", engine="x 1.0", **{name: x.numpy() for name, x in theirs.items()})
    header, read = compare.load(str(tmp_path / "theirs.npz"))
    assert header == {"engine": "x 1.0"} and read.keys() == theirs.keys()
    assert failing(right, read, engine.model) == []
    compared, _ = compare.compare(right, read, model=engine.model)
    said = {row.name: row.remark for row in compared}
    assert said["visual.blocks.2"] == said["visual.merger"] == "in window order"
    assert said["tokens"] == "6 of 6 alike"


def test_the_dump_on_the_page_for_authors_works(tmp_path, monkeypatch):
    """Bug: docs/engines.md shows code that does not run, or rows that nobody compares."""
    page = (compare.ROOT / "docs" / "engines.md").read_text()
    for name in rows.ORDER:
        assert name in page or name in (*compare.OPTIONAL, "inputs_embeds"), name
    dump, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(compare.ROOT / "tiny")
    assert compare.main(["tiny", "-o", "ours.safetensors"]) == 0
    exec(dump, {})
    assert compare.main(["ours.safetensors", "theirs.safetensors"]) == 0


def test_a_file_holds_all_that_an_engine_must_be_fed(tmp_path, engine):
    """Two pictures and a padded batch: the model's logits from the file's inputs are those in the file."""
    out = str(tmp_path / "ours.safetensors")
    assert compare.main(["tiny", "-o", out, "--image", DEMO, "--image", DEMO,
                         "--prompt", "Which image has more objects?", "--prompt", "Hello"]) == 0
    _, read = compare.load(out)
    inputs = {name: read[name] for name in rows.INPUTS if name in read}
    assert inputs["attention_mask"].min() == 0 and len(inputs["image_grid_thw"]) == 2
    assert torch.equal(engine.model(**inputs, position_ids=read["position_ids"]), read["logits"])


# ---------------------------------------------------------------------------- engines with a bug

def test_two_bugs_come_apart(engine, right, monkeypatch):
    """The second of two bugs hides behind the first, and a change of rounding reads like a formula."""
    monkeypatch.setattr(vision.PatchEmbed, "forward", float16_patches)
    monkeypatch.setattr(engine.model.visual.merger.mlp[1], "approximate", "tanh")
    theirs = engine(deep=True)
    monkeypatch.undo()

    compared, _ = compare.compare(right, theirs, model=engine.model)
    words = {row.name: row.words() for row in compared if row.fails}
    assert words.keys() == {"visual.patch_embed", "visual.merger"}
    assert all(said.startswith("ROUNDS MORE, or approximates") for said in words.values())
    lines, well = compare.summary(compared, [])
    assert not well and "the first that does not heal: visual.patch_embed" in lines
    assert next(row for row in compared if row.name == "logits").words() == "follows from above"


def test_windows_left_out_are_named_in_their_blocks(engine, right, monkeypatch):
    """Everything after the first block is reported, instead of the two blocks that have windows."""
    tower = engine.model.visual
    everywhere = dataclasses.replace(tower.config, fullatt_block_indexes=(0, 1, 2, 3))
    monkeypatch.setattr(tower, "config", everywhere)
    theirs = engine(deep=True)
    monkeypatch.undo()
    compared, _ = compare.compare(right, theirs, model=engine.model)
    words = {row.name: row.words() for row in compared if row.fails}
    assert words == {f"visual.blocks.{i}.attn.attended": "ANOTHER FORMULA" for i in (0, 2)}


def test_doubled_sections_are_named_by_the_finer_points(engine, right, monkeypatch):
    """Sections doubled, not repeated: without finer points a whole layer is left to read."""
    monkeypatch.setattr(rows.decoder, "mrope_rotary", doubled_sections)
    theirs = engine(deep=True)
    monkeypatch.undo()
    assert failing(right, theirs, engine.model) == [f"model.layers.{i}.self_attn.rotated" for i in range(5)]
    coarse = {name: x for name, x in theirs.items() if name.count(".") < 3 and name != "inputs_embeds"}
    fine = {name: x for name, x in right.items() if name in coarse}
    assert failing(fine, coarse, engine.model) == [f"model.layers.{i}" for i in range(5)]


def doubled_sections(position_ids, head_dim, theta, section, dtype):
    """[32, 48, 48] of 128 channels, so that the halves of a pair turn by different axes."""
    angles = position_ids[..., None].float() * rope.inv_freq(head_dim, theta, position_ids.device)
    axes = torch.cat((angles, angles), dim=-1).split([2 * n for n in section], dim=-1)
    angles = torch.cat([part[i] for i, part in enumerate(axes)], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def test_wrong_positions_of_a_video_are_named_alone(tmp_path, capsys):
    """Hugging Face 5.23.0's text after a video comes too early; its layers are right."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for i, frame in enumerate(scenes.motion(scenes.random.Random(3), 112, 112, 8).draw()):
        frame.save(folder / f"{i}.png")
    files = [str(tmp_path / name) for name in ("ours.safetensors", "hf.safetensors")]
    for file, hf in zip(files, ([], ["--hf"])):
        asked = ["--video", str(folder), "--fps", "1", "--image", DEMO]
        assert compare.main(["tiny", *hf, "-o", file, *asked]) == 0
    capsys.readouterr()
    assert compare.main(files) == 1
    assert capsys.readouterr().out.endswith("wrong by themselves: position_ids\n")


def test_an_answer_one_position_too_far_is_named_alone(engine, right, monkeypatch):
    """Only the tokens tell, and not where decoding left."""
    step = sampling.decode_step
    monkeypatch.setattr(sampling, "decode_step", lambda model, token, position, mask, cache: step(
        model, token, position.add_(0 if cache.length > 73 else 1), mask, cache))
    theirs = engine(deep=True)
    monkeypatch.undo()
    assert failing(right, theirs, engine.model) == ["decode.1.position_ids"]


def test_a_wrong_token_fails_and_a_tie_does_not(engine, right):
    """Greedy tokens part where two are equally good, which is nobody's bug."""
    wrong = right | dict(tokens=right["tokens"].clone())
    wrong["tokens"][0, 3] += 1
    assert "tokens" in failing(right, wrong, engine.model)

    x = right["logits"][0, -1]
    best, second = x.topk(2).indices.tolist()
    tied = load_model("tiny", dtype="float32")
    tied.model.embed_tokens.weight[second] = tied.model.embed_tokens.weight[best]
    ours = engine(model=tied)
    assert (first := ours["tokens"][0, 0].item()) in (best, second)
    theirs = engine(model=tied) | dict(tokens=ours["tokens"][:, :1].clone())
    theirs["tokens"][0, 0] = best + second - first
    theirs = {name: x for name, x in theirs.items() if not name.startswith("decode")}
    assert failing(ours, theirs, tied) == []


# ---------------------------------------------------------------------------- never a yes to nothing

def test_missing_rows_fail_unless_left_out(right, engine, tmp_path, capsys):
    """A file with nothing in common passes, or one whose author renamed a row."""
    header = dict(engine="ours", checkpoint="tiny", picture="a", dtype="float32")
    files = {name: str(tmp_path / name) for name in ("ours", "fewer", "none")}
    tensors = {name: x.clone().contiguous() for name, x in right.items()}
    compare.save_file(tensors, files["ours"], header)
    fewer = {name: x for name, x in tensors.items() if not name.startswith(("decode", "model.layers.3"))}
    compare.save_file(fewer, files["fewer"], header)
    compare.save_file({"other": torch.ones(3)}, files["none"], header)

    ours = files["ours"]
    assert compare.main([ours, files["none"]]) == 1
    assert "\n0 rows compared\nMISSING: input_ids, pixel_values" in capsys.readouterr().out
    everything = sorted({name.split(".")[0] for name in right})
    assert compare.main([ours, files["none"], "--without", *everything]) == 1
    assert compare.main([ours, files["fewer"]]) == 1
    assert "MISSING: model.layers.3.self_attn.rotated" in capsys.readouterr().out
    assert compare.main([ours, files["fewer"], "--without", "decode", "model.layers.3"]) == 0
    assert f"\n{len(fewer)} rows compared\nno step" in capsys.readouterr().out


def test_a_third_set_to_zero_is_noticed_in_bfloat16():
    """Of the largest value, a share that hides most values of a row where a few channels are giants."""
    ours = rows.trace_ours(load_model("tiny", dtype="bfloat16"), load_processor("tiny")(PICTURE), False)
    for name in ("visual.blocks.2", "model.layers.3"):
        x = ours[name]
        small = x.abs() <= x.abs().float().quantile(0.35)
        compared, _ = compare.compare(ours, ours | {name: x.masked_fill(small, 0)}, "bfloat16")
        row = next(row for row in compared if row.name == name)
        assert row.leaves and row.so_far[0] < compare.BOUNDS["bfloat16"][0]


@pytest.mark.parametrize("dtype, wrong", [("float32", 1e-4), ("float16", 3e-2), ("bfloat16", 2e-1)])
def test_a_wrong_scale_leaves_and_rounding_does_not(right, dtype, wrong):
    """Bug: bounds of a dtype so wide that a formula passes, or so narrow that rounding fails."""
    for name in ("visual.blocks.2", "model.layers.3", "logits"):
        rounded = right[name].to(getattr(torch, dtype)).float()
        for theirs, leaves in ((rounded, False), (rounded * (1 + wrong), True)):
            compared, _ = compare.compare(right, right | {name: theirs}, dtype)
            assert [row.name for row in compared if row.leaves] == [name] * leaves

    # Pixels are only divided by 255, which no dtype of a model changes.
    theirs = right | {"pixel_values": right["pixel_values"].half().float()}
    compared, _ = compare.compare(right, theirs, dtype)
    assert [row.name for row in compared if row.leaves] == ["pixel_values"]


def test_one_wrong_number_is_noticed(right, engine):
    """Bug: the mean over a whole row hides it."""
    logits = right["logits"].clone()
    logits[0, 20, 7] += 1e-4 * logits.abs().max()
    compared, _ = compare.compare(right, right | {"logits": logits}, model=engine.model)
    (row,) = [row for row in compared if row.fails]
    assert row.name == "logits" and row.so_far[1] < compare.BOUNDS["float32"][1]


def test_numbers_that_are_not_numbers_leave(right):
    """NaN is not larger than a tolerance."""
    compared, _ = compare.compare(right, right | {"logits": torch.full_like(right["logits"], torch.nan)})
    assert [row.name for row in compared if row.fails] == ["logits"]


def test_pixels_in_another_form_are_not_the_first_to_leave(right, engine):
    """Ids and positions are exact; pixels have a tolerance, or are given to the tower as bytes."""
    multiplied = right | {"pixel_values": right["pixel_values"] * (1 + 2e-7)}
    assert failing(right, multiplied, engine.model) == []
    compared, _ = compare.compare(right, right | {"pixel_values": right["pixel_values"] * 60 + 120},
                                  model=engine.model)
    row = next(row for row in compared if row.name == "pixel_values")
    assert row.words() == "differs, but what follows agrees" and not any(row.fails for row in compared)

    # A layer in another form excuses no step of decoding.
    other = right | {"model.layers.1": right["model.layers.1"] + 1}
    other["decode.3.logits"] = right["decode.2.logits"]
    assert failing(right, other, engine.model) == ["decode.3.logits"]

    # Unless nothing after them agrees; and an id is never nearly right.
    wrong = {name: x + 1 if x.is_floating_point() else x for name, x in right.items()}
    compared, _ = compare.compare(right, wrong)
    assert next(row.name for row in compared if row.fails) == "pixel_values"
    assert "input_ids" in failing(right, right | {"input_ids": right["input_ids"] + 1}, engine.model)


def test_two_different_runs_are_refused(tmp_path, capsys, right):
    """Traces of different pictures compare without a word."""
    tensors = {name: x.clone().contiguous() for name, x in right.items()}
    header = dict(engine="ours", checkpoint="tiny", picture="demo.png; What?", dtype="float32")
    for name, changes in dict(ours={}, picture=dict(picture="b.png; What?"), path=dict(checkpoint="/x/tiny"),
                              other=dict(checkpoint="7B"), dtype=dict(dtype="int8")).items():
        compare.save_file(tensors, tmp_path / name, header | changes)
    for name, status in dict(path=0, picture=2, other=2, dtype=2).items():
        assert compare.main([str(tmp_path / "ours"), str(tmp_path / name)]) == status
    out, err = capsys.readouterr()
    assert "engine       ours  |  ours" in out
    assert "two different runs: picture demo.png; What? and b.png; What?" in err
    assert "two different runs: checkpoint tiny and 7B" in err and "dtypes float32 and int8" in err


def test_mistakes_end_in_one_line(tmp_path, capsys):
    for what, said in ((["tiny"], "give a checkpoint and -o FILE"), (["LICENSE", "LICENSE"], "no rows in it"),
                       (["nowhere", "-o", str(tmp_path / "x")], "no such directory")):
        assert compare.main(what) == 2
        assert said in capsys.readouterr().err
