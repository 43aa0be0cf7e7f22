"""Train the tiny checkpoint."""

import argparse
import io
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vision
from load_weights import load_config
from model import Qwen2_5_VL
from processing import (
    IM_END,
    IM_START,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Processor,
    load_processor,
)

COLORS = dict(
    red=(215, 40, 40), green=(40, 160, 60), blue=(45, 75, 215), yellow=(230, 205, 40), purple=(140, 55, 175),
    orange=(235, 125, 25), black=(25, 25, 25),
)
SHAPES = ("circle", "square", "triangle", "star")
SIDES = (112, 140, 168, 196, 224)


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
        self.things, self.masks, self.paints = ([a[i] for i in order] for a in (self.things, self.masks, self.paints))

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

def fenced(things: list[Thing]) -> str:
    rows = [f'{{"bbox_2d": [{", ".join(map(str, t.box))}], "label": "{t.name}"}}' for t in things]
    return f"```json\n[{', '.join(rows)}]\n```"


def describe(things: list[Thing]) -> str:
    return ", ".join(f"a{'n' if t.color == 'orange' else ''} {t.name}" for t in things) + "."


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """Everything that can be asked of a scene, in random order within a kind: (kind, question, answer)."""
    things = scene.things
    names, shapes = [t.name for t in things], [t.shape for t in things]
    asked = [("describe", "Describe the image.", describe(things)),
             ("count", "How many objects are there?", str(len(things))),
             ("every", "Locate every object.", fenced(things))]
    for shape in SHAPES:
        same = [t for t in things if t.shape == shape]
        asked.append(("count", f"How many {shape}s are there?", str(len(same))))
        asked.append(("every", f"Locate every {shape}.", fenced(same)))
        if len(same) == 1:
            asked.append(("color", f"What color is the {shape}?", same[0].color))
    asked += [("locate", f"Locate the {t.name}.", fenced([t])) for t in things if names.count(t.name) == 1]
    rng.shuffle(asked)
    return asked


PER_PICTURE = dict(describe=1, locate=2, count=2, color=1)      # and one "every" for some
DIRECTIONS = dict(left=(-1, 0), right=(1, 0), up=(0, -1), down=(0, 1))


# ---------------------------------------------------------------------------- the empty checkpoint

SPECIAL = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
           "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>").split()
PLAIN = ("<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> "
         "<|file_sep|>").split()
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
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
        vocab_size=2000, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    return tokenizer


