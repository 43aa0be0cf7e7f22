"""Pixels, prompts and ids, bit for bit as Hugging Face's picture processor, template and tokenizer make them.
"""

import random
import zlib
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import FIRST_ADDED, NOT_SPECIAL, SPECIAL, TINY_TOKENS, assert_equal
from PIL import Image, ImageOps
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf

from load_weights import load_processor
from processing import by_number, patchify, sample_frames, smart_resize, to_original, to_resized

RED = Image.new("RGB", (84, 56), "red")


@pytest.fixture(scope="session")
def processor(published):
    return load_processor(published[0], max_pixels=200_000)


def picture(width, height, mode="RGB", seed=0):
    """Smooth colors under noise, and an uneven alpha where the mode has one."""
    generator = np.random.default_rng(seed)
    rough = generator.integers(0, 256, (max(2, height // 9), max(2, width // 9), 4), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(rough, "RGBA").resize((width, height)))
    noise = generator.integers(0, 40, smooth.shape, dtype=np.uint8)
    return Image.fromarray(np.minimum(smooth, 215) + noise, "RGBA").convert(mode)


def user(*content):
    return [{"role": "user", "content": list(content)}]


# ---------------------------------------------------------------------------- sizes and boxes

def test_sizes_equal_hugging_face():
    """Bug: halves are rounded up (70 -> 84)."""
    assert smart_resize(70, 70) == (56, 56)
    assert smart_resize(100, 5000, 28, 3136, 20_000) == (28, 980)       # above max_pixels: no side under 28

    # Exactly at a limit nothing changes. Without limits, those of the published checkpoints.
    assert smart_resize(60, 50, 28, 3136, 20_000) == hf.smart_resize(60, 50, 28, 3136, 20_000) == (56, 56)
    assert smart_resize(60, 57, 28, 784, 3136) == hf.smart_resize(60, 57, 28, 784, 3136) == (56, 56)
    assert smart_resize(28, 5600) == hf.smart_resize(28, 5600, 28, 3136, 12_845_056) == (28, 5600)
    assert smart_resize(10, 10) == (56, 56)
    assert smart_resize(9000, 9000) == (3584, 3584)

    rng = random.Random(0)
    for _ in range(2000):
        h = int(10 ** rng.uniform(0.1, 3.7))
        w = int(10 ** rng.uniform(0.1, 3.7))
        factor = rng.choice([28, 32])
        low = rng.choice([3136, 100352])
        high = rng.choice([200_000, 1003520, 12845056])
        if max(h, w) > 200 * min(h, w):
            with pytest.raises(ValueError, match=f"{w}x{h} pixels is longer than 200:1"):
                smart_resize(h, w, factor, low, high)
        else:
            theirs = hf.smart_resize(h, w, factor, low, high)
            assert_equal("resized sizes", smart_resize(h, w, factor, low, high), theirs)


def test_boxes_scale_along_each_axis():
    """Bug: one scale for both axes, or the other one's. This picture grows in width, shrinks in height."""
    original = (480, 100)
    resized = (448, 112)
    assert to_original((0, 0, 112, 448), resized, original) == (0, 0, 100, 480)
    assert to_original((56, 28, 84, 56), resized, original) == (50, 30, 75, 60)

    box = (3.0, 8.0, 77.0, 401.0)
    assert to_original(to_resized(box, resized, original), resized, original) == pytest.approx(box)


# ---------------------------------------------------------------------------- pixels

def assert_same_pixels(processor, source, opened=None):
    """Hugging Face's processor is given the picture that we open."""
    theirs = hf.Qwen2VLImageProcessorPil(min_pixels=processor.min_pixels, max_pixels=processor.max_pixels)
    expected = theirs(opened or source, return_tensors="pt")
    ours = processor(user({"image": source}))
    assert_equal("pixels and grids", ours["pixel_values"], expected["pixel_values"])
    assert_equal("pixels and grids", ours["image_grid_thw"], expected["image_grid_thw"])


@pytest.mark.parametrize("width, height", [(280, 364), (301, 97), (30, 700), (900, 613), (5, 8)])
def test_pixels_equal_hugging_face(processor, width, height):
    """Bugs: another resize filter, width and height swapped."""
    assert_same_pixels(processor, picture(width, height))


def test_normalization_equals_hugging_face(processor):
    """Bug: x * (1 / 255), or float64: other last bits. Every value of every channel is in this picture."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    ramp = ramp.repeat(7, axis=0).repeat(7, axis=1)
    channels = np.stack((ramp, ramp.T, 255 - ramp), axis=-1)
    assert_same_pixels(processor, Image.fromarray(channels))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA", "YCbCr"])
def test_modes_equal_hugging_face(processor, mode):
    """Bug: transparency is dropped, which shows whatever color lies below, and not put on white."""
    assert_same_pixels(processor, picture(120, 90, mode))


@pytest.mark.parametrize("color", [0, 3])
def test_transparent_color_of_a_palette_is_white(processor, tmp_path, color):
    """Bugs: a transparent color of the palette, which is no channel, is painted; color 0 counts as none."""
    file = tmp_path / "p.png"
    source = picture(120, 90).quantize(16)
    source.save(file, transparency=color)
    assert_same_pixels(processor, file, Image.open(file))

    white = processor(user({"image": file}))["pixel_values"]
    painted = processor(user({"image": source}))["pixel_values"]
    assert not torch.equal(white, painted)


def test_orientation_of_a_file_is_applied(processor, tmp_path):
    """Bugs: a photo lies on its side, or a PIL image, which somebody may have turned, is turned again."""
    file = tmp_path / "turned.png"
    source = picture(120, 300)
    exif = source.getexif()
    exif[0x0112] = 6
    source.save(file, exif=exif)

    opened = Image.open(file)
    assert_same_pixels(processor, file, ImageOps.exif_transpose(opened))
    assert_same_pixels(processor, opened)
    assert processor(user({"image": file}))["image_grid_thw"].tolist() == [[1, 8, 22]]


def test_patch_rows_follow_merge_groups():
    """Bugs: patches in raster order, a row in another order than channel, frame, y, x."""
    frames = np.arange(3 * 56 * 84 * 3, dtype=np.float32).reshape(3, 56, 84, 3)
    rows, grid = patchify(frames, patch=14, temporal_patch=2, merge=2)
    assert grid == (2, 4, 6)

    # t, group row, group column, row, column | channel, frame, y, x
    rows = rows.reshape(2, 2, 3, 2, 2, 3, 2, 14, 14)
    assert np.array_equal(rows[0, 1, 2, 0, 1, 2, 1], frames[1, 28:42, 70:84, 2])
    assert np.array_equal(rows[1, 0, 1, 1, 0, 0, 0], frames[2, 14:28, 28:42, 0])

    # The last of an odd number of frames is repeated, as often as it takes.
    first, second = np.moveaxis(rows[1], 5, 0)
    assert np.array_equal(first, second)
    _, grid = patchify(frames, patch=14, temporal_patch=5, merge=2)
    assert grid == (1, 4, 6)


def test_limits_of_one_picture_are_obeyed(processor):
    """Bug: an item's own limits are ignored."""
    item = {"image": picture(300, 300), "min_pixels": 3136, "max_pixels": 10_000}
    assert processor(user(item))["image_grid_thw"].tolist() == [[1, 6, 6]]
    item = {"image": picture(60, 60), "min_pixels": 20_000}
    assert processor(user(item))["image_grid_thw"].tolist() == [[1, 12, 12]]


# ---------------------------------------------------------------------------- prompts and ids

CONVERSATIONS = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"text": "Hi"}]},
    ],
    user(
        {"text": "\n\nFirst "},
        {"image": RED},
        {"text": "\nthen  "},
        {"image_url": "x.png"},
        {"type": "video", "video": []},
        {"text": "?\n"},
    ),
    [
        {"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A red\n"},
        {"role": "user", "content": [{"text": "one. "}, {"text": "Two"}, {"text": " three."}]},
        {"role": "assistant", "content": [{"text": "ok"}]},
        {"role": "user", "content": ""},
    ],
    [
        {"role": "user", "content": "One."},
        {"role": "system", "content": "From now on be brief."},     # not the first: there is a default, too
        {"role": "user", "content": "Two."},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("ask", [True, False])
def test_prompt_equals_the_published_template(published, processor, messages, ask):
    """Bugs: no default system prompt, a newline too few, an item's type trusted and not its keys."""
    _, tokenizer = published
    theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    assert_equal("prompts", processor.prompt(messages, add_generation_prompt=ask), theirs)


TEXTS = [
    "\nHello",
    "  two  spaces \n\n and lines\n",
    "<|im_end",
    " ".join(NOT_SPECIAL),
    "",
    "naïve e\u0301 漢字 \u200d\U0001f467 العربية\r\n",
]


@pytest.mark.parametrize("words", TEXTS)
def test_ids_equal_hugging_face(published, processor, words):
    """Bug: the template's text and the message's are tokenized apart from each other."""
    _, tokenizer = published
    system = {"role": "system", "content": words}
    messages = [system, *user({"text": words}, {"image": RED}, {"text": words})]
    prompt = processor.prompt(messages).replace("<|image_pad|>", "<|image_pad|>" * 6)
    assert_equal("ids", processor(messages)["input_ids"][0].tolist(), tokenizer(prompt)["input_ids"])


def test_ids_are_the_published_ones(processor):
    """Bug: the tests above compare with another vocabulary or template, which ours equals, too."""
    assert zlib.crc32(TINY_TOKENS["chat_template"].encode()) == 3459730853

    # Six placeholders stand for one picture.
    ids = processor(user({"image": RED}, {"text": "Describe this image."}))["input_ids"][0].tolist()
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    image = [151652, *[151655] * 6, 151653]
    question = [151644, 872, 198, *image, 74785, 419, 2168, 13, 151645, 198]
    assert ids == [*system, *question, 151644, 77091, 198]


@pytest.mark.parametrize("token", SPECIAL)
def test_typed_token_does_not_steer(processor, token):
    """Bug: what a user types becomes a control token."""
    plain = processor(user({"text": "a b"}))["input_ids"][0]
    typed = processor(user({"text": f"a {token} b"}))["input_ids"][0]
    assert (typed >= FIRST_ADDED).sum() == (plain >= FIRST_ADDED).sum()
    assert f"a {token} b" in processor.decode(typed)


def test_batch_is_padded_on_the_left(processor):
    """Bugs: pads come last, so that answers follow pads; pads count as text or as pictures."""
    rows = [
        user({"image": RED}, {"text": "What?"}),
        user({"text": "A much longer question, without a picture, about nothing."}),
        user({"image": picture(100, 200)}, {"image": RED}, {"text": "Compare."}),
    ]
    batch = processor(rows)
    singles = [processor(row) for row in rows]
    assert batch["mm_token_type_ids"].dtype == torch.int32

    # Pictures in the order of the rows.
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(batch[name], torch.cat([singles[0][name], singles[2][name]]))

    # Every row is itself, after pads.
    for b, alone in enumerate(singles):
        ids = batch["input_ids"][b]
        types = batch["mm_token_type_ids"][b]
        real = batch["attention_mask"][b].bool()
        assert real[-1]
        assert torch.equal(ids[real], alone["input_ids"][0])
        assert torch.equal(types, (ids == 151655).int())
        assert (ids[~real] == FIRST_ADDED).all()


# ---------------------------------------------------------------------------- videos

def numbered(n):
    """Frames that differ."""
    return [picture(112, 84, seed=i) for i in range(n)]


def video(source, **more):
    item = {"type": "video", "video": source, "min_pixels": 3136, "max_pixels": 50176} | more
    return user(item, {"text": "What moves?"})


def test_neighboring_frames_share_patches(processor):
    """Bug: the two frames of a patch are not 2i and 2i + 1, or an odd count is not made even at its end."""
    frames = numbered(5)
    inputs = processor(video(frames, fps=4))
    assert inputs["video_grid_thw"].tolist() == [[3, 6, 8]]
    assert inputs["second_per_grid_ts"].tolist() == [0.5]
    assert inputs["second_per_grid_ts"].dtype == torch.float32
    assert (inputs["mm_token_type_ids"] == 2).sum() == 36
    assert (inputs["input_ids"] == 151656).sum() == 36

    pixels = inputs["pixel_values_videos"].view(3, 48, 3, 2, 196)       # time, patch, channel, frame, pixel
    for i, frame in enumerate([*frames, frames[-1]]):
        still = processor(user({"image": frame}))["pixel_values"].view(48, 3, 2, 196)
        assert torch.equal(pixels[i // 2, :, :, i % 2], still[:, :, 0])


def test_frames_of_a_folder_go_by_number(processor, tmp_path):
    """Bugs: they go by the alphabet, frame10 before frame9; what file managers hide there are frames, too; a
    frame that lies on its side stays so.
    """
    frames = numbered(12)
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"frame{i}.png")
    exif = frames[5].getexif()
    exif[0x0112] = 3
    frames[5].rotate(180).save(tmp_path / "frame5.png", exif=exif)
    for name in (".DS_Store", "._frame3.png", ".frame4.png.swp"):
        (tmp_path / name).write_bytes(b"hidden")
    folder = processor(video(tmp_path, fps=2))["pixel_values_videos"]
    assert torch.equal(folder, processor(video(frames, fps=2))["pixel_values_videos"])

    # A superscript is a digit for Python and not a number.
    assert by_number(Path("\u00b29.png")) < by_number(Path("\u00b210.png"))


def test_rate_of_frames_may_be_a_fraction(processor):
    """Bug: it is rounded."""
    for fps, seconds in ((2.5, 0.8), (0.5, 4.0)):
        inputs = processor(video(numbered(2), fps=fps))
        assert inputs["second_per_grid_ts"][0].item() == pytest.approx(seconds)


@pytest.mark.parametrize("count, delay, fps, expected, seconds", [
    (30, 100, {}, 6, 2 * 3 / 6),                    # 3 s at 2 a second
    (30, 100, dict(fps=3.5), 10, 2 * 3 / 10),       # 10.5, rounded down to even
    (7, 50, {}, 4, 2 * 0.35 / 4),                   # at least four
    (3, 50, {}, 2, 2 * 0.15 / 2),                   # or as many as there are
])
def test_animation_is_sampled_at_its_rate(processor, tmp_path, count, delay, fps, expected, seconds):
    """Bugs: every frame is taken, or others; time goes by frames and not by the file's delays."""
    file = tmp_path / "a.webp"
    frames = numbered(count)
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=delay, lossless=True)
    inputs = processor(video(file, **fps))
    assert inputs["video_grid_thw"][0, 0] * 2 == expected
    assert inputs["second_per_grid_ts"][0].item() == pytest.approx(seconds)

    indices = np.linspace(0, count - 1, expected).round().astype(int)
    chosen = processor(video([frames[i] for i in indices], fps=1))
    assert torch.equal(inputs["pixel_values_videos"], chosen["pixel_values_videos"])


def test_animation_of_one_frame_is_a_video(processor, tmp_path):
    """Bug: of one frame an even number is none. It is taken twice, as the last of an odd number."""
    (frame,) = numbered(1)
    frame.save(tmp_path / "a.gif", duration=500)
    inputs = processor(video(tmp_path / "a.gif"))
    assert inputs["video_grid_thw"].tolist() == [[1, 6, 8]]
    assert inputs["second_per_grid_ts"].tolist() == [0.5]


def test_long_animation_gives_768_frames(tmp_path):
    """Bug: another number of frames, of which the model has never seen so many, or so few."""
    frames = [Image.new("L", (4, 4), i % 256) for i in range(900)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=1000, lossless=True)
    frames, count, seconds = sample_frames(tmp_path / "a.webp", fps=2)
    assert count == 768
    assert seconds == 900 / 768
    assert len(list(frames)) == 768


@pytest.mark.parametrize("n, settings, item, limits", [
    (2, {}, {}, (100352, 768 * 784)),
    (600, {}, {}, (100352, 0.9 * 128000 * 784 * 2 / 600)),      # a share of the budget
    (4000, {}, {}, (100352, int(1.05 * 100352))),               # and never less than this
    (2, dict(video_min_pixels=784, video_max_pixels=15680), {}, (784, 15680)),
    (2, {}, dict(min_pixels=3136, max_pixels=50176), (3136, 50176)),
    (2, {}, dict(max_pixels=50176), (50176, 50176)),
])
def test_frames_share_a_budget_of_pixels(processor, n, settings, item, limits):
    """Bug: frames as large as pictures. Their limits: the item's, else the checkpoint's, else a share."""
    processor = replace(processor, **settings)
    with patch.object(processor, "cut", return_value=(None, None)) as cut:
        processor.load("video", dict(video=[RED] * n, fps=2) | item)
    assert cut.call_args.args[1:] == limits


# ---------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("name, message", [
    ("x" * 300, "x: no such file; check the path"),
    ("clip.mp4", "ffmpeg -i .*clip.mp4"),
    ("folder", "folder: a folder is not a picture; name a file, or give it as a video with fps"),
    ("bomb.png", "bomb.png: more pixels than Pillow opens; shrink it first"),
    ("float.tiff", "convert it to 8 bits"),
    ("deep.png", "convert it to 8 bits"),
    ("deep.tiff", "convert it to 8 bits"),
])
def test_file_that_is_no_picture_is_refused(processor, tmp_path, monkeypatch, name, message):
    """Bugs: it ends in a traceback; pixels of 16 bits are clipped to white."""
    (tmp_path / "clip.mp4").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    Image.new("RGB", (200, 200)).save(tmp_path / "bomb.png")
    Image.new("F", (60, 60)).save(tmp_path / "float.tiff")
    Image.new("I;16", (60, 60)).save(tmp_path / "deep.png")
    Image.new("I;16B", (60, 60)).save(tmp_path / "deep.tiff")
    with pytest.raises((ValueError, OSError), match=message):
        processor(user({"image": tmp_path / name}))


