"""A conversation becomes tensors: pictures are resized and cut into patches, the chat template is filled in, text is
tokenized. Start here: this is the first of the six files.

Read from the top: sizes, patches, the conversation as a list of parts, the processor that makes tensors of them. Opening
pictures and frames comes last and can be skipped.

Sources: Qwen2.5-VL (arXiv 2502.13923) section 2.1.2 for native resolution and frame rates, Qwen2-VL (2409.12191)
section 2.1. Next: rope.py
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from tokenizers import Tokenizer

# Published preprocessor_config.json, for keys that a checkpoint leaves out.
MIN_PIXELS = 56 * 56                            # 4 merge groups of 28 x 28 pixels
MAX_PIXELS = 16384 * 28 * 28                    # 16,384 merge groups: as many tokens for one picture
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200

# Videos (qwen-vl-utils): the frames of one share a budget of pixels; a file is sampled.
VIDEO_MIN_PIXELS = 128 * 28 * 28                # of a frame
VIDEO_MAX_PIXELS = 768 * 28 * 28                # of a frame, while the video stays inside its total
VIDEO_TOTAL_PIXELS = 0.9 * 128000 * 28 * 28     # nine tenths of the longest context
VIDEO_FPS, VIDEO_MIN_FRAMES, VIDEO_MAX_FRAMES = 2.0, 4, 768

# Control tokens of the chat template.
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")
FORM = ('write [{"role": "user", "content": [{"type": "image", "image": "photo.jpg"}, '
        '{"type": "text", "text": "What is this?"}]}]')

Size = tuple[int, int]      # height, width in pixels
Box = Sequence[float]       # x1, y1, x2, y2 in pixels


# ---------------------------------------------------------------------------- sizes and patches

def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> Size:
    """The (height, width) to resize to: multiples of factor, between min_pixels and max_pixels, aspect ratio kept.

    Rounds half to even (70 -> 56). Very long pictures may end above max_pixels: no side goes below factor.
    Raises ValueError above an aspect ratio of 200. HF: smart_resize.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"a picture of {width}x{height} pixels is longer than {MAX_ASPECT_RATIO}:1; crop it")
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
    """A box of an answer, in pixels of the resized picture, in pixels of the original one. Sizes: (height, width)."""
    y, x = original[0] / resized[0], original[1] / resized[1]
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def to_resized(box: Box, resized: Size, original: Size) -> tuple[float, ...]:
    """The inverse of `to_original`."""
    return to_original(box, resized=original, original=resized)


def patchify(frames: np.ndarray, patch: int, temporal_patch: int, merge: int) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cut (F, H, W, 3) into patch rows (N, 3 * temporal_patch * patch * patch) and the grid (t, h, w) in patches.

    A row is one patch: channel, frame, y, x. The rows of a merge group are neighbours, groups in reading order.
    Where F is no multiple of temporal_patch the last frame is repeated: a still picture is its frame twice.
    """
    frames = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % temporal_patch, axis=0)])
    t, h, w = len(frames) // temporal_patch, frames.shape[1] // patch, frames.shape[2] // patch
    x = frames.reshape(t, temporal_patch, h // merge, merge, patch, w // merge, merge, patch, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)      # t, group row, group column, row, column, channel, frame, y, x
    return x.reshape(t * h * w, -1), (t, h, w)


# ---------------------------------------------------------------------------- the conversation

@dataclass
class Part:
    """One piece of a prompt: a control token, a run of text, or a picture or video."""
    kind: str                   # "control", "text", "image" or "video"
    text: str = ""              # what the template writes for it
    item: dict | None = None    # the item of the message, for pictures and videos


def conversation(messages: list[dict], add_generation_prompt: bool) -> list[Part]:
    """The chat template. What a user types stays a "text" part and so can never become a control token."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"a conversation is a list of messages; {FORM}")
    if messages[0].get("role") != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
    parts = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}: use one of {', '.join(ROLES)}; {FORM}")
        parts += [Part("control", IM_START), Part("text", f"{role}\n")]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise ValueError(f"the content of a message is a string or a list, not {type(content).__name__}; {FORM}")
        for item in content:
            parts += content_parts(item)
        parts += [Part("control", IM_END), Part("text", "\n")]
    if add_generation_prompt:
        parts += [Part("control", IM_START), Part("text", "assistant\n")]
    return parts


def content_parts(item: dict) -> list[Part]:
    if isinstance(item, dict):
        if item.get("type") == "image" or "image" in item or "image_url" in item:
            return [Part("control", VISION_START), Part("image", IMAGE_PAD, item), Part("control", VISION_END)]
        if item.get("type") == "video" or "video" in item:
            return [Part("control", VISION_START), Part("video", VIDEO_PAD, item), Part("control", VISION_END)]
        if isinstance(item.get("text"), str):
            return [Part("text", item["text"])]
    raise ValueError(f"cannot use {str(item)[:60]!r} as content; {FORM}")


