"""A conversation becomes tensors: pictures are resized and cut into patches, the chat template is filled in,
text is tokenized. Start here: this is the first of the seven files.

A picture is cut into patches of 14 x 14 pixels. Four patches in a square are a merge group, which becomes
one token for the decoder, a vision token. A question about a picture becomes this prompt,

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>Describe it.<|im_end|>\\n
    <|im_start|>assistant\\n

written here on three lines, with <|image_pad|> repeated once for every vision token of the picture. "HF:
name" in a docstring names the same thing in Hugging Face's transformers.

Read from the top: sizes, patches, the conversation as a list of parts, the processor that turns them into
tensors. Opening pictures and frames comes last and can be skipped.

Sources: Qwen2.5-VL (arXiv 2502.13923) section 2.1.2 for native resolution and frame rates, Qwen2-VL
(2409.12191) section 2.1. Next: rope.py
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from tokenizers import Tokenizer

# Pictures, as in the published preprocessor_config.json.
MIN_PIXELS = 56 * 56                            # 4 merge groups of 28 x 28 pixels
MAX_PIXELS = 16384 * 28 * 28                    # at most 16,384 tokens for a picture
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200

# Videos, as in qwen-vl-utils: the frames share a budget of pixels; animated files are sampled.
VIDEO_MIN_PIXELS = 128 * 28 * 28                # of a frame
VIDEO_MAX_PIXELS = 768 * 28 * 28                # of a frame; less if the whole video would exceed its total
VIDEO_TOTAL_PIXELS = 0.9 * 128000 * 28 * 28     # 90% of a context of 128,000 tokens
VIDEO_FPS = 2.0
VIDEO_MIN_FRAMES = 4
VIDEO_MAX_FRAMES = 768
NOT_DECODED = "mp4 m4v mov mkv webm avi mpg mpeg wmv flv ts m2ts 3gp ogv".split()

# Control tokens: padding, and the chat template's.
ENDOFTEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"

DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")

# What an item of a message may hold: where its picture or frames are, and how they are read.
SOURCES = dict(text=("text",), image=("image", "image_url", "path", "url"), video=("video", "path", "url"))
OPTIONS = dict(text=(), image=("min_pixels", "max_pixels"), video=("fps", "min_pixels", "max_pixels"))
FORM = 'write [{"role": "user", "content": [{"image": "photo.jpg"}, {"text": "What is this?"}]}]'

Size = tuple[int, int]          # height, width in pixels
Box = Sequence[float]           # x1, y1, x2, y2 in pixels
Grid = tuple[int, int, int]     # time, rows, columns in patches


# ---------------------------------------------------------------------------- sizes and patches

def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> Size:
    """The (height, width) to resize to: multiples of factor, within min_pixels and max_pixels.

    Rounds half to even (70 -> 56). Very long pictures may end up above max_pixels: no side goes below factor.
    Raises ValueError above an aspect ratio of 200. HF: smart_resize.
    """
    if not 0 < max(height, width) <= MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"a picture of {width}x{height} pixels is longer than {MAX_ASPECT_RATIO}:1; crop it")

    h = round(height / factor) * factor
    w = round(width / factor) * factor
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
    """A box of an answer, in pixels of the resized picture, mapped to the original. Sizes: height, width.

    For whoever draws answers: nothing else in these files calls it.
    """
    scale_y = original[0] / resized[0]
    scale_x = original[1] / resized[1]
    x1, y1, x2, y2 = box
    return x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y


def to_resized(box: Box, resized: Size, original: Size) -> tuple[float, ...]:
    """The inverse of `to_original`."""
    return to_original(box, resized=original, original=resized)


def patchify(frames: np.ndarray, patch: int, temporal_patch: int, merge: int) -> tuple[np.ndarray, Grid]:
    """Cut frames (F, H, W, 3) into patches (N, 1176), and say how many there are in time, rows, columns.

    A patch is 3 channels x 2 frames x 14 x 14 pixels. The patches of a merge group are neighbors; groups are
    in reading order. If F is not a multiple of temporal_patch the last frame is repeated, so a still picture
    is its frame twice.
    """
    missing = -len(frames) % temporal_patch
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    t = len(frames) // temporal_patch
    h = frames.shape[1] // patch
    w = frames.shape[2] // patch

    # t, frame | group row, row, y | group column, column, x | channel
    x = frames.reshape(t, temporal_patch, h // merge, merge, patch, w // merge, merge, patch, 3)
    # t, group row, group column, row, column: which patch | channel, frame, y, x: inside it
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return x.reshape(t * h * w, -1), (t, h, w)


# ---------------------------------------------------------------------------- the conversation

@dataclass(frozen=True)
class Part:
    """One piece of a prompt."""
    kind: str                   # "special", "text", "image" or "video"
    text: str                   # what the template writes: a control token, a run of text, a placeholder
    item: dict | None = None    # the message's item, for pictures and videos


def apply_chat_template(messages: list[dict], add_generation_prompt: bool) -> list[Part]:
    """The chat template. What a user types is a "text" part.

    Text can never become a control token: `load_tokenizer` makes the tokenizer spell such words out.
    """
    check_messages(messages)
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]

    parts = []
    for message in messages:
        parts += [Part("special", IM_START), Part("text", f"{message['role']}\n")]
        content = message["content"]
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for item in items:
            parts += item_parts(item)
        parts += [Part("special", IM_END), Part("text", "\n")]
    if add_generation_prompt:
        parts += [Part("special", IM_START), Part("text", "assistant\n")]

    # Neighboring text becomes one part, the template's own included: tokenized piecewise it would give
    # different ids.
    joined = []
    for part in parts:
        if joined and part.kind == joined[-1].kind == "text":
            part = Part("text", joined.pop().text + part.text)
        joined.append(part)
    return joined


def check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"a conversation is a list of messages; {FORM}")
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str | list):
            raise ValueError(f"cannot use {str(message)[:45]} as a message of {' or '.join(ROLES)}; {FORM}")
        for name, value in message.items():
            if name not in ("role", "content") and value not in (None, "", []):
                raise ValueError(f"message: {name!r:.60} is not supported, only role and content; pictures "
                                 "are items of the content")


def item_parts(item: object) -> list[Part]:
    """The parts of an item of a content list; ValueError for what is not supported."""
    kind = item_kind(item)
    if sum(item.get(name) is not None for name in SOURCES[kind]) != 1:
        raise ValueError(f"{kind} item: give exactly one of {', '.join(SOURCES[kind])}; items of another "
                         "kind must lack these keys, not hold None")

    # Keys that do not decide the kind may be there and empty, as when items come from a table.
    known = ("type", *SOURCES[kind], *OPTIONS[kind])
    for name, value in item.items():
        if name not in known and value not in (None, ""):
            raise ValueError(f"{kind} item: {name!r:.60} is not supported, only {', '.join(known)}")

    if kind == "text":
        if re.search(r"[\ud800-\udfff]", item["text"]):
            raise ValueError("the text holds half of a surrogate pair; is it UTF-8?")
        return [Part("text", item["text"])]
    pad = IMAGE_PAD if kind == "image" else VIDEO_PAD
    return [Part("special", VISION_START), Part(kind, pad, item), Part("special", VISION_END)]


def item_kind(item: object) -> str:
    """What an item of a content list is, decided as the published template does: by its type or its keys."""
    if isinstance(item, dict):
        if item.get("type") == "image" or "image" in item or "image_url" in item:
            return "image"
        if item.get("type") == "video" or "video" in item:
            return "video"
        if isinstance(item.get("text"), str):
            return "text"
    raise ValueError(f"cannot use {str(item)[:45]!r} as content; {FORM}")


# ---------------------------------------------------------------------------- the processor

class Medium(NamedTuple):
    """A picture or video, cut into patches."""
    kind: str                   # "image" or "video"
    patches: np.ndarray         # (N, 1176) uint8
    grid: Grid
    interval: float             # seconds from one temporal patch to the next, 0 for a picture


@dataclass
class Processor:
    """Turns conversations into the model's inputs. Made by `load_weights.load_processor`."""
    tokenizer: Tokenizer
    patch_size: int                                 # pixels
    temporal_patch_size: int                        # frames
    merge_size: int                                 # patches
    min_pixels: int = MIN_PIXELS                    # of a picture
    max_pixels: int = MAX_PIXELS
    video_min_pixels: int = VIDEO_MIN_PIXELS        # of a frame
    video_max_pixels: int = 0                       # 0: as many as the video's budget allows
    image_mean: Sequence[float] = IMAGE_MEAN        # of red, green, blue from 0 to 1
    image_std: Sequence[float] = IMAGE_STD

    def prompt(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The template's text, one placeholder per picture or video. ValueError for malformed messages."""
        return "".join(part.text for part in apply_chat_template(messages, add_generation_prompt))

    def decode(self, ids: torch.Tensor | list[int]) -> str:
        """The text of token ids (T,), special tokens left out."""
        return self.tokenizer.decode(torch.as_tensor(ids).tolist(), skip_special_tokens=True)

    def __call__(self, messages: list, add_generation_prompt: bool = True) -> dict[str, torch.Tensor]:
        """The model's inputs for a conversation, or for a list of them as a left-padded batch; on the CPU.

        input_ids, attention_mask (B, T) int64; mm_token_type_ids (B, T) int32: 0 text, 1 picture, 2 video.
        For pictures: pixel_values (N, 1176) float32, image_grid_thw (pictures, 3) int64. For videos:
        pixel_values_videos, video_grid_thw alike, and second_per_grid_ts (videos,) float32.
        Raises ValueError for malformed messages, and ValueError or OSError for files it cannot read.
        """
        is_batch = isinstance(messages, list) and messages and isinstance(messages[0], list)
        rows = []
        media = []
        for conversation in messages if is_batch else [messages]:
            row, its_media = self.encode(conversation, add_generation_prompt)
            rows.append(row)
            media += its_media

        # Pads come first, so that in every row the next token directly follows the last real one.
        token_id = self.tokenizer.token_to_id
        T = max(map(len, rows))
        input_ids = torch.tensor([[token_id(ENDOFTEXT)] * (T - len(row)) + row for row in rows])
        attention_mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
        types = (input_ids == token_id(IMAGE_PAD)).int() + 2 * (input_ids == token_id(VIDEO_PAD)).int()
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, mm_token_type_ids=types)

        # Pictures and videos, each in the order of the whole batch.
        pictures = [medium for medium in media if medium.kind == "image"]
        if pictures:
            inputs["pixel_values"] = self.normalize(*(medium.patches for medium in pictures))
            inputs["image_grid_thw"] = torch.tensor([m.grid for m in pictures])
        videos = [medium for medium in media if medium.kind == "video"]
        if videos:
            inputs["pixel_values_videos"] = self.normalize(*(medium.patches for medium in videos))
            inputs["video_grid_thw"] = torch.tensor([m.grid for m in videos])
            inputs["second_per_grid_ts"] = torch.tensor([m.interval for m in videos])
        return inputs

    def encode(self, messages: list[dict], add_generation_prompt: bool) -> tuple[list[int], list[Medium]]:
        """The token ids of one conversation, and its pictures and videos."""
        row = []
        media = []
        for part in apply_chat_template(messages, add_generation_prompt):
            if part.kind == "text":
                row += self.tokenizer.encode(part.text, add_special_tokens=False).ids
                continue

            count = 1
            if part.kind != "special":      # a placeholder for every merge group
                media.append(self.load(part.kind, part.item))
                count = math.prod(media[-1].grid) // self.merge_size**2
            row += [self.tokenizer.token_to_id(part.text)] * count
        return row, media

    def load(self, kind: str, item: dict) -> Medium:
        """Open the picture or video of a message's item, and cut it into patches."""
        source = next(item[name] for name in SOURCES[kind] if item.get(name) is not None)
        low = number(item, "min_pixels")
        high = number(item, "max_pixels")
        if kind == "image":
            patches, grid = self.cut([open_image(source)], low or self.min_pixels, high or self.max_pixels)
            return Medium(kind, patches, grid, interval=0.0)

        frames, count, seconds = open_video(source, number(item, "fps"))
        low = low or self.video_min_pixels
        high = high or self.video_max_pixels

        # A frame's share of the total, where a pair counts once; at least 5% above low, as in qwen-vl-utils.
        if not high:
            share = VIDEO_TOTAL_PIXELS * self.temporal_patch_size / count
            high = max(min(VIDEO_MAX_PIXELS, share), int(1.05 * low))
        low = min(low, high)        # a video's own max_pixels may be below the checkpoint's minimum
        return Medium(kind, *self.cut(frames, low, high), interval=seconds * self.temporal_patch_size)

    def cut(self, frames: Iterable[Image.Image], low: float, high: float) -> tuple[np.ndarray, Grid]:
        """Frames of one size, each resized as soon as it is opened, and patchified."""
        size = None
        resized = []
        for frame in frames:
            size = size or frame.size
            if frame.size != size:
                raise ValueError(f"frames of {size} and {frame.size} pixels in a video; give them one size")

            height, width = smart_resize(
                frame.height, frame.width, self.patch_size * self.merge_size, low, high)
            resized.append(np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC)))
        return patchify(np.stack(resized), self.patch_size, self.temporal_patch_size, self.merge_size)

    def normalize(self, *patches: np.ndarray) -> torch.Tensor:
        """Patches (N, 1176) uint8, of one picture or more, as float32: from 0 to 1, minus the mean, divided
        by the deviation.
        """
        x = np.concatenate(patches, dtype=np.float32)       # the only copy: the rest is in place
        x = x.reshape(len(x), 3, -1)                        # patches, channels, the rest
        x /= np.float32(255)
        x -= np.array(self.image_mean, np.float32)[:, None]
        x /= np.array(self.image_std, np.float32)[:, None]
        return torch.from_numpy(x).flatten(1)


