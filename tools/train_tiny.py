"""Train the tiny checkpoint: this architecture with 2.9 million parameters, on pictures of colored shapes.

    python tools/train_tiny.py      # from nothing to runs/tiny, or on from there
    python tools/train_tiny.py --start tiny --work runs/mine --steps 600 --tower-steps 0 --lr 5e-4

The second begins with the weights of tiny/, to teach it something more: docs/tiny.md has an example.

The recipe. With questions and answers alone nothing is learned for thousands of steps: the decoder finds
nothing to read in the picture, so the tower gets no useful gradient. What helps:

1. Say what to see. A linear layer on every merged vision token, dropped after training, names the thing that
   covers its 28 x 28 pixels and how far away the sides of its box are. The tower learns this alone at first.
2. Say what to know. Every rotary is relative, so absolute pixels must be inferred, in the decoder from the
   distance to <|vision_start|>. A second such layer, on the third of five decoder layers, asks every vision
   token for its box in absolute pixels, digit by digit, which thing from the top it is, and where it moves.
3. Say where to look. To find things is not what is hard, but which one is meant. In the fourth layer two
   heads are trained to look, from every token of an answer, at the thing that the token speaks of.
4. Let the decoder tell columns apart. MRoPE's columns turn with the slowest channel pairs; with a theta of
   1e6 and eight columns they hardly turn at all. Here theta is 100, and mrope_section is [2, 5, 9].
5. Ask many questions of each picture. Its tokens are the cost. Questions are branches of one sequence: they
   see the system turn and the picture, not each other, and start at the same position, so each is trained
   exactly as it will be asked. The branches are a mask, given to the model as its attention function.
6. One picture size per batch. The tower takes its pictures as the frames of one video: frames never meet.
7. Round the weights to bfloat16, as they will be used, and keep float32 masters. Muon for matrices, AdamW
   for the rest; from a trained checkpoint AdamW for all.

The forward pass computes in float32, because many CPUs have no instructions for bfloat16, and are several
times slower in it. The weights in tiny/ were trained in bfloat16 throughout.

Lists of boxes and videos join in after 15 % of the steps, pairs of pictures after 30 %. Config and tokenizer
are those of tiny/. Read from the top: targets, batches, losses, the trainer, the loop. What the result is
worth, `evaluate_tiny.py` says.
"""

import json
import math
import random
import shutil
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scenes
from scenes import COLORS, DIRECTIONS, KINDS, SHAPES, SIDES, Pixels, Question, Sample, Scene

from load_weights import load_config, load_model, load_processor
from model import Config, Qwen2_5_VL
from processing import IM_END, IMAGE_PAD, VIDEO_PAD, VISION_END, Grid, Processor
from vision import sdpa

TINY = Path(__file__).resolve().parent.parent / "tiny"
CELL = 28                               # pixels a side of a merge group
UNKNOWN = -100                          # a target that costs nothing


# ---------------------------------------------------------------------------- targets

# What is known about each cell of a picture, by the thing that covers most of it; 0 where nothing does.
TARGETS = dict(
    thing=1,            # its number, from 1
    shape=1,            # from 1
    color=1,            # from 1
    box=4,              # x1, y1, x2, y2 in pixels
    rank=1,             # how many things come before it
    rank_in_shape=1,    # how many of the same shape do
    way=1,              # which way it moves, from 1; 0 if it doesn't
)


def columns(x: Tensor, widths: dict[str, int]) -> dict[str, Tensor]:
    """The columns of x (..., C) by name; a single column without its axis."""
    parts = x.split(list(widths.values()), dim=-1)
    return {name: part.squeeze(-1) for name, part in zip(widths, parts, strict=True)}


def cell_targets(scene: Scene, boxes: list[Pixels], ways: list[int]) -> Tensor:
    """TARGETS of each cell of a picture with its things at `boxes`, moving in `ways`: (cells, 10) int64."""
    rows = [[0] * sum(TARGETS.values())]
    shapes = []         # of the things before
    for i, thing in enumerate(scene.things):
        shape = SHAPES.index(thing.shape) + 1
        color = list(COLORS).index(thing.color) + 1
        rows.append([i + 1, shape, color, *boxes[i], i, shapes.count(shape), ways[i]])
        shapes.append(shape)

    cover = torch.from_numpy(scene.cover(boxes, CELL).flatten())
    return torch.tensor(rows)[cover]


