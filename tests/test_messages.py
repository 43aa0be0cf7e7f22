"""What a message asks for is done, or refused by its name; wrong inputs that nobody can see; big inputs."""

import ast
import base64
import io
import re
import shutil
import struct
import sys
import weakref
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import IMAGE, TINY, assert_equal, prompts
from hugging_face import hf_logits
from PIL import Image, ImageSequence
from transformers import AutoTokenizer

import generate as program
import processing
from load_weights import load_processor
from processing import SOURCES
from sampling import generate

DEMO = TINY.parent / "assets" / "demo.png"
RED = Image.new("RGB", (84, 56), "red")
BLUE = Image.new("RGB", (84, 56), "blue")


@pytest.fixture(scope="module")
def processor():
    return load_processor(TINY)


def user(*content):
    return [{"role": "user", "content": list(content)}]


def refusal(call, *args, **kwargs):
    with pytest.raises((ValueError, OSError)) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------- items

@pytest.mark.parametrize("item", [
    {"type": "image", "path": DEMO, "text": ""}, {"type": "image", "url": str(DEMO), "text": None},
    {"type": "image_url", "image_url": {"url": str(DEMO)}}, {"type": "text", "image": DEMO},
    {"image_url": DEMO}, {"type": "video", "image": DEMO},
    {"type": None, "image": Image.open(DEMO), "video": None},
], ids=lambda item: " ".join(item))
def test_item_is_what_the_published_template_makes_of_it(processor, item):
    """Its type is asked for first: a picture under another key than "image" was left out of the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    messages = user(item, {"text": "What is it?"})
    theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert_equal("prompts of other forms of items", processor.prompt(messages), theirs)

    plain = processor(user({"type": "image", "image": DEMO}, {"text": "What is it?"}))
    assert torch.equal(processor(messages)["pixel_values"], plain["pixel_values"])


@pytest.mark.parametrize("item", [
    {"type": "video", "path": [RED, BLUE], "fps": 2}, {"type": "video", "url": (RED, BLUE), "fps": 2.0},
    {"video": [RED, BLUE], "fps": Fraction(2)},
    {"video": [RED, BLUE], "fps": np.float32(2), "max_pixels": None},
], ids=lambda item: " ".join(item))
def test_video_is_where_the_item_says(processor, item):
    plain = processor(user({"type": "video", "video": [RED, BLUE], "fps": 2}))
    for name, values in processor(user(item)).items():
        assert torch.equal(values, plain[name])


@pytest.mark.parametrize("kind, name", [
    *[("image", name) for name in ("resized_height", "max_pixel", "fps", "detail", "text")],
    *[("video", name) for name in ("nframes", "min_frames", "max_frames", "total_pixels", "video_start",
                                   "video_end", "resized_width", "fsp", "image_url ")],
    *[("text", name) for name in ("max_pixels", "fps", "cache_control")],
])
def test_option_of_an_item_is_refused_by_name(processor, kind, name):
    """Typos, and options of qwen-vl-utils, did nothing and said nothing."""
    item = {"image": {"image": RED}, "video": {"video": [RED], "fps": 2}, "text": {"text": "x"}}[kind]
    message = refusal(processor, user(item | {name: 8}))
    assert message.startswith(f"{kind} item: {name!r} is not supported, only type, ")
    assert all(source in message for source in SOURCES[kind]) and len(message) < 200


@pytest.mark.parametrize("messages", [
    "Describe it.", [], ["Describe it."], [{"role": "user", "content": 99 * "'"}, {}],
    [{"role": "function", "content": 99 * "'"}], [{"role": "assistant", "content": None, "tool_calls": []}],
    user(99 * "'"), user(["text", "Describe it."]), user({"type": "audio", "audio": "a.wav"}), user(None),
])
def test_right_form_is_shown_and_is_one(processor, messages):
    """Bug: the form that is advised is too long to be read, or refused itself."""
    message = refusal(processor, messages)
    assert len(message) <= 200
    _, _, form = message.partition("write ")
    assert processor.prompt(ast.literal_eval(form)).count("<|image_pad|>") == 1


@pytest.mark.parametrize("name, value", [
    ("images", [DEMO]), ("image", DEMO), ("tool_calls", [{"name": "look"}]), ("reasoning_content", "Hm."),
    ("weight", 0), ("contents", "x"),
])
def test_option_of_a_message_is_refused_by_name(processor, name, value):
    """Bug: pictures beside the content, as data sets have them, are not in the prompt; nothing is said."""
    messages = user({"text": "x"})
    message = refusal(processor, [messages[0] | {name: value}])
    assert message.startswith(f"message: {name!r} is not supported, only role and content; ")
    assert len(message) <= 200
    empty = [messages[0] | {name: None, "tools": []}]
    assert processor.prompt(empty) == processor.prompt(messages)


def test_option_of_an_url_is_refused_by_name(processor):
    """Bug: the smaller picture that "detail" asks for is taken for a file, or forgotten."""
    item = {"type": "image_url", "image_url": {"url": str(DEMO), "detail": "low"}}
    assert "image_url: 'detail' is not supported, only url; for its size" in refusal(processor, user(item))
    item["image_url"]["detail"] = None
    assert processor(user(item))["image_grid_thw"].tolist() == [[1, 12, 16]]


@pytest.mark.parametrize("item", [
    {"type": "text", "text": "x", "image": None}, {"type": "image"}, {"type": "video", "fps": 2},
    {"image": RED, "path": DEMO}, {"type": "video", "video_url": "x.gif"},
])
def test_item_has_exactly_one_picture(processor, item):
    """As data sets hand out rows whose empty columns are None."""
    message = refusal(processor, user(item))
    assert "give exactly one of " in message and "must lack these keys" in message


@pytest.mark.parametrize("value", ["2", [2], True, float("nan"), float("inf"), 0, -1, Decimal(2), b"2"])
@pytest.mark.parametrize("name", ["fps", "min_pixels", "max_pixels"])
def test_number_of_another_type_is_refused(processor, name, value):
    item = {"video": [RED, RED], "fps": 2} | {name: value}
    assert f"{name} {value!r}: must be a number above 0" in refusal(processor, user(item))


def test_float_of_a_whole_value_is_a_number(processor):
    grids = [processor(user({"image": DEMO, "max_pixels": limit}))["image_grid_thw"].tolist()
             for limit in (25088, 25088.0, np.int64(25088))]
    assert grids[0] == grids[1] == grids[2] != processor(user({"image": DEMO}))["image_grid_thw"].tolist()


# ---------------------------------------------------------------------------- advice

def closed():
    image = Image.open(DEMO)
    image.close()
    return image


def encoded(format):
    """The smallest of pictures in base64."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, format)
    return base64.b64encode(file.getvalue()).decode()