# ---------------------------------------------------------------------------- opening pictures and frames

def number(item: dict, name: str) -> float | None:
    """A number of an item; None if it is not given."""
    value = item.get(name)
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 < value < math.inf):
        raise ValueError(f"{name} {value!r:.60}: must be a number above 0")
    return value


# What to do about a source that is not a path.
NO_PATHS = {
    r"(?i)file:": "give the path alone, without file://",
    r"(?i)data:|iVBORw0KGgo|/9j/|R0lGOD|UklGR|[\w+/=\s-]{400}":     # or how files begin in base64
        "decode it, and open it with Pillow: Image.open(io.BytesIO(...))",
    r"(?i)[a-z][a-z\d+.-]+:/": "URLs are not fetched; download it first and give its path",
}


def local_path(source: object) -> Path:
    if isinstance(source, dict) and "url" in source:        # {"image_url": {"url": path}}
        others = [name for name, value in source.items() if name != "url" and value is not None]
        if others:
            raise ValueError(f"image_url: {others[0]!r:.60} is not supported, only url; for its size, give "
                             "the item max_pixels")
        source = source["url"]
    if not isinstance(source, str | Path):
        raise ValueError(f"{type(source).__name__} is not a path; open files, or bytes in io.BytesIO, with "
                         "Image.open, arrays with Image.fromarray; a video is a folder, a file or a list")

    # Path.exists won't do: Path("") is the working directory, and a name that is too long raises.
    if os.path.exists(source):
        return Path(source)

    for pattern, advice in NO_PATHS.items():
        if re.match(pattern, str(source)):
            raise ValueError(f"{str(source)[:60]}: {advice}")
    raise OSError(f"{str(source)[:150]}: no such file; check the path")


