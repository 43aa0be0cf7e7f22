"""tools/figures.py: the numbers in the README's figures are those that the modules compute."""

import drawing
import figures
import figures_graph
import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from generate import main
from load_weights import load_config, load_generation_config, load_model, load_processor
from model import Qwen2_5_VL
from processing import open_video
from sampling import generate
from vision import attention_weights, eager


def test_first_screen_has_boxes_of_the_original_picture(tmp_path, monkeypatch):
    """Bug: boxes as answered, in pixels of the resized picture; or windows of the original one."""
    Image.new("RGB", (448, 336)).save(tmp_path / "demo.png")        # the model is given it as 252 x 168
    monkeypatch.setattr(figures, "DEMO_IMAGE", tmp_path / "demo.png")

    def locate(model, processor, picture, prompt, **settings):
        answer = '{"bbox_2d": [9, 21, 18, 42], "label": "it"}'
        if prompt == figures.DEMO_PROMPT:
            answer = "a red star, an orange circle."
        return answer, (168, 252)
    monkeypatch.setattr(figures, "locate", locate)

    numbers = figures.draw_first(tmp_path)
    assert numbers["boxes"] == [((16, 42, 32, 84), "it")] * 2
    upper = [0, 0, 0, 0, 1, 1, 1, 1, 2]
    lower = [3, 3, 3, 3, 4, 4, 4, 4, 5]
    assert numbers["windows"].tolist() == [upper] * 4 + [lower] * 2


def test_map_has_the_shapes_of_a_run(tmp_path, published):
    """Bug: a shape that somebody typed, or another prompt's."""
    shapes = figures.draw_map(tmp_path)
    model = load_model(TINY)
    inputs = load_processor(TINY)(figures.question(figures.DEMO_IMAGE))
    assert shapes["tiny"] == run_shapes(model, inputs)

    # The 7B, without weights: its picture stands for one of every content.
    directory, _ = published
    with torch.device("meta"):
        model = Qwen2_5_VL(load_config(directory))
    picture = Image.new("RGB", (672, 448))
    inputs = load_processor(directory)(figures.question(picture))
    assert shapes["large"] == run_shapes(model, inputs)


def run_shapes(model, inputs):
    """The shapes at the places of the map when a model reads a prompt."""
    pixels = inputs["pixel_values"].to(model.device)
    grid = inputs["image_grid_thw"]
    embedded = []
    patched = []
    reached = []
    model.visual.patch_embed.register_forward_hook(lambda module, args, x: embedded.append(x))
    model.visual.blocks[-1].register_forward_hook(lambda module, args, x: patched.append(x))
    model.model.layers[-1].register_forward_hook(lambda module, args, x: reached.append(x))

    tokens = model.visual(pixels, grid)
    ids = inputs["input_ids"]
    positions, _ = model.positions(ids, image_grid_thw=grid)
    x = torch.zeros(*ids.shape, tokens.shape[1], device=model.device, dtype=model.dtype)
    logits = model.logits(x, positions.to(model.device), last_only=True)[:, -1]

    _, h, w = (14 * grid[0]).tolist()
    assert (inputs["mm_token_type_ids"] == 1).sum() == len(tokens)
    return {
        "picture": (h, w, 3),
        "pixel_values": tuple(pixels.shape),
        "patch embedding": tuple(embedded[0].shape),
        "tower": tuple(patched[0].shape),
        "vision tokens": tuple(tokens.shape),
        "input_ids": tuple(ids.shape),
        "position_ids": tuple(positions.shape),
        "layers": tuple(reached[0].shape),
        "x": tuple(x.shape),
        "logits": tuple(logits.shape),
    }


def test_change_reaches_a_window_then_everything_then_what_is_later(tmp_path):
    """Bug: groups in window order, patches taken for groups, or a decoder that sees what comes later."""
    numbers = figures.draw_reach(tmp_path, group=13)
    window, everything, later = numbers["reached"]
    assert window.nonzero().tolist() == [[row, column] for row in range(4) for column in range(4, 8)]
    assert everything.all()
    assert later.flatten().tolist() == [i >= 13 for i in range(48)]


def test_patches_have_the_numbers_of_their_rows(tmp_path):
    """Bug: patches numbered in raster order."""
    numbers = figures.draw_patches(tmp_path)
    pixels = np.asarray(numbers["picture"])

    # The rows of pixel_values, as small pictures.
    rows, (t, h, w) = load_processor(TINY).cut([Image.open(figures.PHOTO)], 1, 20_000)
    rows = rows.reshape(t * h * w, 3, 2, 14, 14)
    frames = rows[:, :, 0].transpose(0, 2, 3, 1)
    for (y, x), frame in zip(numbers["patches"].tolist(), frames, strict=True):
        patch = pixels[y:y + 14, x:x + 14]
        assert np.array_equal(frame, patch)


def test_windows_are_stored_whole(tmp_path):
    """Bug: windows of another size, the order undone twice, or other full blocks."""
    numbers = figures.draw_windows(tmp_path)
    windows = numbers["windows"]
    assert windows.tolist() == [[0, 0, 0, 0, 1]] * 4 + [[2, 2, 2, 2, 3]]
    assert torch.equal(numbers["order"], windows.flatten().argsort(stable=True))
    assert numbers["full"] == (7, 15, 23, 31)


