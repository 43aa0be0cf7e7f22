"""Pixels, prompts and ids, bit for bit as Hugging Face's picture processor, template and tokenizer make them.
"""

import json
import random
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIRST_ADDED, NOT_SPECIAL, SPECIAL, TINY_TOKENS, assert_equal
from PIL import Image, ImageOps
from tokenizers import Tokenizer, models
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf

from processing import load_processor, patchify, smart_resize, to_original, to_resized


@pytest.fixture(scope="session")
def processor(published):
    return load_processor(published[0], max_pixels=200_000)


def picture(width, height, mode="RGB", seed=0):
    generator = np.random.default_rng(seed)
    rough = generator.integers(0, 256, (max(2, height // 9), max(2, width // 9), 4), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(rough, "RGBA").resize((width, height)))
    noise = generator.integers(0, 40, smooth.shape, dtype=np.uint8)
    return Image.fromarray(np.minimum(smooth, 215) + noise, "RGBA").convert(mode)


def user(*content):
    return [{"role": "user", "content": list(content)}]


def test_sizes_rounded_half_up():
    assert smart_resize(70, 70) == (56, 56)
    assert smart_resize(100, 5000, 28, 3136, 20_000) == (28, 980)       # above max_pixels: no side under 28
    rng = random.Random(0)
    for _ in range(2000):
        h, w = (int(10 ** rng.uniform(0.1, 3.7)) for _ in range(2))
        limits = dict(factor=rng.choice([28, 32]), min_pixels=rng.choice([3136, 100352]),
                      max_pixels=rng.choice([200_000, 1003520, 12845056]))
        if max(h, w) > 200 * min(h, w):
            with pytest.raises(ValueError, match=f"{w}x{h} pixels is longer than 200:1"):
                smart_resize(h, w, **limits)
        else:
            assert_equal("resized sizes", smart_resize(h, w, **limits), hf.smart_resize(h, w, **limits))


def test_boxes_in_the_wrong_pixels():
    """Per axis: a picture that grows in width and shrinks in height."""
    original, resized = (480, 100), (448, 112)
    assert to_original((0, 0, 112, 448), resized, original) == (0, 0, 100, 480)
    assert to_original((56, 28, 84, 56), resized, original) == (50, 30, 75, 60)
    box = (3.0, 8.0, 77.0, 401.0)
    assert to_original(to_resized(box, resized, original), resized, original) == pytest.approx(box)


def assert_same_pixels(processor, source, opened=None):
    theirs = hf.Qwen2VLImageProcessorPil(min_pixels=processor.min_pixels, max_pixels=processor.max_pixels)(
        opened or source, return_tensors="pt")
    ours = processor(user({"image": source}))
    assert_equal("pixels and grids", ours["pixel_values"], theirs["pixel_values"])
    assert_equal("pixels and grids", ours["image_grid_thw"], theirs["image_grid_thw"])


@pytest.mark.parametrize("width, height", [(280, 364), (301, 97), (30, 700), (900, 613), (5, 8)])
def test_wrong_filter_or_sides_swapped(processor, width, height):
    assert_same_pixels(processor, picture(width, height))


def test_normalised_in_another_arithmetic(processor):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(7, 0).repeat(7, 1)
    assert_same_pixels(processor, Image.fromarray(np.stack((ramp, ramp.T, 255 - ramp), -1)))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA", "YCbCr"])
def test_alpha_dropped_or_mode_misread(processor, mode):
    source = picture(120, 90, "RGBA")
    source = source.convert("L").convert("LA") if mode == "LA" else source.convert(mode)
    assert_same_pixels(processor, source)


def test_transparent_colour_of_a_palette_painted(processor, tmp_path):
    source = picture(120, 90).quantize(16)
    source.save(tmp_path / "p.png", transparency=3)
    assert_same_pixels(processor, tmp_path / "p.png", Image.open(tmp_path / "p.png"))
    white = processor(user({"image": tmp_path / "p.png"}))["pixel_values"]
    assert not torch.equal(white, processor(user({"image": source}))["pixel_values"])


def test_orientation_ignored(processor, tmp_path):
    """A file's EXIF orientation is applied, a PIL image is taken as it is."""
    source = picture(120, 300)
    exif = source.getexif()
    exif[0x0112] = 6
    source.save(tmp_path / "turned.png", exif=exif)
    opened = Image.open(tmp_path / "turned.png")
    assert_same_pixels(processor, tmp_path / "turned.png", ImageOps.exif_transpose(opened))
    assert_same_pixels(processor, opened)
    assert processor(user({"image": tmp_path / "turned.png"}))["image_grid_thw"].tolist() == [[1, 8, 22]]


def test_patches_in_the_wrong_order():
    """A row is one patch, channel by frame by y by x; a still is its frame twice; groups lie together."""
    frames = np.arange(3 * 56 * 84 * 3, dtype=np.float32).reshape(3, 56, 84, 3)
    rows, grid = patchify(frames, 14, 2, 2)
    assert grid == (2, 4, 6)
    # t, group row, group column, row, column, channel, frame, y, x
    rows = rows.reshape(2, 2, 3, 2, 2, 3, 2, 14, 14)
    assert np.array_equal(rows[0, 1, 2, 0, 1, 2, 1], frames[1, 28:42, 70:84, 2])
    assert np.array_equal(rows[1, 0, 1, 1, 0, 0, 0], frames[2, 14:28, 28:42, 0])
    assert np.array_equal(rows[1, :, :, :, :, :, 0], rows[1, :, :, :, :, :, 1])     # an odd frame is repeated


RED = Image.new("RGB", (84, 56), "red")
CONVERSATIONS = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"text": "Hi"}]}],
    user({"text": "\n\nFirst "}, {"image": RED}, {"text": "\nthen  "}, {"image_url": "x.png"},
         {"type": "video", "video": []}, {"text": "?\n"}),
    [*user({"type": "image", "image": RED}, {"type": "text", "text": "What?"}),
     {"role": "assistant", "content": "A red\n"},
     {"role": "user", "content": [{"text": "one. "}, {"text": "Two"}, {"text": " three."}]},
     {"role": "assistant", "content": [{"text": "ok"}]}, {"role": "user", "content": ""}],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("ask", [True, False])
