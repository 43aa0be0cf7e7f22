"""A conversation becomes tensors: pictures are resized and cut into patches, the chat template is filled in,
text is tokenized. Start here: this is the first of the six files.

Read from the top: sizes, patches, the conversation as a list of parts, the processor that makes tensors of
them. Loading it, and opening pictures and frames, come last and can be skipped.

Sources: Qwen2.5-VL (arXiv 2502.13923) section 2.1.2 for native resolution and frame rates, Qwen2-VL
(2409.12191) section 2.1. Next: rope.py
"""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from tokenizers import Tokenizer

# Published preprocessor_config.json, for keys that a checkpoint leaves out.
MIN_PIXELS = 56 * 56                            # 4 merge groups of 28 x 28 pixels
MAX_PIXELS = 16384 * 28 * 28                    # at most 16,384 tokens for a picture
PATCH_SIZE, TEMPORAL_PATCH_SIZE, MERGE_SIZE = 14, 2, 2      # pixels, frames, patches
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200

# Videos, as in qwen-vl-utils: the frames share a budget of pixels; animated files are sampled.
VIDEO_MIN_PIXELS = 128 * 28 * 28                # of a frame
VIDEO_MAX_PIXELS = 768 * 28 * 28                # of a frame, while the video stays inside its total
VIDEO_TOTAL_PIXELS = 0.9 * 128000 * 28 * 28     # 90 % of a context of 128,000 tokens
VIDEO_FPS, VIDEO_MIN_FRAMES, VIDEO_MAX_FRAMES = 2.0, 4, 768

# Control tokens of the chat template.
ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")
FORM = ('write [{"role": "user", "content": [{"type": "image", "image": "photo.jpg"}, '
        '{"type": "text", "text": "What is this?"}]}]')

Size = tuple[int, int]          # height, width in pixels
Box = Sequence[float]           # x1, y1, x2, y2 in pixels
Grid = tuple[int, int, int]     # time, rows, columns in patches


# ---------------------------------------------------------------------------- sizes and patches

def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> Size:
    """The (height, width) to resize to: multiples of factor, min_pixels to max_pixels, aspect ratio kept.

    Rounds half to even (70 -> 56). Very long pictures may end above max_pixels: no side goes below factor.
    Raises ValueError above an aspect ratio of 200. HF: smart_resize.
    """
    if not 0 < max(height, width) <= MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"a picture of {width}x{height} pixels is longer than {MAX_ASPECT_RATIO}:1; crop it")
    if min(factor, max_pixels) <= 0:
        raise ValueError(f"factor {factor}, max_pixels {max_pixels}: must be above 0")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return h, w


def to_original(box: Box, resized: Size, original: Size) -> tuple[float, ...]:
    """A box of an answer, in pixels of the resized picture, mapped to the original. Sizes: height, width."""
    y, x = original[0] / resized[0], original[1] / resized[1]
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def to_resized(box: Box, resized: Size, original: Size) -> tuple[float, ...]:
    """The inverse of `to_original`."""
    return to_original(box, resized=original, original=resized)