ENCODED = base64.b64encode(DEMO.read_bytes()).decode()
DECODE = r"decode it, and open it with Pillow: Image.open\(io.BytesIO\(...\)\)"
FRAMES = "extract frames first: mkdir frames && ffmpeg -i .* and give the folder with fps 2"
FOREIGN = {
    "URL": ("https://example.org/a.png", "URLs are not fetched; download it first and give its path"),
    "long URL": ("https://example.org/" + 500 * "a", "URLs are not fetched; download it first"),
    "storage": ("gs://bucket/a.png", "download it first and give its path"),
    "file URI": (f"file://{DEMO}", "give the path alone, without file://"),
    "file URI of 2": ("FILE:/tmp/a.png", "give the path alone, without file://"),
    "data URI": (f"data:image/png;base64,{ENCODED}", DECODE),
    "base64": (ENCODED, DECODE),
    "base64, URL-safe": (ENCODED.replace("+", "-").replace("/", "_"), DECODE),
    **{f"base64, a small {format}": (encoded(format), DECODE) for format in ("PNG", "JPEG", "GIF", "WEBP")},
    "bytes": (DEMO.read_bytes(), "bytes is not a path; open files, or bytes in io.BytesIO, with Image.open"),
    "row of a data set": ({"bytes": b"", "path": None}, "dict is not a path; open files, or bytes"),
    "array": (np.zeros((56, 56, 3), np.uint8), "ndarray is not a path; .* arrays with Image.fromarray"),
    "tensor": (torch.zeros(3, 56, 56), "Tensor is not a path; .* arrays with Image.fromarray"),
    "closed file": (open(DEMO, "rb"), "BufferedReader is not a path; open files"),
    "closed picture": (closed(), "an unreadable PIL image .* load it before closing its file"),
    "None": (None, "give exactly one of image, .* must lack these keys, not hold None"),
    "no URL": ({"url": None}, "NoneType is not a path"),
    "nothing": ("", ": no such file; check the path"),
    "long path": (50 * "folder/" + "a.png", "folder/.*: no such file; check the path"),
    "folder": (DEMO.parent, "a folder is not a picture; name a file, or give it as a video with fps"),
    "text": (TINY / "config.json", r"Pillow cannot read it \(cannot identify .*\); if it is a picture, get"),
    **{suffix: (f"clip.{suffix}", FRAMES) for suffix in (
        "MP4 mp4 m4v mov mkv webm avi mpg mpeg wmv flv ts m2ts 3gp ogv".split())},
}
FOREIGN["closed file"][0].close()


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", FOREIGN)
def test_advice_fits_what_was_given(processor, name, kind, tmp_path, monkeypatch):
    """Bugs: a download is advised for a file that is here, the whole of a picture in base64 is said."""
    source, advice = FOREIGN[name]
    monkeypatch.chdir(tmp_path)
    if str(source).startswith("clip."):
        (tmp_path / source).touch()
    if kind == "video":
        advice = {
            "closed picture": "PngImageFile is not a path; .* a video is a folder, a file or a list",
            "None": "give exactly one of video, .* must lack these keys, not hold None",
            "folder": "a video needs frames and fps, the rate at which they were taken; give both",
        }.get(name, advice)
    message = refusal(processor, user({"type": kind, kind: source}))
    assert re.search(advice, message), message
    assert len(message) <= 200


