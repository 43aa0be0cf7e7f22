"""Train the tiny checkpoint: this architecture with 2.9 million parameters, on pictures of coloured shapes.

    python tools/train_tiny.py                                      # from nothing to runs/tiny, or on from
    there python tools/train_tiny.py --evaluate tiny --seed 7 --scenes 500 --failures failures.png

The recipe. From random weights, with questions and answers alone, nothing is learned for thousands of steps:
the decoder has nothing to read in the picture, so the tower gets no useful gradient. What helps:

1. Say what to see. A linear layer on every merged vision token, dropped after training, names the thing that
covers
   its 28 x 28 pixels and how far away the sides of its box are. The tower learns this alone, in 600 steps.
2. Say where it is. Every rotary is relative, so absolute pixels have to be inferred, in the tower from the
   borders, in the decoder from the distance to <|vision_start|>. A second such layer, on the third of five
   decoder layers, asks every vision token for its box in absolute pixels, digit by digit. Answers then only
   copy.
3. Let the decoder tell columns apart. MRoPE's columns turn with the slowest channel pairs; with the published
   theta of 1e6 and eight columns they hardly turn at all. Here theta is 100, and mrope_section is [2, 5, 9].
4. Ask many questions of each picture. Its tokens are the cost. Questions are branches of one sequence: they
see the
   system turn and the picture, not each other, and start at the same position, so each is trained exactly as
   it will be asked. The branches are a mask, given to the model as its attention function.
5. One picture size per batch. The tower takes its pictures as the frames of one video: frames never meet.
6. Weights in bfloat16, as they will be used, and float32 masters for AdamW: also several times faster where
   the processor multiplies bfloat16 in hardware.

Positions, boxes and lists come late: lists and videos are mixed in from 55 % of the steps on.
"""

import io
import json
import math
import random
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from boxes import read_boxes

import processing
import vision
from generate import generate
from load_weights import load_config, load_generation_config, load_model
from model import Config, Qwen2_5_VL
from processing import IM_END, IM_START, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, Box, Processor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLORS = dict(
    red=(215, 40, 40), green=(40, 160, 60), blue=(45, 75, 215), yellow=(230, 205, 40), purple=(140, 55, 175),
    orange=(235, 125, 25), black=(25, 25, 25),
)
SHAPES = ("circle", "square", "triangle", "star")
SIDES = (112, 140, 168, 196, 224)       # pixels, of pictures
CELL = 28                               # pixels a side of a merge group


# ---------------------------------------------------------------------------- scenes

@dataclass
class Thing:
    color: str
    shape: str
    box: tuple[int, int, int, int]      # drawn extent, x2 and y2 exclusive

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


def shape_mask(shape: str, size: int, smooth: bool) -> Image.Image:
    """The shape in white on black, cropped to its extent."""
    scale = 4 if smooth else 1
    n = size * scale
    mask = Image.new("L", (n, n))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
    elif shape == "square":
        draw.rectangle((0, 0, n - 1, n - 1), fill=255)
    elif shape == "triangle":
        draw.polygon([(n / 2, 0), (n - 1, n - 1), (0, n - 1)], fill=255)
    else:
        points = [(n / 2 * (1 + r * math.sin(math.pi * k / 5)), n / 2 * (1 - r * math.cos(math.pi * k / 5)))
                  for k, r in enumerate([1, 0.4] * 5)]
        draw.polygon(points, fill=255)
    mask = mask.resize((size, size), Image.Resampling.BOX)
    return mask.crop(mask.getbbox())


def overlaps(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] + 2 and b[0] < a[2] + 2 and a[1] < b[3] + 2 and b[1] < a[3] + 2