def read_frames(path: Path) -> Iterator[tuple[Image.Image, float]]:
    """Each frame of a picture file and how many seconds it is shown for; one frame for a still picture."""
    if path.suffix.lower()[1:] in NOT_DECODED:
        raise ValueError("video files are not decoded; extract frames first: mkdir frames && "
                         f"ffmpeg -i {path} -vf fps=2 frames/%05d.png, and give the folder with fps 2")
    if path.is_dir():
        raise ValueError(f"{path}: a folder is not a picture; name a file, or give it as a video with fps")
    try:
        with Image.open(path) as file:
            for frame in ImageSequence.Iterator(file):
                frame.load()
                yield ImageOps.exif_transpose(frame), frame.info.get("duration", 0) / 1000
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: more pixels than Pillow opens; shrink it first") from None
    except Exception as error:      # decoders raise anything on a broken file
        raise ValueError(f"{path}: Pillow cannot read it ({error!s:.60}); if it is a picture, get it again, "
                         "or save it as PNG without its EXIF data") from None


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
    """A picture in RGB from a path, with its EXIF orientation applied, or from a PIL image as is."""
    if isinstance(source, Image.Image):
        try:
            source.load()
        except Exception as error:
            raise ValueError(f"an unreadable PIL image ({error}); load it before closing its file") from None
        return rgb(source)
    frame, _ = next(read_frames(local_path(source)))
    return rgb(frame)