def test_prompt_differs_from_the_published_template(published, processor, messages, ask):
    theirs = published[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    assert_equal("prompts", processor.prompt(messages, add_generation_prompt=ask), theirs)


TEXTS = ["\nHello", "  two  spaces \n\n and lines\n", "<|im_end", " ".join(NOT_SPECIAL), "",
         "naïve e\u0301 漢字 \u200d\U0001f467 العربية\r\n"]


@pytest.mark.parametrize("words", TEXTS)
def test_text_tokenized_piecewise(published, processor, words):
    """Ids of the whole prompt as from Hugging Face's tokenizer: template and message text are one run."""
    messages = [{"role": "system", "content": words}, *user({"text": words}, {"image": RED}, {"text": words})]
    prompt = processor.prompt(messages).replace("<|image_pad|>", "<|image_pad|>" * 6)
    assert_equal("ids", processor(messages)["input_ids"][0].tolist(), published[1](prompt)["input_ids"])


def test_ids_of_another_vocabulary(processor):
    """The published template, by its checksum, and ids; six placeholders stand for one picture."""
    assert zlib.crc32(TINY_TOKENS["chat_template"].encode()) == 3459730853
    ids = processor(user({"image": RED}, {"text": "Describe this image."}))["input_ids"][0].tolist()
    assert ids == [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198, 151652,
                   *[151655] * 6, 151653, 74785, 419, 2168, 13, 151645, 198, 151644, 77091, 198]


@pytest.mark.parametrize("token", SPECIAL)
def test_typed_token_steers(processor, token):
    plain, typed = (processor(user({"text": words}))["input_ids"][0] for words in ("a b", f"a {token} b"))
    assert (typed >= FIRST_ADDED).sum() == (plain >= FIRST_ADDED).sum()
    assert f"a {token} b" in processor.decode(typed)


def test_limits_of_one_picture_ignored(processor):
    item = {"image": picture(300, 300), "min_pixels": 3136, "max_pixels": 10_000}
    assert processor(user(item))["image_grid_thw"].tolist() == [[1, 6, 6]]


def test_batch_padded_on_the_right(processor):
    rows = [user({"image": RED}, {"text": "What?"}),
            user({"text": "A much longer question, without a picture, about nothing."}),
            user({"image": picture(100, 200)}, {"image": RED}, {"text": "Compare."})]
    batch = processor(rows)
    assert batch["mm_token_type_ids"].dtype == torch.int32
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(batch[name], torch.cat([processor(row)[name] for row in (rows[0], rows[2])]))
    for b, row in enumerate(rows):
        alone, real = processor(row), batch["attention_mask"][b].bool()
        for name in ("input_ids", "mm_token_type_ids"):
            assert torch.equal(batch[name][b, real], alone[name][0])
        assert real[-1] and (batch["input_ids"][b, ~real] == FIRST_ADDED).all()
        assert torch.equal(alone["mm_token_type_ids"], (alone["input_ids"] == 151655).int())


def numbered(n):
    """Frames that differ."""
    return [picture(112, 84, seed=i) for i in range(n)]


def video(source, **more):
    item = {"type": "video", "video": source, "min_pixels": 3136, "max_pixels": 50176} | more
    return user(item, {"text": "What moves?"})


def test_frames_in_the_wrong_slice(processor):
    """First temporal slice frame 2i, second frame 2i + 1, and an odd count repeats the last."""
    frames = numbered(5)
    inputs = processor(video(frames, fps=4))
    assert inputs["video_grid_thw"].tolist() == [[3, 6, 8]] and inputs["second_per_grid_ts"].tolist() == [0.5]
    assert (inputs["mm_token_type_ids"] == 2).sum() == 36 == (inputs["input_ids"] == 151656).sum()
    pixels = inputs["pixel_values_videos"].view(3, 48, 3, 2, 196)       # time, patch, channel, frame, pixel
    for i, frame in enumerate([*frames, frames[-1]]):
        still = processor(user({"image": frame}))["pixel_values"].view(48, 3, 2, 196)
        assert torch.equal(pixels[i // 2, :, :, i % 2], still[:, :, 0])


def test_folder_in_alphabetical_order(processor, tmp_path):
    frames = numbered(12)
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"frame{i}.png")
    assert torch.equal(processor(video(tmp_path, fps=2))["pixel_values_videos"],
                       processor(video(frames, fps=2))["pixel_values_videos"])


@pytest.mark.parametrize("count, delay, fps, expected, seconds", [
    (30, 100, None, 6, 2 * 3 / 6),          # 3 s at 2 a second
    (30, 100, 3.5, 10, 2 * 3 / 10),         # 10.5, rounded down to even
    (7, 50, None, 4, 2 * 0.35 / 4),         # at least four
    (3, 50, None, 2, 2 * 0.15 / 2),         # or as many as there are
])
def test_animation_sampled_at_another_rate(processor, tmp_path, count, delay, fps, expected, seconds):
    frames, path = numbered(count), tmp_path / "a.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=delay, lossless=True)
    inputs = processor(video(path, **({} if fps is None else {"fps": fps})))
    assert inputs["video_grid_thw"][0, 0] * 2 == expected
    assert inputs["second_per_grid_ts"][0].item() == pytest.approx(seconds)
    chosen = [frames[i] for i in np.linspace(0, count - 1, expected).round().astype(int)]
    assert torch.equal(inputs["pixel_values_videos"], processor(video(chosen, fps=1))["pixel_values_videos"])


@pytest.mark.parametrize("n, item, limits", [
    (2, {}, (100352, 768 * 784)),
    (600, {}, (100352, 0.9 * 128000 * 784 * 2 / 600)),      # a share of the budget
    (4000, {}, (100352, int(1.05 * 100352))),               # and never less than this
    (2, dict(min_pixels=3136, max_pixels=50176), (3136, 50176)),
])
def test_video_pixels_unbounded(processor, n, item, limits):
    """A frame's limits: the item's, else the checkpoint's, else what is left of the video's budget."""
    assert processor.open("video", dict(video=[RED] * n, fps=2) | item)[1] == limits


def test_settings_of_transformers_5_ignored(published, tmp_path):
    """processor_config.json with an image_processor block, and sizes by edges."""
    (tmp_path / "tokenizer.json").write_bytes((published[0] / "tokenizer.json").read_bytes())
    sizes = lambda most: dict(size=dict(shortest_edge=784, longest_edge=most))
    (tmp_path / "processor_config.json").write_text(json.dumps(dict(
        video_processor=sizes(15680),
        image_processor=sizes(7840) | dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, merge_size=2))))
    processor = load_processor(tmp_path)
    assert (processor.min_pixels, processor.max_pixels) == (784, 7840)
    assert processor.open("video", dict(video=[RED], fps=2))[1] == (784, 15680)
    assert load_processor("tiny").open("video", dict(video=[RED], fps=2))[1] == (12544, 50176)
    white = user({"image": Image.new("RGB", (56, 56), "white")})
    assert processor(white)["pixel_values"].unique().tolist() == [1.0]


@pytest.mark.parametrize("name, message", [
    ("x" * 300, "x: no such file; check the path"), ("clip.mp4", "ffmpeg -i .*clip.mp4"),
    ("folder", r"folder: Pillow cannot read it \(.*Is a directory"),
    ("bomb.png", r"bomb.png: Pillow cannot read it \(.*decompression bomb"),
    ("float.tiff", "convert it to 8 bits"), ("deep.png", "convert it to 8 bits"),
])
def test_file_that_is_no_picture_ends_in_a_traceback(processor, tmp_path, monkeypatch, name, message):
    (tmp_path / "clip.mp4").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    Image.new("RGB", (200, 200)).save(tmp_path / "bomb.png")
    Image.new("F", (60, 60)).save(tmp_path / "float.tiff")
    Image.new("I;16", (60, 60)).save(tmp_path / "deep.png")
    with pytest.raises((ValueError, OSError), match=message):
        processor(user({"image": tmp_path / name}))


def test_cut_animation_ends_in_a_traceback(processor, tmp_path):
    """Wherever the file ends: Pillow's decoders raise struct.error and IndexError, too."""
    frames, path = [Image.new("RGB", (56, 56), (40 * i, 0, 0)) for i in range(4)], tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    whole, messages = path.read_bytes(), set()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        try:
            processor(video(path))
        except ValueError as error:
            messages.add(str(error).removeprefix(f"{path}: ")[:20])
    assert messages <= {"Pillow cannot read i", "not an animation wit"}


@pytest.mark.parametrize("messages, message", [
    ([], "a conversation is a list of messages"),
    ({"role": "user", "content": "x"}, "a conversation is a list of messages"),
    ([{"role": "tool", "content": "x"}], "cannot use .* as a message of system or user or assistant"),
    ([{"role": "user"}], "cannot use {'role': 'user'} as a message"),
    (user("bare string"), "cannot use 'bare string' as content"),
    (user({"type": "text"}), "cannot use"),
    (user({"image": "data:image/png;base64,AAAA"}), "URLs are not fetched"),
    (user({"image": 3}), "a path or a PIL image, not int"),
    (user({"type": "video", "video": [RED], "fps": 0}), "fps 0: must be above 0"),
    (user({"type": "video", "video": [RED], "fps": float("inf")}), "fps inf: must be above 0"),
    (user({"image": "HTTPS://example.org/a.png"}), "URLs are not fetched; download it first"),
    (user({"image": Image.new("RGB", (0, 0))}), "longer than 200:1"),
    (user({"image": RED, "max_pixels": -1}), "max_pixels -1: must be above 0"),
    (user({"type": "text", "text": "\ud800"}), "half of a surrogate pair"),
])
def test_malformed_conversation_answered(processor, messages, message):
    with pytest.raises(ValueError, match=message):
        processor(messages)


def test_no_video_ends_in_a_traceback(processor, tmp_path):
    with pytest.raises(ValueError, match="a video needs frames"):
        processor(video(tmp_path, fps=2))
    RED.save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="not an animation with frame times; give a folder"):
        processor(video(tmp_path / "1.png"))
    (tmp_path / "2.png").write_text("words")
    with pytest.raises(ValueError, match="2.png: Pillow cannot read it"):
        processor(video(tmp_path, fps=2))


def test_damaged_processor_files_end_in_a_traceback(published, tmp_path):
    with pytest.raises(OSError, match="preprocessor_config.json: no such file"):
        load_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer .No such file"):
        load_processor(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
        load_processor(tmp_path)
    with pytest.raises(ValueError, match="max_pixels 9: must be above 0 and at least min_pixels, -1"):
        load_processor(published[0], min_pixels=-1, max_pixels=9)
    for name, content, message in (
        ("preprocessor_config.json", '{"patch_size": "14"}', "patch_size cannot be '14'; download it again"),
        ("preprocessor_config.json", '{"image_mean": [0.5, "x"]}', "image_mean cannot be .*x"),
        ("preprocessor_config.json", '{"size": 5}', "size cannot be 5"),
        ("tokenizer.json", Tokenizer(models.BPE()).to_str(), "no <.endoftext.> in it; is it Qwen2.5-VL's?"),
    ):
        copy = Path(shutil.copytree(published[0], tmp_path / message[:9]))
        (copy / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            load_processor(copy)