class Scene:
    """A random picture and what is in it, from the top down."""

    def __init__(self, rng: random.Random, width: int, height: int, count: int | None = None):
        self.smooth = rng.random() < 0.5
        self.quality = rng.choice([None, rng.randint(75, 95)])
        self.background = tuple(rng.randint(225, 255) for _ in range(3))
        self.size = width, height
        self.things, self.masks, self.paints = [], [], []
        wanted = count or rng.randint(1, 4)
        for _ in range(200):
            if len(self.things) == wanted:
                break
            color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
            mask = shape_mask(shape, rng.randint(24, 64), self.smooth)
            x, y = rng.randint(0, width - mask.width), rng.randint(0, height - mask.height)
            box = (x, y, x + mask.width, y + mask.height)
            if any(overlaps(box, o.box) or abs(o.box[1] - y) < 4 for o in self.things):
                continue
            self.things.append(Thing(color, shape, box))
            self.masks.append(mask)
            self.paints.append(tuple(min(255, max(0, c + rng.randint(-20, 20))) for c in COLORS[color]))
        order = sorted(range(len(self.things)), key=lambda i: self.things[i].box[1])
        drawn = self.things, self.masks, self.paints
        self.things, self.masks, self.paints = ([row[i] for i in order] for row in drawn)

    def draw(self, offset: tuple[int, int] = (0, 0), moving: int = 0) -> Image.Image:
        """The picture, with one thing moved by an offset."""
        image = Image.new("RGB", self.size, self.background)
        for i, (thing, mask, paint) in enumerate(zip(self.things, self.masks, self.paints)):
            dx, dy = offset if i == moving else (0, 0)
            image.paste(paint, (thing.box[0] + dx, thing.box[1] + dy), mask)
        if self.quality:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=self.quality)
            image = Image.open(file).convert("RGB")
        return image

    def cells(self, side: int) -> Tensor:
        """Which thing covers most of each cell of side x side pixels: (rows, columns) int64, 0 for none."""
        width, height = self.size
        cover = np.zeros((len(self.things) + 1, height, width), np.float32)
        cover[0] = 0.1 * 255
        for i, (thing, mask) in enumerate(zip(self.things, self.masks), 1):
            x1, y1, x2, y2 = thing.box
            cover[i, y1:y2, x1:x2] = np.asarray(mask)
        cover = cover.reshape(-1, height // side, side, width // side, side).sum((2, 4))
        return torch.from_numpy(cover.argmax(0))


# ---------------------------------------------------------------------------- questions

def boxes_answer(things: list[Thing]) -> str:
    rows = [f'{{"bbox_2d": [{", ".join(map(str, t.box))}], "label": "{t.name}"}}' for t in things]
    return f"```json\n[{', '.join(rows)}]\n```"


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """All that can be asked of a scene, shuffled: (kind, question, answer)."""
    things = scene.things
    names = Counter(thing.name for thing in things)
    described = ", ".join(f"a{'n' if t.color == 'orange' else ''} {t.name}" for t in things) + "."
    asked = [("describe", "Describe the image.", described),
             ("count", "How many objects are there?", str(len(things))),
             ("every", "Locate every object.", boxes_answer(things))]
    for shape in SHAPES:
        same = [thing for thing in things if thing.shape == shape]
        asked.append(("count", f"How many {shape}s are there?", str(len(same))))
        asked.append(("every", f"Locate every {shape}.", boxes_answer(same)))
        if len(same) == 1:
            asked.append(("color", f"What color is the {shape}?", same[0].color))
    asked += [("locate", f"Locate the {t.name}.", boxes_answer([t])) for t in things if names[t.name] == 1]
    rng.shuffle(asked)
    return asked


DIRECTIONS = dict(left=(-1, 0), right=(1, 0), up=(0, -1), down=(0, 1))


def moving_scene(
    rng: random.Random, width: int, height: int, frames: int
) -> tuple[Scene, tuple[str, str, str], list[Image.Image]]:
    """A scene in which one thing, alone of its shape, moves straight on; the question about it; the frames.
    """
    while True:
        scene = Scene(rng, width, height, rng.randint(1, 2))
        moving = rng.randrange(len(scene.things))
        thing = scene.things[moving]
        way, (dx, dy) = rng.choice(list(DIRECTIONS.items()))
        step = rng.randint(4, 12)
        far = step * (frames - 1)
        x1, y1, x2, y2 = thing.box
        path = (min(x1, x1 + dx * far), min(y1, y1 + dy * far),
                max(x2, x2 + dx * far), max(y2, y2 + dy * far))
        others = [other for other in scene.things if other is not thing]
        if (path[0] < 0 or path[1] < 0 or path[2] > width or path[3] > height
                or any(other.shape == thing.shape or overlaps(path, other.box) for other in others)):
            continue
        pictures = [scene.draw((dx * step * i, dy * step * i), moving) for i in range(frames)]
        return scene, ("video", f"Which way does the {thing.shape} move?", way), pictures


# ---------------------------------------------------------------------------- the empty checkpoint

SPECIAL = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
           "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
           "<|image_pad|> <|video_pad|>").split()