def test_cut_animation_is_refused(processor, tmp_path):
    """Bug: it ends in a traceback: Pillow's decoders raise struct.error and IndexError, too."""
    file = tmp_path / "a.gif"
    frames = [Image.new("RGB", (56, 56), (40 * i, 0, 0)) for i in range(4)]
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=100)
    whole = file.read_bytes()

    # Wherever the file ends.
    messages = set()
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        try:
            processor(video(file))
        except ValueError as error:
            messages.add(str(error).removeprefix(f"{file}: ")[:20])
    assert messages <= {"Pillow cannot read i", "not an animation wit"}


@pytest.mark.parametrize("messages, message", [
    ([], "a conversation is a list of messages"),
    ({"role": "user", "content": "x"}, "a conversation is a list of messages"),
    ([{"role": "tool", "content": "x"}], "cannot use .* as a message of system or user or assistant"),
    ([{"role": "user"}], "cannot use {'role': 'user'} as a message"),
    (user("bare string"), "cannot use 'bare string' as content"),
    (user({"type": "text"}), "cannot use"),
    (user({"image": "data:image/png;base64,AAAA"}), "decode it, and open it with Pillow"),
    (user({"image": "Qk0" + 400 * "A"}), "decode it, and open it with Pillow"),
    (user({"image": "HTTPS://example.org/a.png"}), "URLs are not fetched; download it first"),
    (user({"image": 3}), "int is not a path"),
    (user({"image": Image.new("RGB", (0, 0))}), "longer than 200:1"),
    (user({"image": RED, "max_pixels": -1}), "max_pixels -1: must be a number above 0"),
    (user({"type": "video", "video": [RED], "fps": 0}), "fps 0: must be a number above 0"),
    (user({"type": "video", "video": [RED], "fps": float("inf")}), "fps inf: must be a number above 0"),
    (user({"type": "text", "text": "\ud800"}), "half of a surrogate pair"),
    (user({"type": "text", "text": "\udfff"}), "half of a surrogate pair"),
])
def test_malformed_conversation_is_refused(processor, messages, message):
    """Bug: something else than it asks is answered, or it ends in a traceback."""
    with pytest.raises(ValueError, match=message):
        processor(messages)


def test_what_is_no_video_is_refused(processor, tmp_path):
    """Bug: it ends in a traceback."""
    with pytest.raises(ValueError, match="a video needs frames"):
        processor(video(tmp_path, fps=2))
    RED.save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="not an animation with frame times; give a folder"):
        processor(video(tmp_path / "1.png"))
    (tmp_path / "2.png").write_text("words")
    with pytest.raises(ValueError, match="2.png: Pillow cannot read it"):
        processor(video(tmp_path, fps=2))