@dataclass
class Processor:
    """Turns conversations into the model's inputs. Made by `load_processor`."""
    tokenizer: Tokenizer
    pad_token_id: int
    min_pixels: int
    max_pixels: int
    video_pixels: Size | None           # min and max of a frame, where the checkpoint says so
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    def prompt(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The template's text, with one placeholder per picture or video. Raises ValueError for malformed messages."""
        return "".join(part.text for part in conversation(messages, add_generation_prompt))

    def decode(self, ids: torch.Tensor | list[int]) -> str:
        """The text of token ids (T,), special tokens left out."""
        return self.tokenizer.decode(torch.as_tensor(ids).tolist(), skip_special_tokens=True)

    def __call__(self, messages: list, add_generation_prompt: bool = True) -> dict[str, torch.Tensor]:
        """The inputs of one conversation, or of a list of them as a left-padded batch: CPU tensors by HF's names.

        input_ids, attention_mask (B, T) int64; mm_token_type_ids (B, T) int32, 0 text, 1 picture, 2 video;
        pixel_values, pixel_values_videos (N, 1176) float32; image_grid_thw, video_grid_thw (items, 3) int64;
        second_per_grid_ts (videos,) float32. Raises ValueError or OSError for what it cannot read.
        """
        batch = messages if messages and isinstance(messages[0], list) else [messages]
        media: dict[str, list] = {"image": [], "video": []}
        rows, intervals = [], []
        for parts in [conversation(messages, add_generation_prompt) for messages in batch]:
            row = []                                    # (token id, type) pairs
            for kind, text, items in join_text(parts):
                if kind == "text":
                    row += [(i, 0) for i in self.tokenizer.encode(text, add_special_tokens=False).ids]
                elif kind == "control":
                    row.append((self.tokenizer.token_to_id(text), 0))
                else:
                    pixels, grid, interval = self.image(items) if kind == "image" else self.video(items)
                    media[kind].append((pixels, grid))
                    intervals += [interval] if kind == "video" else []
                    count = math.prod(grid) // self.merge_size**2
                    row += [(self.tokenizer.token_to_id(text), 1 if kind == "image" else 2)] * count
            rows.append(row)

        T = max(map(len, rows))
        table = torch.tensor([[(self.pad_token_id, 0, 0)] * (T - len(row)) + [(i, kind, 1) for i, kind in row]
                              for row in rows])
        inputs = dict(input_ids=table[:, :, 0], attention_mask=table[:, :, 2], mm_token_type_ids=table[:, :, 1].int())
        for kind, pixels_name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if media[kind]:
                inputs[pixels_name] = torch.from_numpy(np.concatenate([pixels for pixels, _ in media[kind]]))
                inputs[f"{kind}_grid_thw"] = torch.tensor([grid for _, grid in media[kind]])
        if intervals:
            inputs["second_per_grid_ts"] = torch.tensor(intervals)
        return inputs

    def image(self, item: dict) -> tuple[np.ndarray, tuple[int, int, int], float]:
        source = item.get("image", item.get("image_url"))
        return *self.pixels([open_image(source)], self.min_pixels, self.max_pixels), 0.0

    def video(self, item: dict) -> tuple[np.ndarray, tuple[int, int, int], float]:
        frames, seconds = open_video(item)
        low, high = self.video_pixels or (VIDEO_MIN_PIXELS, None)
        low = item.get("min_pixels", low)
        # Frames count in pairs: two share one temporal patch and so one set of tokens.
        budget = VIDEO_TOTAL_PIXELS * self.temporal_patch_size / len(frames)
        high = item.get("max_pixels", high or max(min(VIDEO_MAX_PIXELS, budget), int(1.05 * low)))
        return *self.pixels(frames, low, high), self.temporal_patch_size * seconds

    def pixels(self, frames: list[Image.Image], min_pixels: int, max_pixels: int) -> tuple:
        """Resize (all to one size), normalise in float32 and patchify."""
        width, height = frames[0].size
        height, width = smart_resize(height, width, self.patch_size * self.merge_size, min_pixels, max_pixels)
        resized = [np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC)) for frame in frames]
        x = np.stack(resized).astype(np.float32) / np.float32(255)
        x = (x - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        return patchify(x, self.patch_size, self.temporal_patch_size, self.merge_size)


def join_text(parts: list[Part]) -> Iterator[tuple[str, str, dict | None]]:
    """(kind, text, item) with neighbouring text in one run: tokenized piecewise, "user\\n" + "\\nHi" gives other ids."""
    run = ""
    for part in parts:
        if part.kind == "text":
            run += part.text
            continue
        if run:
            yield "text", run, None
        run = ""
        yield part.kind, part.text, part.item
    if run:
        yield "text", run, None


def load_processor(path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None) -> Processor:
    """The processor of a checkpoint directory; min_pixels and max_pixels of a picture override the checkpoint's.

    Raises OSError where a file is missing, ValueError where one is broken or the limits make no sense.
    """
    path = Path(path)

    def read(name: str) -> dict | None:
        try:
            return json.loads((path / name).read_text(encoding="utf-8")) if (path / name).exists() else None
        except ValueError as error:
            raise ValueError(f"{path / name}: not valid JSON ({error}); download it again") from None

    picture = read("preprocessor_config.json")
    if picture is None:
        picture = (read("processor_config.json") or {}).get("image_processor")
    if picture is None or not (path / "tokenizer.json").exists():
        missing = "preprocessor_config.json" if picture is None else "tokenizer.json"
        raise OSError(f"{path / missing}: no such file; is {path} a complete checkpoint?")
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:      # the library raises nothing narrower
        raise ValueError(f"{path / 'tokenizer.json'}: not a tokenizer ({error}); download it again") from None
    tokenizer.encode_special_tokens = True      # "<|im_end|>" in a text run is ten characters, not a control token

    size = picture.get("size") or {}
    if min_pixels is None:
        min_pixels = picture.get("min_pixels") or size.get("shortest_edge") or MIN_PIXELS
    if max_pixels is None:
        max_pixels = picture.get("max_pixels") or size.get("longest_edge") or MAX_PIXELS
    if not 0 < min_pixels <= max_pixels:
        raise ValueError(f"max_pixels {max_pixels} must be at least min_pixels, {min_pixels}, and that above 0")
    frame = (read("video_preprocessor_config.json") or {}).get("size") or {}
    return Processor(
        tokenizer, tokenizer.token_to_id("<|endoftext|>"), min_pixels, max_pixels,
        video_pixels=(frame["shortest_edge"], frame["longest_edge"]) if frame else None,
        patch_size=picture.get("patch_size", 14), temporal_patch_size=picture.get("temporal_patch_size", 2),
        merge_size=picture.get("merge_size", 2),
        image_mean=picture.get("image_mean", IMAGE_MEAN), image_std=picture.get("image_std", IMAGE_STD),
    )


# ---------------------------------------------------------------------------- opening pictures and frames

def local_path(source: object) -> Path:
    source = source.get("url") if isinstance(source, dict) else source      # {"image_url": {"url": path}}
    if not isinstance(source, str | Path):
        raise ValueError(f"a picture is a path or a PIL image, not {type(source).__name__}; {FORM}")
    if re.match(r"[a-z]+://|data:", str(source)):
        raise ValueError(f"{str(source)[:60]}: URLs are not fetched; download it first and give its path")
    path = Path(source)
    if not path.exists():
        raise OSError(f"{path}: no such file; check the path")
    return path


def read_frames(path: Path) -> Iterator[tuple[Image.Image, float]]:
    """Each frame of a picture file and the seconds it stands; one frame where nothing moves."""
    if path.is_dir():
        raise ValueError(f"{path}: a directory, not a picture; give one of its files")
    if path.suffix.lower() in (".mp4", ".mov", ".mkv", ".webm", ".avi"):
        raise ValueError(f"{path}: video files are not decoded; extract frames first: mkdir frames && "
                         f"ffmpeg -i {path} -vf fps=2 frames/%05d.png, and give the folder with fps 2")
    try:
        with Image.open(path) as file:
            for frame in ImageSequence.Iterator(file):
                frame.load()
                yield rgb(ImageOps.exif_transpose(frame)), frame.info.get("duration", 0) / 1000
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a picture that Pillow can read; convert it to PNG or JPEG") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}; make it smaller first") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: broken picture ({error}); get it again") from None


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
    return rgb(source) if isinstance(source, Image.Image) else next(read_frames(local_path(source)))[0]


def open_video(item: dict) -> tuple[list[Image.Image], float]:
    """The frames of a video item and the seconds from one to the next."""
    source, fps = item.get("video"), item.get("fps")
    if fps is not None and not fps > 0:
        raise ValueError(f"fps {fps}: must be above 0")
    if not isinstance(source, list):
        path = local_path(source)
        if not path.is_dir():
            return sample_frames(path, fps or VIDEO_FPS)
        # By the numbers in the names: frame9 comes before frame10.
        files = sorted((file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")),
                       key=lambda file: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", file.name)])
        if not files:
            raise ValueError(f"{path}: a folder without frames; put pictures into it, numbered in order")
        source = files
    if not source:
        raise ValueError("a video without frames; give a list of pictures")
    if fps is None:
        raise ValueError("frames need the rate at which they were taken: give fps")
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
    return [frames[i] for i in indices], duration / count