def open_video(source: object, fps: float | None) -> tuple[Iterable[Image.Image], int, float]:
    """The frames of a video, opened one by one; how many there are, and the seconds from one to the next."""
    # An animated file is sampled; a folder is a list of files.
    if not isinstance(source, list | tuple):
        path = local_path(source)
        if not path.is_dir():
            return sample_frames(path, fps or VIDEO_FPS)
        source = sorted((file for file in path.iterdir() if not file.name.startswith(".")), key=by_number)

    if not source or fps is None:
        raise ValueError("a video needs frames and fps, the rate at which they were taken; give both")
    return map(open_image, source), len(source), 1 / float(fps)


def by_number(file: Path) -> list[int | str]:
    """A key for sorting by the numbers in the names: frame9 comes before frame10."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", file.name)]


def sample_frames(path: Path, fps: float) -> tuple[Iterable[Image.Image], int, float]:
    """Frames of an animated file, evenly spaced, about fps of them per second; how many, and the seconds that
    each stands for.

    The file is read twice, so that only one frame at a time is held at full size.
    """
    # Frame number -> seconds shown. The first of an animated PNG may be a fallback, outside the animation.
    delays = {i: delay for i, (frame, delay) in enumerate(read_frames(path))
              if i > 0 or not frame.info.get("default_image")}
    duration = sum(delays.values())
    if duration == 0:
        raise ValueError(f"{path}: not an animation with frame times; give a folder of frames and fps")

    # An even number, as in qwen-vl-utils: two frames share a patch.
    count = min(max(duration * fps, VIDEO_MIN_FRAMES), VIDEO_MAX_FRAMES, len(delays))
    count = max(int(count) // 2 * 2, 2)
    chosen = np.array([*delays.keys()])[np.linspace(0, len(delays) - 1, count).round().astype(int)]
    frames = (rgb(frame) for i, (frame, _) in enumerate(read_frames(path)) if i in chosen)
    return frames, count, duration / count