def test_picture_given_as_a_video_is_told_what_a_video_is(processor):
    message = refusal(processor, user({"video": Image.open(DEMO), "fps": 2}))
    assert "PngImageFile is not a path" in message and "a video is a folder, a file or a list" in message


def test_broken_exif_is_told_from_a_broken_picture(processor, tmp_path):
    """Its pixels can be read, and another download has the same EXIF data."""
    # Orientation 6, and a width of -1, which Pillow can read and not write.
    entries = struct.pack("<HHHIIHHII", 2, 0x112, 3, 1, 6, 0x100, 9, 1, 2**32 - 1)
    RED.save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0" + entries + bytes(4))
    message = refusal(processor, user({"image": tmp_path / "a.jpg"}))
    assert "argument out of range" in message and "save it as PNG without its EXIF data" in message


# ---------------------------------------------------------------------------- frames

def test_frames_of_two_sizes_are_refused(processor, tmp_path):
    frames = [RED, Image.new("RGB", (56, 84))]
    assert refusal(processor, user({"video": frames, "fps": 2})) == (
        "frames of (84, 56) and (56, 84) pixels in a video; give them one size")
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i}.png")
    assert "give them one size" in refusal(processor, user({"video": tmp_path, "fps": 2}))


def test_hidden_still_is_no_frame(processor, tmp_path):
    """The default image of an animated PNG is for programs that know no animations."""
    reds = [Image.new("RGB", (84, 56), (255 - 8 * i, 0, 0)) for i in range(6)]
    hidden = tmp_path / "hidden.png"
    BLUE.save(hidden, save_all=True, append_images=reds, default_image=True, duration=500)
    shown = tmp_path / "shown.png"
    reds[0].save(shown, save_all=True, append_images=reds[1:], duration=500)
    ours, plain = (processor(user({"video": path})) for path in (hidden, shown))
    for name in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"):
        assert torch.equal(ours[name], plain[name])

    # As a picture, it is the picture.
    still = processor(user({"image": hidden}))["pixel_values"]
    assert torch.equal(still, processor(user({"image": BLUE}))["pixel_values"])


def test_animation_given_as_frames_is_the_same(processor, tmp_path):
    frames = [Image.new("RGB", (84, 56), (40 * i, 0, 200)) for i in range(4)]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500)
    opened = [frame.copy() for frame in ImageSequence.Iterator(Image.open(path))]
    ours = processor(user({"video": path}))
    assert torch.equal(ours["pixel_values_videos"],
                       processor(user({"video": opened, "fps": 2}))["pixel_values_videos"])