def sample_targets(sample: Sample) -> Tensor:
    """TARGETS of all cells of its pictures or pairs of frames, one after the other: (cells, 10) int64."""
    motion = sample.motion
    targets = []
    if motion is None:
        for scene in sample.scenes:
            ways = [UNKNOWN] * len(scene.things)
            targets.append(cell_targets(scene, scene.boxes, ways))
        return torch.cat(targets)

    for first in range(0, motion.frames, 2):
        # The thing is halfway between the two frames; the last frame may have to be both.
        x1, y1 = motion.offset(first)
        x2, y2 = motion.offset(min(first + 1, motion.frames - 1))
        boxes = motion.boxes((x1 + x2) // 2, (y1 + y2) // 2)

        # Where it goes the first pair cannot know, because the tower keeps pairs apart.
        ways = [UNKNOWN if first == 0 else 0] * len(boxes)
        if first > 0:
            ways[motion.moving] = list(DIRECTIONS).index(motion.way) + 1
        targets.append(cell_targets(motion.scene, boxes, ways))
    return torch.cat(targets)


# ---------------------------------------------------------------------------- batches

START = dict(every=0.15, video=0.15, compare=0.3)       # after which share of the steps
SHARE = dict(every=0.4, video=0.3, compare=0.1)         # of batches; "every" of those with one picture
TWICE = ("locate", "count")                             # asked of a picture, the other kinds once


class Token(NamedTuple):
    """One of a tree: a stem, which is the system turn and the pictures, and a branch for each question."""
    id: int
    label: int = UNKNOWN    # the next one, where that is to be learned
    point: int = 0          # number of the thing that the next one speaks of, 0 for none
    branch: int = 0         # number of the question, 0 for the stem, -1 for padding
    offset: int = 0         # tokens from the start of the branch


class Place(NamedTuple):
    """Where in a batch a question and its answer are."""
    kind: str
    row: int
    tokens: slice


@dataclass
class Batch:
    """B trees of T tokens, on samples of one kind and size."""
    step: int
    places: list[Place]
    stem: int               # tokens, the same in every row
    input_ids: Tensor       # (B, T); here and in the next three see `Token`
    labels: Tensor
    points: Tensor
    offsets: Tensor
    visible: Tensor         # (B, T, T) bool, whether a token sees another
    is_video: bool
    pictures: int           # in each sample; a video counts as one
    grid: Grid              # of every picture or video
    pixels: Tensor          # (patches of all, 1176)
    targets: Tensor         # (B, cells, 10), see TARGETS

    @property
    def packed_grid(self) -> Tensor:
        """Of all pictures as the frames of one video: in the tower, frames never meet."""
        _, h, w = self.grid
        return torch.tensor([[len(self.pixels) // (h * w), h, w]])


def choose(rng: random.Random, questions: list[Question], lists: bool) -> list[Question]:
    """Which questions to ask of a picture: one or two of each kind, lists of boxes not always."""
    shuffled = rng.sample(questions, len(questions))
    chosen = []
    for kind in KINDS:
        if kind != "every" or lists:
            count = 2 if kind in TWICE else 1
            chosen += [question for question in shuffled if question.kind == kind][:count]
    return chosen


class Batches(torch.utils.data.Dataset):
    """Batch number i, always the same for a seed: samples of one kind and size, several questions on each."""

    def __init__(self, processor: Processor, seed: int, size: int, steps: int):
        self.processor = processor
        self.seed = seed
        self.size = size
        self.steps = steps
        self.tokenizer = Tokenizer.from_str(processor.tokenizer.to_str())   # one that reads control tokens

    def make_samples(self, rng: random.Random, step: int) -> tuple[list[Sample], bool]:
        """Samples of one kind and size, and whether to ask for lists of boxes."""
        width = rng.choice(SIDES)
        height = rng.choice(SIDES)
        frames = rng.randint(4, 8)

        # One kind, of those that have joined in so far.
        shares = {kind: share for kind, share in SHARE.items() if step / self.steps >= START[kind]}
        lists = rng.random() < shares.pop("every", 0)
        kind = rng.choices(["picture", *shares], [1 - sum(shares.values()), *shares.values()])[0]

        # Fewer videos: in all they have twice as many pairs of frames as there would be pictures.
        count = self.size
        if kind == "video":
            count = 2 * self.size // math.ceil(frames / 2)
        return [scenes.make_sample(rng, kind, width, height, frames) for _ in range(count)], lists

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """The ids in a text, and at which of its characters each of them begins."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def around_media(self, sample: Sample, question: Question) -> tuple[str, str]:
        """The prompt that asks a question: up to the last picture's end, and from there."""
        prompt = self.processor.prompt(scenes.conversation(question, sample))
        before, end, after = prompt.rpartition(VISION_END)
        return before + end, after

    def stem(self, sample: Sample, grid: Grid) -> list[Token]:
        """What all questions have in common, with a placeholder for every merge group."""
        text, _ = self.around_media(sample, sample.questions[0])
        pad = IMAGE_PAD if sample.motion is None else VIDEO_PAD
        groups = math.prod(grid) // self.processor.merge_size**2
        ids, _ = self.encode(text.replace(pad, pad * groups))
        return [Token(i) for i in ids]

    def branch(self, sample: Sample, question: Question, number: int) -> list[Token]:
        """A question and its answer. What is learned begins with the answer's first token."""
        _, text = self.around_media(sample, question)
        asked, _ = self.encode(text)
        answer, starts = self.encode(question.expected + IM_END)

        # The thing that each character of the answer speaks of.
        things = []
        for segment, thing in question.answer:
            things += [thing] * len(segment)
        things += [0] * len(IM_END)

        before = len(asked) - 1
        ids = asked + answer
        labels = [UNKNOWN] * before + answer + [UNKNOWN]
        points = [0] * before + [things[start] for start in starts] + [0]
        offsets = range(len(ids))
        return [Token(*values) for values in zip(ids, labels, points, repeat(number), offsets)]

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"{self.seed} {step}")
        samples, lists = self.make_samples(rng, step)

        # The patches, all in one size as they are.
        patches = []
        for sample in samples:
            for frames in sample.pictures:
                rows, grid = self.processor.cut(frames, 1, 10**9)
                patches.append(self.processor.normalize(rows))

        # A tree for each sample, padded on the right.
        stem = self.stem(samples[0], grid)
        trees = []
        places = []
        for b, sample in enumerate(samples):
            tree = list(stem)
            for number, question in enumerate(choose(rng, sample.questions, lists), 1):
                branch = self.branch(sample, question, number)
                start = len(tree)
                tree += branch
                places.append(Place(question.kind, b, slice(start, len(tree))))
            trees.append(tree)
        T = max(map(len, trees))
        pad = Token(0, branch=-1)
        padded = [tree + [pad] * (T - len(tree)) for tree in trees]
        input_ids, labels, points, branches, offsets = torch.tensor(padded).unbind(dim=2)

        # A token sees what comes before it, in the stem and in its own branch.
        keys = branches[:, None, :]
        queries = branches[:, :, None]
        before = torch.ones(T, T).tril().bool()
        visible = before & ((keys == 0) | (keys == queries))

        return Batch(
            step=step,
            places=places,
            stem=len(stem),
            input_ids=input_ids,
            labels=labels,
            points=points,
            offsets=offsets,
            visible=visible,
            is_video=samples[0].motion is not None,
            pictures=len(samples[0].pictures),
            grid=grid,
            pixels=torch.cat(patches),
            targets=torch.stack([sample_targets(sample) for sample in samples]),
        )


# ---------------------------------------------------------------------------- losses

class TreeAttention:
    """sdpa, with the branches of a batch in the place of the causal mask."""
    mask: Tensor        # (B, 1, T, T) float32, to be added

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        mask = self.mask if causal else mask
        return sdpa(q, k, v, mask, causal=False)


class Hints(nn.Module):
    """The auxiliary layers: what covers each cell of the picture (near, after the tower), and what the
    decoder is to know of it (far).
    """
    NEAR = dict(shape=1 + len(SHAPES), color=1 + len(COLORS), box=4)
    FAR = NEAR | dict(digits=4 * 3 * 10, rank=4, rank_in_shape=4, way=1 + len(DIRECTIONS))

    def __init__(self, width: int):
        super().__init__()
        self.near = nn.Linear(width, sum(self.NEAR.values()))
        self.far = nn.Linear(width, sum(self.FAR.values()))

    def near_loss(self, merged: Tensor, targets: Tensor, middles: Tensor) -> Tensor:
        """Of the tower's tokens (N, C), with boxes relative to the middles (N, 2) of the cells."""
        said = columns(self.near(merged), self.NEAR)
        true = columns(targets, TARGETS)
        return seen_loss(said, true, true["box"] - middles.repeat(1, 2))

    def far_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Of the decoder's (N, C): boxes from the corner of the picture, their decimal digits, order, way."""
        said = columns(self.far(hidden), self.FAR)
        true = columns(targets, TARGETS)
        box = true["box"]
        thing = true["thing"] > 0
        loss = seen_loss(said, true, box)

        # Hundreds, tens and ones of each side.
        digits = torch.stack((box // 100, box // 10 % 10, box % 10), dim=-1)            # (N, 4, 3)
        said_digits = said["digits"][thing].reshape(-1, 10)
        loss = loss + F.cross_entropy(said_digits, digits[thing].flatten())

        for name in ("rank", "rank_in_shape", "way"):
            wanted = true[name][thing]
            if (wanted != UNKNOWN).any():
                loss = loss + 0.5 * F.cross_entropy(said[name][thing], wanted, ignore_index=UNKNOWN)
        return loss


def seen_loss(said: dict[str, Tensor], true: dict[str, Tensor], box: Tensor) -> Tensor:
    """Shape and color of every cell, and the boxes (N, 4) in pixels of those that are of a thing."""
    thing = true["thing"] > 0
    return (F.cross_entropy(said["shape"], true["shape"])
            + F.cross_entropy(said["color"], true["color"])
            + 2 * F.l1_loss(said["box"][thing], box[thing] / CELL))


def point_loss(scores: Tensor, points: Tensor, things: Tensor) -> Tensor:
    """How little heads look at what is meant.

    scores (B, heads, T, T), masked; points (B, T): the thing that a token should look at, or 0; things
    (B, T): the thing that a token shows, or 0.
    """
    meant = (points[:, :, None] == things[:, None, :]) & (things > 0)[:, None, :]       # (B, T, T)
    b, t = meant.any(dim=2).nonzero(as_tuple=True)
    scores = scores[b, :, t]                                                            # (N, heads, T)
    meant = meant[b, t][:, None]
    of_meant = scores.masked_fill(~meant, -torch.inf)
    return (scores.logsumexp(dim=2) - of_meant.logsumexp(dim=2)).mean()


# ---------------------------------------------------------------------------- the trainer

class Trainer:
    """The model, its hints and their optimizers; `step` is what happens to a batch."""
    HINTED = 2          # decoder layer after which far hints are asked for
    POINTING = 3        # decoder layer in which heads are told where to look

    def __init__(self, config: Config, seed: int, rate: float, start: Path | None = None):
        torch.manual_seed(seed)
        self.rate = rate
        self.attend = TreeAttention()
        self.model = Qwen2_5_VL(config, self.attend)
        self.hints = Hints(config.hidden_size)
        nn.init.normal_(self.model.model.embed_tokens.weight, std=0.05)
        if start is not None:
            self.model.load_state_dict(load_model(start, "cpu", torch.float32).state_dict())

        # The weights are what the masters round to.
        self.parameters = [*self.model.parameters(), *self.hints.parameters()]
        self.masters = [p.detach().clone() for p in self.parameters]
        self.publish()
        self.optimizers = self.adamw() if start else self.muon_and_adamw()

        # What the losses need from inside of a forward pass.
        self.caught = {}
        layers = self.model.model.layers
        self.model.visual.register_forward_hook(self.catch("merged"))
        layers[self.HINTED].register_forward_hook(self.catch("hidden"))
        layers[self.POINTING].self_attn.attend = self.attend_and_catch

    def adamw(self) -> list[torch.optim.Optimizer]:
        """For what is trained already. Muon computes in bfloat16, and would take most of a step's time."""
        return [torch.optim.AdamW(self.masters, betas=(0.9, 0.98), weight_decay=0.0)]

    def muon_and_adamw(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of blocks and layers, AdamW for embeddings, vectors and hints."""
        hidden = set()
        for module in (self.model.visual, self.model.model.layers):
            hidden |= {id(p) for p in module.parameters() if p.ndim == 2}
        matrices = []
        others = []
        for p, master in zip(self.parameters, self.masters, strict=True):
            (matrices if id(p) in hidden else others).append(master)
        return [
            torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def catch(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            self.caught[name] = output
        return hook

    def attend_and_catch(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        self.caught["q"] = q
        self.caught["k"] = k
        return self.attend(q, k, v, mask, causal)

    def state(self, step: int) -> dict:
        return dict(step=step, masters=self.masters, optimizers=[o.state_dict() for o in self.optimizers])

    def restore(self, state: dict) -> int:
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.publish()
        return state["step"]

    @torch.no_grad()
    def publish(self) -> None:
        """The weights become what the masters round to in bfloat16."""
        for p, master in zip(self.parameters, self.masters, strict=True):
            p.copy_(master.bfloat16())

    def forward(self, batch: Batch) -> Tensor:
        """Logits of a batch of trees."""
        grids = torch.tensor([batch.grid] * batch.pictures)
        if batch.is_video:
            media = dict(video_grid_thw=grids, second_per_grid_ts=[2 / scenes.FPS])
            pixels = dict(pixel_values_videos=batch.pixels, video_grid_thw=batch.packed_grid)
        else:
            media = dict(image_grid_thw=grids)
            pixels = dict(pixel_values=batch.pixels, image_grid_thw=batch.packed_grid)

        # Every branch begins at the position after the stem.
        before, after = self.model.positions(batch.input_ids[:1, :batch.stem], **media)
        positions = (after + batch.offsets).repeat(3, 1, 1)
        positions[:, :, :batch.stem] = before

        x = self.model.embed(batch.input_ids, **pixels)
        unseen = ~batch.visible[:, None]
        self.attend.mask = torch.zeros(unseen.shape).masked_fill(unseen, torch.finfo(torch.float32).min)
        return self.model.logits(x, positions)

    def losses(self, batch: Batch, tower_only: bool) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
        """Losses by name, and for every kind of question which answers are right to the last token."""
        if tower_only:
            self.model.visual(batch.pixels, batch.packed_grid)
            return dict(near=self.near_loss(batch)), {}

        logits = self.forward(batch)
        said = logits.argmax(dim=-1)
        good = (said == batch.labels) | (batch.labels == UNKNOWN)
        right = defaultdict(list)
        for place in batch.places:
            tokens = good[place.row, place.tokens]
            right[place.kind].append(tokens.all().item())

        # What is answered, and what tower and decoder know of the pictures.
        config = self.model.config
        pad = config.video_token_id if batch.is_video else config.image_token_id
        placeholders = batch.input_ids == pad
        targets = batch.targets.flatten(0, 1)
        total = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
        losses = dict(
            near=self.near_loss(batch),
            far=self.hints.far_loss(self.caught["hidden"][placeholders], targets),
            answer=total / len(batch.places),
        )

        # Where heads look, if any token speaks of a thing.
        if (batch.points > 0).any():
            things = torch.zeros_like(batch.points).masked_scatter(placeholders, targets[:, 0])
            losses["point"] = point_loss(self.pointing_scores(), batch.points, things)
        return losses, right

    def near_loss(self, batch: Batch) -> Tensor:
        _, h, w = batch.grid
        merge = self.model.config.vision.spatial_merge_size
        y = torch.arange(h // merge) * CELL + CELL / 2
        x = torch.arange(w // merge) * CELL + CELL / 2
        middles = torch.cartesian_prod(y, x).flip(1)                                    # (cells, 2): x, y

        targets = batch.targets.flatten(0, 1)
        middles = middles.repeat(len(targets) // len(middles), 1)
        return self.hints.near_loss(self.caught["merged"], targets, middles)

    def pointing_scores(self) -> Tensor:
        """Of the heads that point, one for each key head: (B, kv heads, T, T), masked."""
        q = self.caught["q"]
        k = self.caught["k"]
        q = q[:, ::q.shape[1] // k.shape[1]]                                            # (B, kv heads, T, D)
        return q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + self.attend.mask

    def step(self, batch: Batch, tower_only: bool, progress: float) -> dict[str, list[float]]:
        """One update, at a share `progress` of all steps: 100 to warm up, the last 40 % down to zero."""
        losses, right = self.losses(batch, tower_only)
        sum(losses.values()).backward()

        # The gradients move over to the masters.
        for p, master in zip(self.parameters, self.masters, strict=True):
            master.grad = p.grad
            p.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)

        rate = self.rate * min(1, (batch.step + 1) / 100, (1 - progress) / 0.4)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.publish()
        return {name: [loss.item()] for name, loss in losses.items()} | right


# ---------------------------------------------------------------------------- the loop

def train(work: Path, seed: int, steps: int, tower_steps: int, size: int, rate: float,
          start: Path | None = None) -> None:
    """All but the weights comes from tiny/; they begin at random, or are those of the checkpoint `start`.
    Where `work` holds a state, training goes on from there.
    """
    shutil.copytree(TINY, work, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    trainer = Trainer(load_config(work), seed, rate, start)
    saved = work / "state.pt"
    done = 0
    if saved.exists():
        done = trainer.restore(torch.load(saved, weights_only=True))
        print(f"on from step {done}", file=sys.stderr)

    # Another process makes the batches.
    batches = Batches(load_processor(work), seed, size, steps)
    batches = torch.utils.data.Subset(batches, range(done, steps))
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4)

    clock = time.time()
    collected = defaultdict(list)
    for batch in loader:
        step = batch.step + 1
        for name, values in trainer.step(batch, step <= tower_steps, batch.step / steps).items():
            collected[name] += values

        if step % 50 == 0 or step == steps:
            report(work, step, steps, time.time() - clock, collected)
            clock = time.time()
            collected = defaultdict(list)
        if step % 200 == 0 or step == steps:
            save(work, trainer, step)


def report(work: Path, step: int, steps: int, seconds: float, collected: dict[str, list[float]]) -> None:
    """Means since the last report, printed and added to the log."""
    means = {name: sum(values) / len(values) for name, values in collected.items()}
    numbers = dict(seconds=seconds / len(collected["near"])) | means
    said = [f"{name} {value:.3f}" for name, value in numbers.items()]
    print(f"{step}/{steps}", *said, sep="  ", flush=True)
    with (work / "log.jsonl").open("a") as file:
        file.write(json.dumps(dict(step=step) | numbers) + "\n")


def save(work: Path, trainer: Trainer, step: int) -> None:
    """The state, to go on from, first under another name, so that an interruption leaves a whole one; the
    weights; and the curve.
    """
    state = work / "state.pt"
    torch.save(trainer.state(step), state.with_suffix(".new"))
    state.with_suffix(".new").replace(state)

    weights = {name: p.bfloat16().contiguous() for name, p in trainer.model.state_dict().items()}
    save_file(weights, work / "model.safetensors", metadata={"format": "pt"})
    draw_curve(work / "log.jsonl", work / "loss.png")


def draw_curve(log: Path, path: Path) -> None:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    left.set(title="loss", xlabel="step", yscale="log")
    right.set(title="right", xlabel="step")
    for axis, names in ((left, ("near", "far", "point", "answer")), (right, KINDS)):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points), label=name)
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/tiny"), help="where it grows; an interrupted run goes on")
    add("--start", type=Path, help="a checkpoint to begin with")
    add("--seed", type=int, default=1)
    add("--steps", type=int, default=6600)
    add("--tower-steps", type=int, default=600, help="first steps, of the vision tower alone")
    add("--batch", type=int, default=16, help="pictures")
    add("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    train(args.work, args.seed, args.steps, args.tower_steps, args.batch, args.lr, args.start)


if __name__ == "__main__":
    main()