NOT_SPECIAL = ("<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
               "<|repo_name|> <|file_sep|>").split()
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE over everything that is ever said here, with Qwen's pattern and added tokens."""
    rng = random.Random(0)
    corpus = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 50
    for shape in SHAPES:
        corpus += [f"Which way does the {shape} move?", "left right up down", "Which image has more objects?",
                   "the first the second neither", "Read the number."] * 10
    for _ in range(400):
        for _, question, answer in questions(Scene(rng, 224, 224), rng):
            corpus += [question, answer]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=2000, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in NOT_SPECIAL])
    return tokenizer


def make_checkpoint(path: Path) -> None:
    """Every file of a checkpoint but the weights."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(path / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL + NOT_SPECIAL}
    config = dict(
        architectures=["Qwen2_5_VLForConditionalGeneration"], attention_dropout=0.0,
        bos_token_id=ids["<|endoftext|>"], eos_token_id=ids[IM_END],
        vision_start_token_id=ids[VISION_START], vision_end_token_id=ids[VISION_END],
        vision_token_id=ids["<|vision_pad|>"], image_token_id=ids[IMAGE_PAD], video_token_id=ids[VIDEO_PAD],
        hidden_act="silu", hidden_size=192, initializer_range=0.02, intermediate_size=384,
        max_position_embeddings=32768, max_window_layers=5, model_type="qwen2_5_vl", num_attention_heads=6,
        num_hidden_layers=5, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=100.0, sliding_window=32768,
        tie_word_embeddings=True, torch_dtype="bfloat16", use_cache=True, use_sliding_window=False,
        vision_config=dict(
            depth=4, hidden_act="silu", hidden_size=128, intermediate_size=288, num_heads=4, in_chans=3,
            out_hidden_size=192, patch_size=14, spatial_merge_size=2, spatial_patch_size=14, window_size=112,
            fullatt_block_indexes=[1, 3], tokens_per_second=2, temporal_patch_size=2),
        rope_scaling=dict(type="mrope", mrope_section=[2, 5, 9]),
        vocab_size=math.ceil(tokenizer.get_vocab_size() / 64) * 64,
    )
    pixels = dict(
        min_pixels=112 * 112, max_pixels=224 * 224, patch_size=14, temporal_patch_size=2, merge_size=2,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
        image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor")
    frames = {key: value for key, value in pixels.items() if not key.endswith("_pixels")} | dict(
        size=dict(shortest_edge=112 * 112, longest_edge=224 * 224),
        video_processor_type="Qwen2VLVideoProcessor")
    generation = dict(bos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"], do_sample=False,
                      eos_token_id=[ids[IM_END], ids["<|endoftext|>"]], repetition_penalty=1.0)
    added = {str(n): dict(content=token, lstrip=False, normalized=False, rstrip=False, single_word=False,
                          special=token in SPECIAL) for token, n in ids.items()}
    tokens = dict(
        add_prefix_space=False, added_tokens_decoder=added, additional_special_tokens=SPECIAL[1:],
        bos_token=None, chat_template=TEMPLATE, clean_up_tokenization_spaces=False, eos_token=IM_END,
        errors="replace", model_max_length=32768, pad_token="<|endoftext|>", split_special_tokens=False,
        tokenizer_class="Qwen2Tokenizer", unk_token=None)
    files = dict(config=config, preprocessor_config=pixels, video_preprocessor_config=frames,
                 generation_config=generation, tokenizer_config=tokens)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------------------- batches

LATE = 0.55                                                     # of the steps; then come lists and videos
PER_PICTURE = dict(describe=1, locate=2, count=2, color=1)      # questions, and one "every" for some
VIDEOS, LISTS = 0.3, 0.4                                        # shares of batches and of pictures


class Batches(torch.utils.data.Dataset):
    """Batch number i, always the same for a seed: pictures of one size, several questions on each."""

    def __init__(self, processor: Processor, seed: int, size: int, steps: int):
        self.processor, self.seed, self.size, self.steps = processor, seed, size, steps
        self.ids = lambda text: processor.tokenizer.encode(text, add_special_tokens=False).ids
        self.control = processor.tokenizer.token_to_id

    def __len__(self) -> int:
        return self.steps

    def stem(self, placeholder: str, count: int) -> list[int]:
        """What comes before the question."""
        return [self.control(IM_START), *self.ids("system\nYou are a helpful assistant."),
                self.control(IM_END), *self.ids("\n"), self.control(IM_START), *self.ids("user\n"),
                self.control(VISION_START), *[self.control(placeholder)] * count, self.control(VISION_END)]

    def branch(self, question: str, answer: str) -> tuple[list[int], int]:
        """Question and answer, and where the answer begins."""
        asked = [*self.ids(question), self.control(IM_END), *self.ids("\n"), self.control(IM_START),
                 *self.ids("assistant\n")]
        return [*asked, *self.ids(answer), self.control(IM_END)], len(asked)

    def ask(self, rng: random.Random, late: bool, frames: int, width: int, height: int) -> tuple:
        """A scene, its frames, and what is asked of it."""
        if frames > 1:
            scene, asked, pictures = moving_scene(rng, width, height, frames)
            return scene, pictures, [asked]
        scene = Scene(rng, width, height)
        pictures = [scene.draw()]
        left, chosen = Counter(PER_PICTURE | dict(every=int(late and rng.random() < LISTS))), []
        for kind, question, answer in questions(scene, rng):
            if left[kind] > 0:
                left[kind] -= 1
                chosen.append((kind, question, answer))
        return scene, pictures, chosen

    def __getitem__(self, step: int) -> dict:
        rng = random.Random(f"{self.seed} {step}")
        width, height, late = rng.choice(SIDES), rng.choice(SIDES), step >= LATE * self.steps
        frames = rng.randint(4, 8) if late and rng.random() < VIDEOS else 1
        scenes, pictures, asked = zip(*(self.ask(rng, late, frames, width, height) for _ in range(self.size)))
        pixels, grids = zip(*(self.processor.patches(frames, 1, 10**9) for frames in pictures))
        merged = math.prod(grids[0]) // self.processor.merge_size**2
        stem = self.stem(VIDEO_PAD if frames > 1 else IMAGE_PAD, merged)
        branches = [[(kind, *self.branch(*words)) for kind, *words in row] for row in asked]

        T = len(stem) + max(sum(len(ids) for _, ids, _ in row) for row in branches)
        input_ids = torch.zeros(self.size, T, dtype=torch.int64)
        branch = torch.full((self.size, T), -1)                         # 0 is the stem, -1 a pad
        offset, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
        answers = []                                                    # (kind, row, start, stop) in labels
        for b, row in enumerate(branches):
            input_ids[b, :len(stem)], branch[b, :len(stem)] = torch.tensor(stem), 0
            at = len(stem)
            for k, (kind, ids, begin) in enumerate(row, 1):
                stop = at + len(ids)
                input_ids[b, at:stop], branch[b, at:stop] = torch.tensor(ids), k
                offset[b, at:stop] = torch.arange(len(ids))             # positions after the stem
                labels[b, at + begin - 1:stop - 1] = input_ids[b, at + begin:stop]
                answers.append((kind, b, at + begin - 1, stop - 1))
                at = stop
        seen = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])
        cells = None if frames > 1 else torch.stack([cell_targets(scene) for scene in scenes])
        return dict(
            step=step, input_ids=input_ids, stem=len(stem), offset=offset,
            visible=seen & torch.ones(T, T).tril().bool(), labels=labels, answers=answers,
            pixels=torch.from_numpy(np.concatenate(pixels)), grid=grids[0], cells=cells)


def cell_targets(scene: Scene) -> Tensor:
    """Of the thing that covers most of each cell: shape, color (0 for none), x1, y1, x2, y2. (cells, 6)"""
    rows = [[0] * 6]
    rows += [[SHAPES.index(t.shape) + 1, list(COLORS).index(t.color) + 1, *t.box] for t in scene.things]
    return torch.tensor(rows)[scene.cells(CELL).flatten()]


# ---------------------------------------------------------------------------- training

class TreeAttention:
    """sdpa, with the branches of a batch in the place of the causal mask."""
    mask: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: vision.Mask) -> Tensor:
        return vision.sdpa(q, k, v, self.mask if mask is vision.CAUSAL else mask)


class Hints(nn.Module):
    """The auxiliary layers: what covers each cell of the picture, and where its box is."""
    KIND, BOX, DIGITS = 5 + 8, 4, 4 * 3 * 10        # logits of shape and color, sides of a box, their digits

    def __init__(self, width: int):
        super().__init__()
        self.near = nn.Linear(width, self.KIND + self.BOX)
        self.far = nn.Linear(width, self.KIND + self.BOX + self.DIGITS)

    def kind_loss(self, x: Tensor, cells: Tensor) -> Tensor:
        shape, color = x[..., :5].flatten(0, 1), x[..., 5:13].flatten(0, 1)
        return (F.cross_entropy(shape, cells[..., 0].flatten())
                + F.cross_entropy(color, cells[..., 1].flatten()))

    def near_loss(self, merged: Tensor, cells: Tensor, rows: int, columns: int) -> Tensor:
        """From the tower's tokens (B, cells, C); boxes relative to the middle of the cell."""
        x, thing = self.near(merged).float(), cells[..., 0] > 0
        middle = torch.cartesian_prod(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5).flip(1)
        box = cells[..., 2:] / CELL - middle.repeat(1, 2)
        return self.kind_loss(x, cells) + 2 * F.l1_loss(x[..., 13:17][thing], box[thing])

    def far_loss(self, hidden: Tensor, cells: Tensor) -> Tensor:
        """From the decoder's (B, cells, C); boxes from the corner of the picture, and their decimal digits.
        """
        x, thing = self.far(hidden).float(), cells[..., 0] > 0
        box = cells[..., 2:]
        digits = torch.stack((box // 100, box // 10 % 10, box % 10), dim=-1)[thing]
        return (self.kind_loss(x, cells) + 2 * F.l1_loss(x[..., 13:17][thing], box[thing] / CELL)
                + F.cross_entropy(x[thing][:, 17:].reshape(-1, 10), digits.flatten()))


class Trainer:
    """The model, its hints and their optimizer; `step` is what happens to a batch."""

    def __init__(self, config: Config, seed: int, rate: float, hint_layer: int = 2):
        torch.manual_seed(seed)
        self.attend, self.rate = TreeAttention(), rate
        self.model, self.hints = Qwen2_5_VL(config, self.attend), Hints(config.hidden_size)
        nn.init.normal_(self.model.model.embed_tokens.weight, std=0.05)
        self.parameters = [*self.model.parameters(), *self.hints.parameters()]
        self.masters = [p.detach().clone() for p in self.parameters]
        self.model.bfloat16()
        self.hints.bfloat16()
        self.optimizer = torch.optim.AdamW(
            [dict(params=[m for m in self.masters if m.ndim > 1], weight_decay=0.02),
             dict(params=[m for m in self.masters if m.ndim == 1], weight_decay=0.0)], betas=(0.9, 0.98))
        self.caught = {}
        self.model.visual.register_forward_hook(lambda *args: self.caught.update(merged=args[-1]))
        hinted = self.model.model.layers[hint_layer]
        hinted.register_forward_hook(lambda *args: self.caught.update(hidden=args[-1]))

    def state(self, step: int) -> dict:
        return dict(step=step, masters=self.masters, optimizer=self.optimizer.state_dict())

    def restore(self, state: dict) -> int:
        for master, saved in zip(self.masters, state["masters"]):
            master.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.publish()
        return state["step"]

    @torch.no_grad()
    def publish(self) -> None:
        for p, master in zip(self.parameters, self.masters):
            p.copy_(master)

    def forward(self, batch: dict) -> Tensor:
        """Logits of a batch of trees."""
        (t, h, w), stem, video = batch["grid"], batch["stem"], batch["cells"] is None
        grid, packed = torch.tensor([[t, h, w]]), torch.tensor([[t * len(batch["input_ids"]), h, w]])
        media = dict(video_grid_thw=grid, second_per_grid_ts=[1.0]) if video else dict(image_grid_thw=grid)
        before, after = self.model.positions(batch["input_ids"][:1, :stem], **media)
        positions = (after + batch["offset"]).repeat(3, 1, 1)
        positions[:, :, :stem] = before
        names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
        x = self.model.embed(batch["input_ids"], **dict(zip(names, (batch["pixels"], packed))))
        lowest = torch.finfo(x.dtype).min
        unseen = ~batch["visible"][:, None]
        self.attend.mask = torch.zeros(unseen.shape, dtype=x.dtype).masked_fill(unseen, lowest)
        return self.model.decode(x, positions).float()

    def losses(self, batch: dict, tower_only: bool) -> tuple[dict[str, Tensor], dict[str, list[bool]]]:
        """Losses by name, and for every kind of question which answers are right to the last token."""
        (t, h, w), B, losses, right = batch["grid"], len(batch["input_ids"]), {}, {}
        if tower_only:
            self.model.visual(batch["pixels"], torch.tensor([[t * B, h, w]]))
        else:
            logits, labels = self.forward(batch), batch["labels"]
            total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            losses["answer"] = total / len(batch["answers"])
            good = logits.argmax(dim=-1) == labels
            for kind, b, start, stop in batch["answers"]:
                right.setdefault(kind, []).append(good[b, start:stop].all().item())
        if batch["cells"] is not None:
            merged = self.caught["merged"].unflatten(0, (B, -1))
            losses["near"] = self.hints.near_loss(merged, batch["cells"], h * 14 // CELL, w * 14 // CELL)
            if not tower_only:
                vision_tokens = batch["input_ids"] == self.model.config.image_token_id
                hidden = self.caught["hidden"][vision_tokens].unflatten(0, (B, -1))
                losses["far"] = self.hints.far_loss(hidden, batch["cells"])
        return losses, right

    def step(
        self, batch: dict, tower_only: bool, progress: float
    ) -> tuple[dict[str, float], dict[str, list[bool]]]:
        """One update at a share `progress` of all steps: linear warm-up over 200 steps, then a cosine to
        zero.
        """
        losses, right = self.losses(batch, tower_only)
        for p in self.parameters:
            p.grad = None
        sum(losses.values()).backward()
        for p, master in zip(self.parameters, self.masters):
            master.grad = None if p.grad is None else p.grad.float()
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        rate = self.rate * min(1, (batch["step"] + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.publish()
        return {name: loss.item() for name, loss in losses.items()}, right


def train(work: Path, seed: int, steps: int, tower_steps: int, size: int, rate: float) -> None:
    make_checkpoint(work)
    processor, trainer = processing.load_processor(work), Trainer(load_config(work), seed, rate)
    saved, log, start = work / "state.pt", work / "log.jsonl", 0
    if saved.exists():
        start = trainer.restore(torch.load(saved, weights_only=True))
        print(f"on from step {start}", file=sys.stderr)
    batches = torch.utils.data.Subset(Batches(processor, seed, size, steps), range(start, steps))
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4)
    clock, losses, right = time.time(), {}, {}
    for batch in loader:
        step = batch["step"] + 1
        update = trainer.step(batch, step <= tower_steps, batch["step"] / steps)
        for collected, new in zip((losses, right), update):
            for name, value in new.items():
                collected.setdefault(name, []).extend(value if isinstance(value, list) else [value])
        if step % 50 == 0 or step == steps:
            row = dict(step=step, seconds=(time.time() - clock) / 50)
            row |= {name: sum(values) / len(values) for name, values in (losses | right).items()}
            shown = "  ".join(f"{k} {v:.3f}" for k, v in row.items() if k != "step")
            print(f"{step}/{steps}  {shown}", flush=True)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            clock, losses, right = time.time(), {}, {}
        if step % 200 == 0 or step == steps:
            torch.save(trainer.state(step), saved)
            weights = {name: p.contiguous() for name, p in trainer.model.state_dict().items()}
            save_file(weights, work / "model.safetensors", metadata={"format": "pt"})
            draw_curve(log, work / "loss.png")


def draw_curve(log: Path, path: Path) -> None:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    kinds = ("describe", "count", "color", "locate", "every", "video")
    for axis, names, title in ((axes[0], ("near", "far", "answer"), "loss"),
                               (axes[1], kinds, "right answers")):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points), label=name)
        axis.set(xlabel="step", title=title)
        axis.legend()
    axes[0].set_yscale("log")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


# ---------------------------------------------------------------------------- evaluation

@dataclass
class Answer:
    kind: str
    question: str
    expected: str
    got: str
    picture: Image.Image


def iou(a: Box, b: Box) -> float:
    inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = lambda box: max(0, box[2] - box[0]) * max(0, box[3] - box[1])
    return inner / max(1, area(a) + area(b) - inner)


def f1(answers: list[Answer]) -> float:
    """Of boxes with the right label and an IoU above 0.5, each found once."""
    hits = total = 0
    for answer in answers:
        expected, got = read_boxes(answer.expected), read_boxes(answer.got)
        total += len(expected) + len(got)
        for box, label in got:
            match = next((e for e in expected if e[1] == label and iou(e[0], box) > 0.5), None)
            if match:
                expected.remove(match)
                hits += 1
    return 2 * hits / max(1, total)


def good(answer: Answer) -> bool:
    """Whether an answer counts as right: boxes by their overlap, the rest to the letter."""
    if answer.kind == "locate":
        expected, got = read_boxes(answer.expected), read_boxes(answer.got)
        return len(got) == 1 and got[0][1] == expected[0][1] and iou(got[0][0], expected[0][0]) > 0.5
    return answer.expected == answer.got or answer.kind == "every" and f1([answer]) == 1


def answers(model: Qwen2_5_VL, path: Path, seed: int, scenes: int) -> Iterator[Answer]:
    """One question of every kind about each of a number of scenes, asked as a user would."""
    processor, settings = processing.load_processor(path), load_generation_config(path)
    for n in range(scenes):
        rng = random.Random(f"evaluation {seed} {n}")
        width, height = rng.choice(SIDES), rng.choice(SIDES)
        scene = Scene(rng, width, height)
        picture = scene.draw()
        asked = {kind: ([{"type": "image", "image": picture}], question, answer)
                 for kind, question, answer in questions(scene, rng)}
        _, (kind, question, answer), frames = moving_scene(rng, width, height, rng.randint(4, 8))
        asked[kind] = ([{"type": "video", "video": frames, "fps": 2}], question, answer)
        rows = [[{"role": "user", "content": [*media, {"type": "text", "text": question}]}]
                for media, question, _ in asked.values()]
        ids = torch.stack(list(generate(model, processor(rows), **settings)), dim=1)
        for row, (kind, (_, question, answer)) in zip(ids, asked.items()):
            shown = frames[-1] if kind == "video" else picture
            yield Answer(kind, question, answer, processor.decode(row), shown)


AIMS = dict(describe=0.95, locate=0.95, count=0.97, color=0.98, every=0.90, video=0.95)


def table(collected: list[Answer]) -> str:
    """The rows that the README shows."""
    rows = ["| question | measure | reached | aim |", "|---|---|---|---|"]
    for kind, aim in AIMS.items():
        some = [answer for answer in collected if answer.kind == kind]
        share = sum(map(good, some)) / len(some)
        if kind == "locate":
            overlaps = [max([iou(read_boxes(a.expected)[0][0], box) for box, _ in read_boxes(a.got)],
                            default=0) for a in some]
            rows.append(f"| Locate the red circle. | mean IoU | {sum(overlaps) / len(overlaps):.2f} | 0.80 |")
        question, measure, value = {
            "describe": ("Describe the image.", "exact", share), "locate": ("", "IoU above 0.5", share),
            "count": ("How many circles are there?", "exact", share),
            "color": ("What color is the circle?", "exact", share),
            "every": ("Locate every object.", "F1 at IoU 0.5", f1(some)),
            "video": ("Which way does the circle move?", "exact", share)}[kind]
        rows.append(f"| {question} | {measure} | {100 * value:.1f} % | {100 * aim:.0f} % |")
    return "\n".join(rows)


def draw_failures(collected: list[Answer], path: Path, seed: int) -> None:
    """16 random answers that are wrong, as a contact sheet."""
    wrong = [answer for answer in collected if not good(answer)]
    figure, axes = plt.subplots(4, 4, figsize=(14, 15))
    for axis, answer in zip(axes.flat, random.Random(seed).sample(wrong, min(16, len(wrong)))):
        axis.imshow(answer.picture)
        for text, color in ((answer.expected, "black"), (answer.got, "red")):
            for (x1, y1, x2, y2), _ in read_boxes(text):
                axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color))
        short = lambda text: "; ".join(f"{label} {box}" for box, label in read_boxes(text)) or text
        title = f"{answer.question}\n{short(answer.expected)}\n{short(answer.got)}"
        axis.set_title(title, fontsize=7, wrap=True)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/tiny"),
        help="where the checkpoint grows; an interrupted run goes on")
    add("--seed", type=int, default=1)
    add("--steps", type=int, default=4200)
    add("--tower-steps", type=int, default=600, help="first steps, of the vision tower alone")
    add("--batch", type=int, default=32, help="pictures")
    add("--lr", type=float, default=1.2e-3)
    add("--evaluate", type=Path, metavar="DIR",
        help="instead of training print how well a checkpoint answers")
    add("--scenes", type=int, default=500, help="for --evaluate")
    add("--failures", type=Path, metavar="PNG", help="for --evaluate: draw wrong answers")
    args = parser.parse_args()
    if not args.evaluate:
        return train(args.work, args.seed, args.steps, args.tower_steps, args.batch, args.lr)
    collected = []
    for answer in answers(load_model(args.evaluate), args.evaluate, args.seed, args.scenes):
        collected.append(answer)
        print(f"\r{len(collected)} answers", end="", file=sys.stderr)
    print(f"\n{table(collected)}")
    if args.failures:
        draw_failures(collected, args.failures, args.seed)


if __name__ == "__main__":
    main()