def test_time_goes_by_the_seconds(tmp_path):
    """Bug: time counted in frames, or text that resumes after the last time although columns go further."""
    assert figures.draw_time(tmp_path) == {
        "1 fps": dict(times=[0, 4], text=5),
        "2 fps": dict(times=[0, 2, 4, 6], text=7),
        "4 fps": dict(times=list(range(8)), text=8),
        "6 groups wide, 2 fps": dict(times=[0, 2], text=6),
    }


@pytest.mark.parametrize("prompt", ["Describe the image.", "How many objects are there?"])    # a short answer
def test_attention_is_that_of_the_token_before(tmp_path, monkeypatch, prompt):
    """Bug: attention of another token, layer or head, or another picture's."""
    monkeypatch.setattr(figures, "DEMO_PROMPT", prompt)
    numbers = figures.draw_attention(tmp_path)

    # The same answer, and the queries and keys of all layers when it is read again.
    content = [{"image": figures.DEMO_IMAGE}, {"text": prompt}]
    inputs = load_processor(TINY)([{"role": "user", "content": content}])
    answer = torch.cat(list(generate(load_model(TINY), inputs, **load_generation_config(TINY))))
    model = load_model(TINY, dtype="float32")
    kept = []

    def attend(q, k, v, mask, causal):
        kept.append(attention_weights(q, k, mask, causal))
        return eager(q, k, v, mask, causal)
    for layer in model.model.layers:
        layer.self_attn.attend = attend
    ids = torch.cat((inputs["input_ids"], answer[None]), dim=1)
    model(ids, pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])

    last = inputs["input_ids"].shape[1] - 1     # of the prompt, which writes the answer's first token
    weights = torch.cat(kept)[:, :, last:-1]
    is_picture = ids[0] == model.config.image_token_id
    maps = weights[..., is_picture].unflatten(3, (6, 8))
    maps = maps[:, :, numbers["shown"]]
    trained, everything = numbers["maps"]
    assert torch.allclose(trained, maps[3, [0, 3]].mean(dim=0), atol=1e-5)
    assert torch.allclose(everything, maps.mean(dim=(0, 1)), atol=1e-5)


def test_drawn_box_is_mapped_to_the_original(tmp_path):
    """Bug: boxes scaled the wrong way, or along the other axis."""
    assert figures.draw_boxes(tmp_path) == dict(box=(135, 28, 180, 138), mapped=(305, 67, 407, 329))


def test_demo_video_is_drawn_and_answered(tmp_path, capsys):
    """Bug: a video of another seed, at another rate, or one that the tiny checkpoint gets wrong."""
    numbers = figures.draw_demo(tmp_path)
    for file in (tmp_path / "demo.webp", figures.ROOT / "assets" / "demo.webp"):
        frames, count, seconds = open_video(str(file), None)
        assert (count, seconds) == (8, 0.5)
        for drawn, frame in zip(numbers["frames"], frames, strict=True):
            assert np.array_equal(np.asarray(drawn), np.asarray(frame))
        assert file.stat().st_size < 100_000

    assert main(["--video", str(file), "--prompt", numbers["question"]]) == 0
    assert capsys.readouterr().out == f"{numbers['answer']}\n"


def test_kernels_wait_for_python_or_for_each_other(tmp_path):
    """Bug: kernels that run at the same time, or before they are launched; a replay that waits."""
    times = figures.draw_graph(tmp_path)
    lengths = figures_graph.KERNELS
    ends = [start + length for start, length in zip(times["starts"], lengths)]
    ready = [launch + figures_graph.LAUNCH for launch in times["launches"]]
    assert times["starts"] == [max(after, launched) for after, launched in zip([0, *ends], ready)]
    assert times["replayed"][-1] == figures_graph.REPLAY + sum(lengths[:-1])
    assert times["replayed"][-1] < times["starts"][-1]


def test_a_text_that_a_phone_cannot_show_is_not_drawn(tmp_path):
    """Bug: text of fewer than 8.6 of a phone's pixels, or one that the edge of a figure cuts off."""
    for style in (dict(size=11), dict(x=6.5), dict(y=1)):
        figure, axis = drawing.canvas(1, "Title")
        axis.text(**dict(x=1, y=0.5, s="text", va="top") | style)
        with pytest.raises(AssertionError):
            drawing.save(figure, tmp_path / "it.png")


def test_every_figure_is_shown_somewhere_and_sharp():
    """Bug: a figure that no page shows, or one of another width than the others."""
    pages = [figures.ROOT / "README.md", *figures.ROOT.glob("docs/*.md")]
    shown = "".join(page.read_text(encoding="utf-8") for page in pages)
    for name in figures.FIGURES.keys() - {"demo"}:
        assert f"assets/{name}.png" in shown, name
        assert Image.open(figures.ROOT / "assets" / f"{name}.png").width == 1210, name