def make_checkpoint(path: Path) -> None:
    """Every file of a checkpoint but the weights."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(path / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL + PLAIN}
    config = dict(
        architectures=["Qwen2_5_VLForConditionalGeneration"], attention_dropout=0.0, bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids[IM_END], vision_start_token_id=ids[VISION_START], vision_end_token_id=ids[VISION_END],
        vision_token_id=ids["<|vision_pad|>"], image_token_id=ids[IMAGE_PAD], video_token_id=ids[VIDEO_PAD],
        hidden_act="silu", hidden_size=192, initializer_range=0.02, intermediate_size=384,
        max_position_embeddings=32768, max_window_layers=5, model_type="qwen2_5_vl", num_attention_heads=6,
        num_hidden_layers=5, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=100.0, sliding_window=32768,
        tie_word_embeddings=True, torch_dtype="bfloat16", use_cache=True, use_sliding_window=False,
        vision_config=dict(
            depth=4, hidden_act="silu", hidden_size=128, intermediate_size=288, num_heads=4, in_chans=3,
            out_hidden_size=192, patch_size=14, spatial_merge_size=2, spatial_patch_size=14, window_size=112,
            fullatt_block_indexes=[1, 3], tokens_per_second=2, temporal_patch_size=2),
        rope_scaling=dict(type="mrope", mrope_section=[2, 5, 9]), vocab_size=math.ceil(tokenizer.get_vocab_size() / 64) * 64,
    )
    pixels = dict(
        min_pixels=112 * 112, max_pixels=224 * 224, patch_size=14, temporal_patch_size=2, merge_size=2,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
        image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor")
    frames = {key: value for key, value in pixels.items() if not key.endswith("_pixels")} | dict(
        size=dict(shortest_edge=112 * 112, longest_edge=224 * 224), video_processor_type="Qwen2VLVideoProcessor")
    generation = dict(bos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"], do_sample=False,
                      eos_token_id=[ids[IM_END], ids["<|endoftext|>"]], repetition_penalty=1.0)
    added = {str(ids[token]): dict(content=token, lstrip=False, normalized=False, rstrip=False, single_word=False,
                                   special=token in SPECIAL) for token in SPECIAL + PLAIN}
    tokens = dict(
        add_prefix_space=False, added_tokens_decoder=added, additional_special_tokens=SPECIAL[1:], bos_token=None,
        chat_template=TEMPLATE, clean_up_tokenization_spaces=False, eos_token=IM_END, errors="replace",
        model_max_length=32768, pad_token="<|endoftext|>", split_special_tokens=False,
        tokenizer_class="Qwen2Tokenizer", unk_token=None)
    for name, content in (("config", config), ("preprocessor_config", pixels), ("video_preprocessor_config", frames),
                          ("generation_config", generation), ("tokenizer_config", tokens)):
        (path / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------------------- batches

class Batches(torch.utils.data.Dataset):
    """Batch number i, always the same for a seed: pictures of one size, each with several questions in one sequence.

    The sequence is a tree: a stem (system turn and picture) and a branch per question. Branches don't see each other
    and start at the same position, so that each is exactly the conversation in which only it is asked.
    """

    def __init__(self, processor: Processor, seed: int, size: int, steps: int, videos: float = 0.0, every: float = 0.3):
        self.processor, self.seed, self.size, self.steps = processor, seed, size, steps
        self.videos, self.every = videos, every
        self.ids = lambda text: processor.tokenizer.encode(text, add_special_tokens=False).ids
        self.control = processor.tokenizer.token_to_id

    def __len__(self) -> int:
        return self.steps

    def branch(self, question: str, answer: str) -> tuple[list[int], int]:
        asked = self.ids(question) + [self.control(IM_END), *self.ids("\n"), self.control(IM_START)]
        asked += self.ids("assistant\n")
        return asked + self.ids(answer) + [self.control(IM_END)], len(asked)

    def __getitem__(self, step: int) -> dict:
        rng = random.Random(f"{self.seed} {step}")
        width, height = rng.choice(SIDES), rng.choice(SIDES)
        late = step >= 0.55 * self.steps
        video = late and rng.random() < self.videos
        frames = rng.randint(4, 8) if video else 1
        scenes, asked, pixels = [], [], []
        for _ in range(self.size):
            if video:
                scene, qa, pictures = moving_scene(rng, width, height, frames)
                branches = [self.branch(*qa)]
                kinds = ["video"]
            else:
                scene = Scene(rng, width, height)
                pictures = [scene.draw()]
                left = PER_PICTURE | dict(every=late and rng.random() < self.every)
                branches, kinds = [], []
                for kind, question, answer in questions(scene, rng):
                    if left[kind]:
                        left[kind] -= 1
                        branches.append(self.branch(question, answer))
                        kinds.append(kind)
            patches, grid, _ = (*self.processor.patches(pictures, 1, 10**9), 0)
            pixels.append(patches)
            scenes.append(scene)
            asked.append(list(zip(kinds, branches)))
        token = self.control(VIDEO_PAD if video else IMAGE_PAD)
        stem = [self.control(IM_START), *self.ids("system\nYou are a helpful assistant."), self.control(IM_END),
                *self.ids("\n"), self.control(IM_START), *self.ids("user\n"), self.control(VISION_START),
                *[token] * (math.prod(grid) // self.processor.merge_size**2), self.control(VISION_END)]
        T = len(stem) + max(sum(len(ids) for _, (ids, _) in row) for row in asked)
        input_ids = torch.full((self.size, T), self.processor.tokenizer.token_to_id("<|endoftext|>"))
        segment = torch.full((self.size, T), -1)
        offset = torch.zeros(self.size, T, dtype=torch.int64)       # position after the stem
        labels = torch.full((self.size, T), -100)
        spans = []                                                   # (kind, row, start, stop) of answers
        for b, row in enumerate(asked):
            input_ids[b, :len(stem)], segment[b, :len(stem)] = torch.tensor(stem), 0
            at = len(stem)
            for k, (kind, (ids, question)) in enumerate(row, 1):
                stop = at + len(ids)
                input_ids[b, at:stop], segment[b, at:stop] = torch.tensor(ids), k
                offset[b, at:stop] = torch.arange(len(ids))
                labels[b, at + question - 1:stop - 1] = input_ids[b, at + question:stop]
                spans.append((kind, b, at + question - 1, stop - 1))
                at = stop
        visible = torch.ones(T, T).tril().bool() & ((segment[:, None] == 0) | (segment[:, None] == segment[:, :, None]))
        side = self.processor.patch_size * self.processor.merge_size
        cells = torch.stack([scene.cells(side) for scene in scenes])
        targets = torch.zeros(self.size, 5, 6, dtype=torch.int64)    # thing 0 is none: shape, color, x1, y1, x2, y2
        for b, scene in enumerate(scenes):
            for i, thing in enumerate(scene.things, 1):
                targets[b, i] = torch.tensor([SHAPES.index(thing.shape) + 1, list(COLORS).index(thing.color) + 1,
                                              *thing.box])
        cells = targets[torch.arange(self.size)[:, None], cells.flatten(1)]      # (B, cells, 6)
        return dict(
            video=video, input_ids=input_ids, stem=len(stem), offset=offset, visible=visible, labels=labels, spans=spans,
            pixels=torch.from_numpy(np.concatenate(pixels)), grid=grid, cells=cells, step=step,
        )


def moving_scene(rng: random.Random, width: int, height: int, frames: int) -> tuple:
    """A scene of which one thing, alone of its shape, moves straight on; the question and answer; the frames."""
    while True:
        scene = Scene(rng, width, height, rng.randint(1, 2))
        moving = rng.randrange(len(scene.things))
        thing = scene.things[moving]
        way, (dx, dy) = rng.choice(list(DIRECTIONS.items()))
        step = rng.randint(4, 12)
        room = {"left": thing.box[0], "right": width - thing.box[2], "up": thing.box[1], "down": height - thing.box[3]}
        if room[way] < step * (frames - 1) or [t.shape for t in scene.things].count(thing.shape) > 1:
            continue
        x1, y1, x2, y2 = thing.box
        far = step * (frames - 1)
        path = (min(x1, x1 + dx * far), min(y1, y1 + dy * far), max(x2, x2 + dx * far), max(y2, y2 + dy * far))
        if any(overlaps(path, other.box) for other in scene.things if other is not thing):
            continue
        pictures = [scene.draw((dx * step * i, dy * step * i), moving) for i in range(frames)]
        return scene, (f"Which way does the {thing.shape} move?", way), pictures


# ---------------------------------------------------------------------------- training

class TreeAttention:
    """sdpa, with the branches of the batch in place of the causal mask."""
    mask: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: vision.Mask) -> Tensor:
        return vision.sdpa(q, k, v, self.mask if mask is vision.CAUSAL else mask)


class Hints(nn.Module):
    """Auxiliary heads, dropped after training: what covers each cell of 28 pixels, and where its box lies."""

    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.merged = nn.Linear(C, 5 + 8 + 4)              # shape, color, box relative to the cell
        self.decoder = nn.Linear(C, 5 + 8 + 4 + 4 * 30)    # the same, box absolute, and its digits

    def forward(self, x: Tensor, cells: Tensor, grid, absolute: bool) -> Tensor:
        """x: (B, cells, C); cells: (B, cells, 6)."""
        x = (self.decoder if absolute else self.merged)(x).float()
        thing = cells[..., 0] > 0
        loss = F.cross_entropy(x[..., :5].flatten(0, 1), cells[..., 0].flatten())
        loss = loss + F.cross_entropy(x[..., 5:13].flatten(0, 1), cells[..., 1].flatten())
        box = cells[..., 2:].float() / 28
        if absolute:
            digits = torch.stack((cells[..., 2:] // 100, cells[..., 2:] // 10 % 10, cells[..., 2:] % 10), -1)[thing]
            loss = loss + F.cross_entropy(x[thing][:, 17:].reshape(-1, 10), digits.flatten())
        else:
            h, w = grid[1] // 2, grid[2] // 2
            centers = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).flatten(0, 1) + 0.5
            box = box - centers.flip(-1).repeat(1, 2)
        return loss + 2 * F.l1_loss(x[..., 13:17][thing], box[thing])


def train(args) -> None:
    work = args.work
    make_checkpoint(work)
    processor, config = load_processor(work), load_config(work)
    torch.manual_seed(args.seed)
    attend = TreeAttention()
    model, hints = Qwen2_5_VL(config, attend), Hints(config)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.05)
    both = nn.ModuleList([model, hints])
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {config.vocab_size}", file=sys.stderr)
    caught = {}
    model.visual.register_forward_hook(lambda m, i, out: caught.update(merged=out))
    model.model.layers[args.hint_layer].register_forward_hook(lambda m, i, out: caught.update(decoder=out))

    # bfloat16 weights, as they will be used, with float32 masters for the optimizer.
    masters = [p.detach().clone() for p in both.parameters()]
    both.to(torch.bfloat16)
    optimizer = torch.optim.AdamW([dict(params=[m for m in masters if m.ndim > 1]),
                                   dict(params=[m for m in masters if m.ndim == 1], weight_decay=0.0)],
                                  lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02)
    start, saved = 0, work / "state.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        start = state["step"]
        for master, value in zip(masters, state["masters"]):
            master.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
    for p, master in zip(both.parameters(), masters):
        p.data.copy_(master)

    batches = Batches(processor, args.seed, args.batch, args.steps, args.videos, args.every)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(batches, range(start, args.steps)), batch_size=None, num_workers=1, prefetch_factor=4)
    log, clock, hits = (work / "log.jsonl").open("a"), time.time(), {}
    sums, seen = np.zeros(4), 0
    for batch in loader:
        step = batch["step"]
        rate = args.lr * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = max(rate, 1e-6)
        t, h, w = batch["grid"]
        frames = torch.tensor([[args.batch * t, h, w]])         # pictures of one size, packed as frames: they never meet
        if step < args.warm:
            merged = model.visual(batch["pixels"], frames).unflatten(0, (args.batch, -1))
            loss = hints(merged, batch["cells"], batch["grid"], absolute=False) if not batch["video"] else None
            if loss is None:
                continue
            parts = [loss.item(), 0, 0]
        else:
            attend.mask = torch.zeros(batch["visible"].shape, dtype=torch.bfloat16).masked_fill(
                ~batch["visible"], torch.finfo(torch.bfloat16).min)[:, None]
            ids, stem = batch["input_ids"], batch["stem"]
            grids = dict(video_grid_thw=torch.tensor([[t, h, w]]), second_per_grid_ts=[1.0]) if batch["video"] else dict(
                image_grid_thw=torch.tensor([[t, h, w]]))
            before, after = model.positions(ids[:1, :stem], **grids)
            positions = (after + batch["offset"]).expand(3, -1, -1).clone()
            positions[:, :, :stem] = before
            x = (model.embed(ids, pixel_values_videos=batch["pixels"], video_grid_thw=frames) if batch["video"]
                 else model.embed(ids, batch["pixels"], frames))
            logits = model.decode(x, positions).float()
            labels = batch["labels"]
            answer = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / len(batch["spans"])
            loss, parts = answer, [0, 0, answer.item()]
            if not batch["video"]:
                merged = caught["merged"].unflatten(0, (args.batch, -1))
                decoder = caught["decoder"][ids == config.image_token_id].unflatten(0, (args.batch, -1))
                near = hints(merged, batch["cells"], batch["grid"], absolute=False)
                far = hints(decoder, batch["cells"], batch["grid"], absolute=True)
                loss, parts = loss + args.hints * (near + far), [near.item(), far.item(), answer.item()]
            right = (logits.argmax(-1) == labels)
            for kind, b, begin, stop in batch["spans"]:
                good, total = hits.get(kind, (0, 0))
                hits[kind] = good + right[b, begin:stop].all().item(), total + 1
        both.zero_grad()
        loss.backward()
        for p, master in zip(both.parameters(), masters):
            master.grad = None if p.grad is None else p.grad.float()
        norm = nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for p, master in zip(both.parameters(), masters):
                p.copy_(master)
        sums, seen = sums + np.array([*parts, norm.item()]), seen + 1
        if (step + 1) % args.report == 0:
            row = dict(step=step + 1, seconds=round((time.time() - clock) / args.report, 3),
                       near=sums[0] / seen, far=sums[1] / seen, answer=sums[2] / seen, norm=sums[3] / seen,
                       **{kind: good / total for kind, (good, total) in sorted(hits.items())})
            print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
            clock, hits, sums, seen = time.time(), {}, np.zeros(4), 0
        if (step + 1) % args.save == 0 or step + 1 == args.steps:
            torch.save(dict(step=step + 1, masters=masters, optimizer=optimizer.state_dict()), saved)
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, work / "model.safetensors",
                      metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--warm", type=int, default=500, help="first steps, of the vision tower and its hints alone")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--hints", type=float, default=1.0)
    parser.add_argument("--hint-layer", type=int, default=2)
    parser.add_argument("--videos", type=float, default=0.0)
    parser.add_argument("--every", type=float, default=0.3)
    parser.add_argument("--report", type=int, default=50)
    parser.add_argument("--save", type=int, default=200)
    args = parser.parse_args()
    train(args)


if __name__ == "__main__":
    main()
