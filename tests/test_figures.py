"""tools/figures.py: the numbers in the README's figures are those that the modules compute."""

import figures
import numpy as np
import pytest
import torch
from PIL import Image

from generate import generate
from load_weights import load_generation_config, load_model
from processing import IMAGE_MEAN, IMAGE_STD, load_processor
from vision import attention_weights, eager


def test_first_screen_shows_boxes_of_the_resized_picture(tmp_path, monkeypatch):
    answers = {figures.DEMO_PROMPT: "a red star, an orange circle."}
    box = '{"bbox_2d": [9, 21, 18, 42], "label": "it"}'
    monkeypatch.setattr(figures, "locate", lambda *asked, **_: (answers.get(asked[-1], box), (168, 252)))
    Image.new("RGB", (448, 336)).save(tmp_path / "demo.png")        # the model is given it as 252 x 168
    monkeypatch.setattr(figures, "DEMO_IMAGE", tmp_path / "demo.png")
    boxes, windows = figures.draw_first(tmp_path).values()
    assert boxes == [((16, 42, 32, 84), "it")] * 2
    assert windows.tolist() == [[0] * 4 + [1] * 4 + [2]] * 4 + [[3] * 4 + [4] * 4 + [5]] * 2


def test_patches_numbered_in_raster_order(tmp_path):
    patches, picture = figures.draw_patches(tmp_path).values()
    rows, _ = load_processor("tiny").patches([Image.open(figures.PHOTO)], 1, 20_000)
    rows = rows.reshape(8 * 12, 3, 2, 14, 14)[:, :, 0].transpose(0, 2, 3, 1) * IMAGE_STD
    pixels = np.asarray(picture) / 255 - IMAGE_MEAN
    for (y, x), row in zip(patches.tolist(), rows, strict=True):
        assert np.allclose(row, pixels[y:y + 14, x:x + 14], atol=1e-4)


def test_windows_in_another_order(tmp_path):
    windows, order, full = figures.draw_windows(tmp_path).values()
    assert windows.tolist() == [[0] * 4 + [1] * 4 + [2]] * 4 + [[3] * 4 + [4] * 4 + [5]]
    assert torch.equal(order, windows.flatten().argsort(stable=True)) and full == (7, 15, 23, 31)


def test_text_after_a_picture_counted_by_its_tokens(tmp_path):
    positions, following = figures.draw_positions(tmp_path).values()
    assert positions[:, 15:21].tolist() == [[15] * 6, [15] * 3 + [16] * 3, [15, 16, 17] * 2]
    assert positions[:, 21:].tolist() == [[*range(18, 28)]] * 3 and following == 28


def test_time_counted_in_frames(tmp_path):
    assert [*figures.draw_time(tmp_path).values()] == [[0, 4, 8, 9], [0, 2, 4, 6, 8, 10, 11], [*range(13)]]


@pytest.mark.parametrize("prompt", ["Describe the image.", "How many objects are there?"])    # a short answer
def test_attention_of_another_token_or_head(tmp_path, monkeypatch, prompt):
    monkeypatch.setattr(figures, "DEMO_PROMPT", prompt)
    _, shown, maps, sink = figures.draw_attention(tmp_path).values()
    question = {"role": "user", "content": [{"image": figures.DEMO_IMAGE}, {"text": prompt}]}
    inputs, model, kept = load_processor("tiny")([question]), load_model("tiny", dtype="float32"), []
    answer = torch.cat(list(generate(load_model("tiny"), inputs, **load_generation_config("tiny"))))
    for layer in model.model.layers:
        layer.self_attn.attend = lambda *qkv_mask: kept.append(qkv_mask) or eager(*qkv_mask)
    before, ids = inputs["input_ids"].shape[1] - 1, torch.cat((inputs["input_ids"], answer[None]), dim=1)
    model(ids, pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    weights = torch.cat([attention_weights(q, k, mask) for q, k, _, mask in kept])[:, :, before:-1]
    seen = weights[..., ids[0] == model.config.image_token_id].unflatten(3, (6, 8))[:, :, shown]
    assert torch.allclose(maps, torch.stack((seen[3, [0, 3]].mean(0), seen.mean((0, 1)))), atol=1e-5)
    assert sink == pytest.approx(weights[..., 0].mean().item(), abs=1e-5)


def test_boxes_scaled_the_wrong_way(tmp_path):
    assert figures.draw_boxes(tmp_path) == dict(box=(135, 28, 180, 138), mapped=(305, 67, 407, 329))