def patchify(frames: np.ndarray, patch: int, temporal_patch: int, merge: int) -> tuple[np.ndarray, Grid]:
    """Cut frames (F, H, W, 3) into patch rows (N, 3 * temporal_patch * patch * patch); also gives the grid.

    A row is one patch: channel, frame, y, x. Rows of a merge group are neighbours, groups in reading order.
    Where F is no multiple of temporal_patch the last frame is repeated: a still picture is its frame twice.
    """
    frames = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % temporal_patch, axis=0)])
    t, h, w = len(frames) // temporal_patch, frames.shape[1] // patch, frames.shape[2] // patch
    x = frames.reshape(t, temporal_patch, h // merge, merge, patch, w // merge, merge, patch, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # t, group row, its column, row, column, channel, frame, y, x
    return x.reshape(t * h * w, -1), (t, h, w)


# ---------------------------------------------------------------------------- the conversation

@dataclass
class Part:
    """One piece of a prompt."""
    kind: str                   # "special", "text", "image" or "video"
    text: str                   # what the template writes: a control token, a run of text, a placeholder
    item: dict | None = None    # the message's item, for pictures and videos


def apply_chat_template(messages: list[dict], add_generation_prompt: bool) -> list[Part]:
    """The chat template. What a user types is a "text" part, and so can never become a control token.

    Neighbouring text is one part, the template's own included: tokenized piecewise it would give other ids.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"a conversation is a list of messages; {FORM}")
    if messages[0].get("role") != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
    parts = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str | list):
            raise ValueError(f"cannot use {str(message)[:60]} as a message of {' or '.join(ROLES)}; {FORM}")
        parts += [Part("special", IM_START), Part("text", f"{role}\n")]
        for item in [{"text": content}] if isinstance(content, str) else content:
            kind = item_kind(item)
            if kind == "text":
                if re.search(r"[\ud800-\udfff]", item["text"]):
                    raise ValueError("the text holds half of a surrogate pair; is it UTF-8?")
                parts.append(Part("text", item["text"]))
            else:
                pad = IMAGE_PAD if kind == "image" else VIDEO_PAD
                parts += [Part("special", VISION_START), Part(kind, pad, item), Part("special", VISION_END)]
        parts += [Part("special", IM_END), Part("text", "\n")]
    if add_generation_prompt:
        parts += [Part("special", IM_START), Part("text", "assistant\n")]

    joined = parts[:1]
    for part in parts[1:]:
        if part.kind == joined[-1].kind == "text":
            joined[-1].text += part.text
        else:
            joined.append(part)
    return joined


def item_kind(item: object) -> str:
    """What an item of a content list is, by its keys and not by its type. HF: the published template."""
    if isinstance(item, dict):
        if "image" in item or "image_url" in item:
            return "image"
        if "video" in item:
            return "video"
        if isinstance(item.get("text"), str):
            return "text"
    raise ValueError(f"cannot use {str(item)[:60]!r} as content; {FORM}")


# ---------------------------------------------------------------------------- the processor

@dataclass
class Processor:
    """Turns conversations into the model's inputs. Made by `load_processor`."""
    tokenizer: Tokenizer
    min_pixels: int                     # of a picture
    max_pixels: int
    video_min_pixels: int               # of a frame
    video_max_pixels: int               # 0: as many as the video's budget allows
    patch_size: int                     # pixels
    temporal_patch_size: int            # frames
    merge_size: int                     # patches
    image_mean: Sequence[float]         # of red, green, blue from 0 to 1
    image_std: Sequence[float]

    def prompt(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The template's text, one placeholder per picture or video. ValueError for malformed messages."""
        return "".join(part.text for part in apply_chat_template(messages, add_generation_prompt))

    def decode(self, ids: torch.Tensor | list[int]) -> str:
        """The text of token ids (T,), special tokens left out."""
        return self.tokenizer.decode(torch.as_tensor(ids).tolist(), skip_special_tokens=True)

    def __call__(self, messages: list, add_generation_prompt: bool = True) -> dict[str, torch.Tensor]:
        """The model's inputs for a conversation, or for a list of them as a left-padded batch; on the CPU.

        input_ids, attention_mask (B, T) int64; mm_token_type_ids (B, T) int32, 0 text, 1 picture, 2 video;
        and where there are any pixel_values, pixel_values_videos (N, 1176) float32; image_grid_thw,
        video_grid_thw (items, 3) int64; second_per_grid_ts (videos,) float32.
        Raises ValueError for malformed messages, and ValueError or OSError for files it cannot read.
        """
        several = isinstance(messages, list) and messages and isinstance(messages[0], list)
        token_id = self.tokenizer.token_to_id
        media, rows = dict(image=[], video=[]), []      # media: (patches, grid, seconds per temporal patch)
        for conversation in messages if several else [messages]:
            row = []
            for part in apply_chat_template(conversation, add_generation_prompt):
                if part.kind == "text":
                    ids = self.tokenizer.encode(part.text, add_special_tokens=False).ids
                else:
                    ids = [token_id(part.text)]
                if part.item is not None:
                    frames, limits, interval = self.open(part.kind, part.item)
                    patches, grid = self.patches(frames, *limits)
                    media[part.kind].append((patches, grid, interval))
                    ids *= math.prod(grid) // self.merge_size**2        # a placeholder per merge group
                row += ids
            rows.append(row)

        T = max(map(len, rows))
        input_ids = torch.tensor([[token_id(ENDOFTEXT)] * (T - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
        types = (input_ids == token_id(IMAGE_PAD)).int() + 2 * (input_ids == token_id(VIDEO_PAD)).int()
        inputs = {"input_ids": input_ids, "attention_mask": mask, "mm_token_type_ids": types}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if media[kind]:
                patches, grids, intervals = zip(*media[kind])
                inputs[name] = torch.from_numpy(np.concatenate(patches))
                inputs[f"{kind}_grid_thw"] = torch.tensor(grids)
                if kind == "video":
                    inputs["second_per_grid_ts"] = torch.tensor(intervals)
        return inputs

    def open(self, kind: str, item: dict) -> tuple[list[Image.Image], tuple[float, float], float]:
        """The frames of a picture or video, the least and most pixels of each, seconds per temporal patch."""
        if kind == "image":
            limits = item.get("min_pixels") or self.min_pixels, item.get("max_pixels") or self.max_pixels
            return [open_image(item.get("image", item.get("image_url")))], limits, 0.0
        frames, seconds = open_video(item)
        low = item.get("min_pixels") or self.video_min_pixels
        high = item.get("max_pixels") or self.video_max_pixels
        if not high:        # a share of the total; temporal_patch_size frames become tokens together
            share = VIDEO_TOTAL_PIXELS * self.temporal_patch_size / len(frames)
            high = max(min(VIDEO_MAX_PIXELS, share), int(1.05 * low))
        return frames, (min(low, high), high), seconds * self.temporal_patch_size

    def patches(
        self, frames: list[Image.Image], min_pixels: float, max_pixels: float
    ) -> tuple[np.ndarray, Grid]:
        """Frames resized, all to one size, normalised in float32 and patchified."""
        width, height = frames[0].size
        factor = self.patch_size * self.merge_size
        height, width = smart_resize(height, width, factor, min_pixels, max_pixels)
        resized = [np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC)) for frame in frames]
        x = np.stack(resized).astype(np.float32) / np.float32(255)
        x = (x - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        return patchify(x, self.patch_size, self.temporal_patch_size, self.merge_size)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises OSError where it is missing, ValueError where it is broken."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        raise OSError(f"{path}: no such file; is {path.parent} a complete checkpoint?") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a JSON object ({error}); download it again") from None


def fits(value: object, kind: type) -> bool:
    """Whether a value from JSON is a number from 0 on; for a tuple a list of those; else just of the type."""
    if kind in (int, float):
        return type(value) in (int, kind) and value >= 0
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(fits(number, get_args(kind)[0]) for number in value)
    return isinstance(value, kind)


def setting(path: Path, content: dict, name: str, kind: type, default: object = None) -> Any:
    """content[name], which a JSON file at `path` holds; where that is missing or null, default.

    Raises ValueError where the value is not of the kind (see `fits`), or missing without a default.
    """
    value = default if content.get(name) is None else content[name]
    if not fits(value, kind):
        what = f"no {name}" if value is None else f"{name} cannot be {value!r}"
        raise ValueError(f"{path}: {what}; download it again")
    return value


def load_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:      # the library raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer ({error}); download it again") from None
    tokenizer.encode_special_tokens = True      # "<|im_end|>" in a run of text is ten characters and no token
    for token in (ENDOFTEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD):
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"{path}: no {token} in it; is it Qwen2.5-VL's?")
    return tokenizer


def load_processor(
    path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None
) -> Processor:
    """The processor of a checkpoint directory; min_pixels and max_pixels, of a picture, override its own.

    Raises OSError or ValueError where a file is missing or broken, ValueError for limits that make no sense.
    """
    path = Path(path)
    both, separate = path / "processor_config.json", path / "video_preprocessor_config.json"
    nested = read_json(both) if both.exists() else {}       # transformers 5: one file for pictures and videos
    image = setting(both, nested, "image_processor", dict, {}) or read_json(path / "preprocessor_config.json")
    video = read_json(separate) if separate.exists() else setting(both, nested, "video_processor", dict, {})
    size, video_size = (setting(path, settings, "size", dict, {}) for settings in (image, video))
    if min_pixels is None:
        min_pixels = setting(path, image, "min_pixels", int, size.get("shortest_edge", MIN_PIXELS))
    if max_pixels is None:
        max_pixels = setting(path, image, "max_pixels", int, size.get("longest_edge", MAX_PIXELS))
    if not 0 < min_pixels <= max_pixels:
        raise ValueError(f"max_pixels {max_pixels}: must be above 0 and at least min_pixels, {min_pixels}")
    return Processor(
        load_tokenizer(path / "tokenizer.json"), min_pixels, max_pixels,
        video_min_pixels=setting(path, video_size, "shortest_edge", int, VIDEO_MIN_PIXELS),
        video_max_pixels=setting(path, video_size, "longest_edge", int, 0),
        patch_size=setting(path, image, "patch_size", int, PATCH_SIZE),
        temporal_patch_size=setting(path, image, "temporal_patch_size", int, TEMPORAL_PATCH_SIZE),
        merge_size=setting(path, image, "merge_size", int, MERGE_SIZE),
        image_mean=setting(path, image, "image_mean", tuple[float, ...], IMAGE_MEAN),
        image_std=setting(path, image, "image_std", tuple[float, ...], IMAGE_STD),
    )


# ---------------------------------------------------------------------------- opening pictures and frames

def local_path(source: object) -> Path:
    source = source.get("url") if isinstance(source, dict) else source      # {"image_url": {"url": path}}
    if not isinstance(source, str | Path):
        raise ValueError(f"a picture is a path or a PIL image, not {type(source).__name__}; {FORM}")
    if re.match(r"(?i)[a-z]+:/|data:", str(source)):
        raise ValueError(f"{str(source)[:60]}: URLs are not fetched; download it first and give its path")
    if not os.path.exists(source):      # to Path "" is the working directory, and too long a name an error
        raise OSError(f"{source}: no such file; check the path")
    return Path(source)


def read_frames(path: Path) -> Iterator[tuple[Image.Image, float]]:
    """Each frame of a picture file and how many seconds it is shown; one frame for a still picture."""
    if path.suffix.lower() in (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg"):
        raise ValueError(f"{path}: video files are not decoded; extract frames first: mkdir frames && "
                         f"ffmpeg -i {path} -vf fps=2 frames/%05d.png, and give the folder with fps 2")
    try:
        with Image.open(path) as file:
            for frame in ImageSequence.Iterator(file):
                frame.load()
                yield ImageOps.exif_transpose(frame), frame.info.get("duration", 0) / 1000
    except Exception as error:      # decoders raise anything on a broken file
        raise ValueError(f"{path}: Pillow cannot read it ({error}); get it again, or as PNG") from None


def rgb(image: Image.Image) -> Image.Image:
    """RGB, transparency on white. HF: convert_to_rgb."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise ValueError(f"a picture with {image.mode} pixels (16 bits or more) would be clipped to white; "
                         "convert it to 8 bits first")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def open_image(source: object) -> Image.Image:
    """A picture in RGB from a path, with its EXIF orientation applied, or from a PIL image as it is."""
    return rgb(source if isinstance(source, Image.Image) else next(read_frames(local_path(source)))[0])


def open_video(item: dict) -> tuple[list[Image.Image], float]:
    """The frames of a video item and the seconds from one to the next."""
    source, fps = item.get("video"), item.get("fps")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps {fps}: must be above 0")
    if not isinstance(source, list):
        path = local_path(source)
        if not path.is_dir():
            return sample_frames(path, fps or VIDEO_FPS)
        # By the numbers in the names: frame9 comes before frame10.
        numbers = lambda file: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", file.name)]
        source = sorted((file for file in path.iterdir() if not file.name.startswith(".")), key=numbers)
    if not source or fps is None:
        raise ValueError("a video needs frames and fps, the rate at which they were taken; give both")
    return [open_image(frame) for frame in source], 1 / fps


def sample_frames(path: Path, fps: float) -> tuple[list[Image.Image], float]:
    """Frames of an animated file, evenly spaced at about fps, and the seconds from one to the next."""
    frames, delays = zip(*read_frames(path))
    duration = sum(delays)
    if duration == 0:
        raise ValueError(f"{path}: not an animation with frame times; give a folder of frames and fps")
    count = min(max(duration * fps, VIDEO_MIN_FRAMES), VIDEO_MAX_FRAMES, len(frames))
    count = max(int(count) // 2 * 2, 2)
    indices = np.linspace(0, len(frames) - 1, count).round().astype(int)
    return [rgb(frames[i]) for i in indices], duration / count