@pytest.mark.parametrize("kind", ["folder", "animation", "list of files", "pictures"])
def test_frames_are_resized_as_they_are_opened(processor, kind, tmp_path, monkeypatch):
    """Bug: all of them are opened first. While one is opened, only the one before it may be in memory."""
    frames = [Image.new("RGB", (84, 56), (20 * i, 0, 99)) for i in range(8)]
    files = [tmp_path / f"{i}.png" for i in range(8)]
    for frame, file in zip(frames, files, strict=True):
        frame.save(file)
    frames[0].save(tmp_path.parent / "a.gif", save_all=True, append_images=frames[1:], duration=500)
    items = {
        "folder": [{"video": tmp_path, "fps": 2}],
        "animation": [{"video": tmp_path.parent / "a.gif"}],
        "list of files": [{"video": files, "fps": 2}],
        "pictures": [{"image": file} for file in files],
    }

    opened = []
    most = 0

    def counted(image):
        nonlocal most
        image = rgb(image)
        opened.append(weakref.ref(image))
        most = max(most, sum(reference() is not None for reference in opened))
        return image

    rgb = processing.rgb
    monkeypatch.setattr(processing, "rgb", counted)
    processor(user(*items[kind]))
    assert len(opened) == 8 and most <= 2


# ---------------------------------------------------------------------------- masks and missing pixels

def shifted(inputs, kind):
    """The padded batch with its pads on the right, or in the middle of a row."""
    moved = {name: inputs[name].clone() for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    pads = int((inputs["attention_mask"][1] == 0).sum())
    for values in moved.values():
        row = values[1]
        order = torch.arange(len(row))
        order = order.roll(-pads) if kind == "right" else torch.cat(
            (order[pads:-5], order[:pads], order[-5:]))
        values[1] = row[order]
    return inputs | moved


@pytest.mark.parametrize("kind", ["right", "middle"])
def test_pads_after_a_token_are_not_answered(pairs, kind):
    """generate would go on after the pads. A forward may have them, and gives Hugging Face's logits."""
    pair = pairs("sdpa")
    inputs = prompts([[20, (4, 6), 9], [12]])
    moved = shifted(inputs, kind)
    assert not torch.equal(inputs["input_ids"], moved["input_ids"])
    message = refusal(generate, pair.ours, moved, max_new_tokens=2)
    assert "pads must come first in a row" in message and "padding_side='left'" in message

    real = moved["attention_mask"].bool()
    ours = pair.ours(**moved)[real]
    assert (ours - hf_logits(pair.hf, moved)[real]).abs().max() < 1e-5 * ours.abs().max()
    assert len(list(generate(pair.ours, inputs, max_new_tokens=2))) == 2


def test_empty_row_is_not_answered(pairs):
    inputs = prompts([[12], [12]])
    inputs["attention_mask"][1] = 0
    assert "pads must come first" in refusal(generate, pairs("sdpa").ours, inputs, max_new_tokens=2)


@pytest.mark.parametrize("missing", [("pixel_values",), ("pixel_values", "image_grid_thw")])
def test_prompt_without_its_pixels_is_refused(pairs, missing):
    ours = pairs("sdpa").ours
    inputs = prompts([[5, (4, 6), 7]])
    position_ids, _ = ours.positions(inputs["input_ids"], image_grid_thw=inputs["image_grid_thw"])
    left = {name: values for name, values in inputs.items() if name not in missing}
    for call in (lambda: ours(**left), lambda: list(generate(ours, left, max_new_tokens=2)),
                 lambda: ours(**left, position_ids=position_ids),
                 lambda: ours.embed(left["input_ids"])):
        assert "placeholders" in refusal(call)


def test_mask_hides_no_picture(pairs):
    """A mask marks pads. All of a picture masked, or a part of it: both are refused in these words."""
    inputs = prompts([[5, (4, 6), 7]])
    hidden = inputs["attention_mask"].clone()
    hidden[inputs["input_ids"] == IMAGE] = 0
    message = refusal(pairs("sdpa").ours, **inputs | dict(attention_mask=hidden))
    assert "attention_mask marks pads and cannot hide a picture" in message
    hidden[0, 7] = 1
    assert "none of them masked" in refusal(pairs("sdpa").ours, **inputs | dict(attention_mask=hidden))


# ---------------------------------------------------------------------------- the command line

@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_line_end_of_stdin_is_not_asked(end, monkeypatch, capsys):
    """With it, the answer loses its first token. One end is dropped, and no more."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Locate the red star." + end, newline=""))
    assert program.question("-") == "Locate the red star."
    monkeypatch.setattr(sys, "stdin", io.StringIO("Two lines.\n\n" + end, newline=""))
    assert program.question("-") == "Two lines.\n" + ("\n" if end else "")


def test_warning_of_a_template_is_one_line(tmp_path, monkeypatch, capsys):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert program.main(["--model", str(tmp_path), "--prompt", "Hello", "--max-new-tokens", "2"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "chat template" in line][0].startswith(f"warning: {tmp_path}: its chat")
