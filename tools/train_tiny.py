"""Train the tiny checkpoint: this architecture with 2.9 million parameters, on pictures of coloured shapes.

    python tools/train_tiny.py                          # from nothing to runs/tiny, or on from there
    python tools/train_tiny.py --evaluate tiny --seed 7 --scenes 500 --failures failures.png

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
7. Weights in bfloat16, as they will be used, with float32 masters; Muon for matrices, AdamW for the rest.

Lists of boxes and videos join in after 15 % of the steps, pairs of pictures after 30 %. Config and tokenizer
are those of tiny/.
"""

import itertools
import json
import math
import random
import shutil
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scenes
from boxes import read_boxes
from scenes import COLORS, DIRECTIONS, KINDS, SHAPES, SIDES, Question, Scene

import vision
from generate import generate
from load_weights import load_config, load_generation_config, load_model
from model import Config, Qwen2_5_VL
from processing import IM_END, IMAGE_PAD, VIDEO_PAD, VISION_END, Box, Processor, load_processor

TINY = Path(__file__).resolve().parent.parent / "tiny"
CELL = 28                               # pixels a side of a merge group

# ---------------------------------------------------------------------------- batches

START = dict(every=0.15, video=0.15, compare=0.3)       # after which share of the steps
SHARE = dict(every=0.4, video=0.3, compare=0.1)         # of batches; "every" of those with one picture
PER_PICTURE = dict(describe=1, locate=2, count=2, color=1, every=1, video=1, compare=1)     # questions
UNKNOWN = -100                          # a target that costs nothing


@dataclass
class Sample:
    """What is shown, and asked about it."""
    pictures: list[list[Image.Image]]   # pictures (a frame each), or a video
    targets: Tensor                     # (slices x cells, 10), see `cell_targets`
    questions: list[Question]


def cell_targets(scene: Scene, moving: int | None = None, offset: tuple[int, int] = (0, 0),
                 way: int = UNKNOWN) -> Tensor:
    """Of the thing that covers most of each cell, 0 for none: (cells, 10) int64.

    Number of the thing, shape, color, x1, y1, x2, y2, how many things come before it, how many of its shape,
    which way it moves (0 if it doesn't).
    """
    boxes = [scenes.shifted(thing.box, *(offset if i == moving else (0, 0)))
             for i, thing in enumerate(scene.things)]
    names, rows = [thing.shape for thing in scene.things], [[0] * 10]
    for i, (thing, box) in enumerate(zip(scene.things, boxes)):
        rows.append([i + 1, SHAPES.index(thing.shape) + 1, list(COLORS).index(thing.color) + 1, *box, i,
                     names[:i].count(thing.shape), way if i == moving or way == UNKNOWN else 0])
    return torch.tensor(rows)[torch.from_numpy(scene.cover(boxes, CELL).flatten())]


def make_sample(rng: random.Random, kind: str, width: int, height: int, frames: int) -> Sample:
    """A sample for questions of one kind; "picture" stands for those about a picture of shapes."""
    if kind == "video":
        seen = scenes.motion(rng, width, height, frames)
        slices = []
        for first in range(0, frames, 2):       # of two frames, the last of which may be there twice
            (ax, ay), (bx, by) = seen.offset(first), seen.offset(min(first + 1, frames - 1))
            way = list(DIRECTIONS).index(seen.way) + 1 if first > 0 else UNKNOWN
            slices.append(cell_targets(seen.scene, seen.moving, ((ax + bx) // 2, (ay + by) // 2), way))
        return Sample([seen.draw()], torch.cat(slices), [scenes.motion_question(seen)])
    if kind == "compare":
        both = [scenes.shapes_scene(rng, width, height) for _ in range(2)]
        return Sample([[scene.draw()] for scene in both], torch.cat([cell_targets(scene) for scene in both]),
                      [scenes.compare_question(*both)])
    scene = scenes.shapes_scene(rng, width, height)
    return Sample([[scene.draw()]], cell_targets(scene), scenes.shape_questions(scene))


def conversation(question: Question, sample: Sample) -> list[dict]:
    """As a user would ask."""
    media = [{"type": "video", "video": frames, "fps": scenes.FPS} if question.kind == "video" else
             {"type": "image", "image": frames[0]} for frames in sample.pictures]
    return [{"role": "user", "content": [*media, {"type": "text", "text": question.text}]}]


def choose(rng: random.Random, questions: list[Question], lists: bool) -> list[Question]:
    """Which questions to ask of a picture: PER_PICTURE of each kind, lists of boxes not always."""
    shuffled, counts = rng.sample(questions, len(questions)), PER_PICTURE | dict(every=int(lists))
    return [question for kind, count in counts.items()
            for question in [q for q in shuffled if q.kind == kind][:count]]


class Batches(torch.utils.data.Dataset):
    """Batch number i, always the same for a seed: samples of one kind and size, several questions on each."""

    def __init__(self, processor: Processor, seed: int, size: int, steps: int):
        self.processor, self.seed, self.size, self.steps = processor, seed, size, steps
        tokenizer = Tokenizer.from_str(processor.tokenizer.to_str())        # one that reads control tokens
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)

    def branch(self, asked: str, question: Question) -> tuple[list[int], list[int], list[int]]:
        """Ids of a question, `asked`, and its answer; of each the next one, where that is to be learned; and
        the number of the thing that the next one speaks of.
        """
        before, answer = self.encode(asked).ids, self.encode(question.expected + IM_END)
        things = [thing for text, thing in question.answer for _ in text] + [0] * len(IM_END)
        labels = [UNKNOWN] * (len(before) - 1) + [*answer.ids, UNKNOWN]
        points = [0] * (len(before) - 1) + [things[start] for start, _ in answer.offsets] + [0]
        return before + answer.ids, labels, points

    def __getitem__(self, step: int) -> dict:
        rng, progress = random.Random(f"{self.seed} {step}"), step / self.steps
        width, height, frames = rng.choice(SIDES), rng.choice(SIDES), rng.randint(4, 8)
        late = {kind: share for kind, share in SHARE.items() if progress >= START[kind]}
        lists = rng.random() < late.pop("every", 0)
        kind = rng.choices(["picture", *late], [1 - sum(late.values()), *late.values()])[0]
        count = 2 * self.size // ((frames + 1) // 2) if kind == "video" else self.size
        samples = [make_sample(rng, kind, width, height, frames) for _ in range(count)]
        made = [self.processor.patches(frames, 1, 10**9) for sample in samples for frames in sample.pictures]
        grid = made[0][1]

        prompt = lambda sample, question: self.processor.prompt(conversation(question, sample))
        media, _, _ = prompt(samples[0], samples[0].questions[0]).rpartition(VISION_END)
        pad = VIDEO_PAD if kind == "video" else IMAGE_PAD
        groups = math.prod(grid) // self.processor.merge_size**2
        stem = self.encode(media.replace(pad, pad * groups) + VISION_END).ids
        rows, answers = [], []      # of (id, label, point, branch, offset); of (kind, row, slice of the row)
        for b, sample in enumerate(samples):
            row = [(i, UNKNOWN, 0, 0, 0) for i in stem]
            for k, question in enumerate(choose(rng, sample.questions, lists), 1):
                columns = self.branch(prompt(sample, question).rpartition(VISION_END)[2], question)
                answers.append((question.kind, b, slice(len(row), len(row) + len(columns[0]))))
                row += zip(*columns, itertools.repeat(k), range(len(columns[0])))
            rows.append(row)
        T = max(map(len, rows))
        rows = [row + [(0, UNKNOWN, 0, -1, 0)] * (T - len(row)) for row in rows]
        input_ids, labels, points, branch, offset = torch.tensor(rows).unbind(dim=2)
        seen = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])
        return dict(
            step=step, video=kind == "video", input_ids=input_ids, stem=len(stem), offset=offset,
            visible=seen & torch.ones(T, T).tril().bool(), labels=labels, points=points, answers=answers,
            pixels=torch.from_numpy(np.concatenate([patches for patches, _ in made])), grid=grid,
            pictures=len(samples[0].pictures), targets=torch.stack([sample.targets for sample in samples]))


# ---------------------------------------------------------------------------- training

class TreeAttention:
    """sdpa, with the branches of a batch in the place of the causal mask."""
    mask: Tensor        # (B, 1, T, T) float32, to be added

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: vision.Mask) -> Tensor:
        # In float32: torch's kernel for the CPU is slower backwards in bfloat16.
        mask = self.mask if mask is vision.CAUSAL else mask
        return vision.sdpa(q.float(), k.float(), v.float(), mask).to(q.dtype)


class Hints(nn.Module):
    """The auxiliary layers: what covers each cell of the picture (near, after the tower), and what the
    decoder is to know of it (far)."""
    NEAR = dict(shape=1 + len(SHAPES), color=1 + len(COLORS), box=4)
    FAR = NEAR | dict(digits=4 * 3 * 10, rank=4, rank_in_shape=4, way=1 + len(DIRECTIONS))

    def __init__(self, width: int):
        super().__init__()
        self.near = nn.Linear(width, sum(self.NEAR.values()))
        self.far = nn.Linear(width, sum(self.FAR.values()))

    def seen(self, x: dict[str, Tensor], targets: Tensor, box: Tensor) -> Tensor:
        thing = targets[:, 0] > 0
        return (F.cross_entropy(x["shape"], targets[:, 1]) + F.cross_entropy(x["color"], targets[:, 2])
                + 2 * F.l1_loss(x["box"][thing], box[thing] / CELL))

    def near_loss(self, merged: Tensor, targets: Tensor, middles: Tensor) -> Tensor:
        """Of the tower's tokens (N, C), with boxes relative to the middles (N, 2) of the cells."""
        x = self.near(merged).float().split(list(self.NEAR.values()), dim=1)
        return self.seen(dict(zip(self.NEAR, x)), targets, targets[:, 3:7] - middles.repeat(1, 2))

    def far_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Of the decoder's (N, C): boxes from the corner of the picture, their decimal digits, order, way."""
        x = dict(zip(self.FAR, self.far(hidden).float().split(list(self.FAR.values()), dim=1)))
        thing, box = targets[:, 0] > 0, targets[:, 3:7]
        digits = torch.stack((box // 100, box // 10 % 10, box % 10), dim=-1)
        loss = self.seen(x, targets, box) + F.cross_entropy(
            x["digits"][thing].reshape(-1, 10), digits[thing].flatten())
        for name, column in (("rank", 7), ("rank_in_shape", 8), ("way", 9)):
            wanted = targets[thing, column]
            if (wanted != UNKNOWN).any():
                loss = loss + 0.5 * F.cross_entropy(x[name][thing], wanted, ignore_index=UNKNOWN)
        return loss


class Trainer:
    """The model, its hints and their optimizers; `step` is what happens to a batch."""
    HINTED, POINTING = 2, 3     # decoder layers

    def __init__(self, config: Config, seed: int, rate: float):
        torch.manual_seed(seed)
        self.attend, self.rate, self.caught = TreeAttention(), rate, {}
        self.model, self.hints = Qwen2_5_VL(config, self.attend), Hints(config.hidden_size)
        nn.init.normal_(self.model.model.embed_tokens.weight, std=0.05)
        self.parameters = [*self.model.parameters(), *self.hints.parameters()]
        self.masters = [p.detach().clone() for p in self.parameters]
        self.model.bfloat16()
        self.hints.bfloat16()
        hidden = {id(p) for m in (self.model.visual, self.model.model.layers) for p in m.parameters()
                  if p.ndim == 2}
        matrices = [m for p, m in zip(self.parameters, self.masters) if id(p) in hidden]
        others = [m for p, m in zip(self.parameters, self.masters) if id(p) not in hidden]
        self.optimizers = [
            torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)]

        def point(q: Tensor, k: Tensor, v: Tensor, mask: vision.Mask) -> Tensor:
            self.caught.update(q=q, k=k)
            return self.attend(q, k, v, mask)
        self.model.visual.register_forward_hook(lambda *args: self.caught.update(merged=args[-1]))
        self.model.model.layers[self.HINTED].register_forward_hook(
            lambda *args: self.caught.update(hidden=args[-1]))
        self.model.model.layers[self.POINTING].self_attn.attend = point

    def state(self, step: int) -> dict:
        return dict(step=step, masters=self.masters, optimizers=[o.state_dict() for o in self.optimizers])

    def restore(self, state: dict) -> int:
        for master, saved in zip(self.masters, state["masters"]):
            master.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.publish()
        return state["step"]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters to the weights."""
        for p, master in zip(self.parameters, self.masters):
            p.copy_(master)

    def forward(self, batch: dict) -> Tensor:
        """Logits of a batch of trees."""
        (t, h, w), stem, B = batch["grid"], batch["stem"], len(batch["input_ids"])
        grids = torch.tensor([[t, h, w]] * batch["pictures"])
        packed = torch.tensor([[t * batch["pictures"] * B, h, w]])     # one video, whose frames never meet
        if batch["video"]:
            media = dict(video_grid_thw=grids, second_per_grid_ts=[2 / scenes.FPS])
            pixels = dict(pixel_values_videos=batch["pixels"], video_grid_thw=packed)
        else:
            media = dict(image_grid_thw=grids)
            pixels = dict(pixel_values=batch["pixels"], image_grid_thw=packed)
        before, after = self.model.positions(batch["input_ids"][:1, :stem], **media)
        positions = (after + batch["offset"]).repeat(3, 1, 1)
        positions[:, :, :stem] = before
        x = self.model.embed(batch["input_ids"], **pixels)
        unseen = ~batch["visible"][:, None]
        self.attend.mask = torch.zeros(unseen.shape).masked_fill(unseen, torch.finfo(torch.float32).min)
        return self.model.decode(x, positions).float()

    def point_loss(self, batch: dict, vision_tokens: Tensor) -> Tensor:
        """How little the pointing heads, one for each key head, look at what the next token speaks of."""
        q, k = self.caught["q"].float(), self.caught["k"].float()
        q = q[:, ::q.shape[1] // k.shape[1]]                                    # (B, kv heads, T, D)
        scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + self.attend.mask
        thing = torch.zeros_like(batch["points"]).masked_scatter(vision_tokens, batch["targets"][..., 0])
        meant = (batch["points"][:, :, None] == thing[:, None, :]) & (thing > 0)[:, None, :]    # (B, T, T)
        b, t = meant.any(dim=2).nonzero(as_tuple=True)
        scores, meant = scores[b, :, t], meant[b, t][:, None]
        return (scores.logsumexp(dim=2) - scores.masked_fill(~meant, -torch.inf).logsumexp(dim=2)).mean()

    def losses(self, batch: dict, tower_only: bool) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
        """Losses by name, and for every kind of question which answers are right to the last token."""
        (_, h, w), targets = batch["grid"], batch["targets"].flatten(0, 1)
        losses, right = {}, defaultdict(list)
        if tower_only:
            slices = batch["pixels"].shape[0] // (h * w)
            self.model.visual(batch["pixels"], torch.tensor([[slices, h, w]]))
        else:
            logits, labels = self.forward(batch), batch["labels"]
            total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            losses["answer"] = total / len(batch["answers"])
            good = (logits.argmax(dim=-1) == labels) | (labels == UNKNOWN)
            for kind, b, place in batch["answers"]:
                right[kind].append(good[b, place].all().item())
            config, video = self.model.config, batch["video"]
            tokens = batch["input_ids"] == (config.video_token_id if video else config.image_token_id)
            losses["far"] = self.hints.far_loss(self.caught["hidden"][tokens], targets)
            if (batch["points"] > 0).any():
                losses["point"] = self.point_loss(batch, tokens)
        merge = self.model.config.vision.spatial_merge_size
        rows, columns = (torch.arange(side // merge) * CELL + CELL / 2 for side in (h, w))
        middles = torch.cartesian_prod(rows, columns).flip(1)
        losses["near"] = self.hints.near_loss(
            self.caught["merged"], targets, middles.repeat(len(targets) // len(middles), 1))
        return losses, right

    def step(self, batch: dict, tower_only: bool, progress: float) -> dict[str, list[float]]:
        """One update, at a share `progress` of all steps: 100 to warm up, the last 40 % down to zero."""
        losses, right = self.losses(batch, tower_only)
        sum(losses.values()).backward()
        for p, master in zip(self.parameters, self.masters):
            master.grad, p.grad = None if p.grad is None else p.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        rate = self.rate * min(1, (batch["step"] + 1) / 100, (1 - progress) / 0.4)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.publish()
        return {name: [loss.item()] for name, loss in losses.items()} | right


def train(work: Path, seed: int, steps: int, tower_steps: int, size: int, rate: float) -> None:
    """All but the weights comes from tiny/; where `work` holds a state, training goes on from there."""
    shutil.copytree(TINY, work, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    processor, trainer = load_processor(work), Trainer(load_config(work), seed, rate)
    saved, log, start = work / "state.pt", work / "log.jsonl", 0
    if saved.exists():
        start = trainer.restore(torch.load(saved, weights_only=True))
        print(f"on from step {start}", file=sys.stderr)
    batches = torch.utils.data.Subset(Batches(processor, seed, size, steps), range(start, steps))
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4)
    clock, collected = time.time(), defaultdict(list)
    for batch in loader:
        step = batch["step"] + 1
        for name, values in trainer.step(batch, step <= tower_steps, batch["step"] / steps).items():
            collected[name] += values
        if step % 50 == 0 or step == steps:
            row = dict(step=step, seconds=(time.time() - clock) / len(collected["near"]))
            row |= {name: sum(values) / len(values) for name, values in collected.items()}
            numbers = (f"{name} {value:.3f}" for name, value in row.items() if name != "step")
            print(f"{step}/{steps}", *numbers, sep="  ", flush=True)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            clock, collected = time.time(), defaultdict(list)
        if step % 200 == 0 or step == steps:
            torch.save(trainer.state(step), saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
            weights = {name: p.contiguous() for name, p in trainer.model.state_dict().items()}
            save_file(weights, work / "model.safetensors", metadata={"format": "pt"})
            draw_curve(log, work / "loss.png")


def draw_curve(log: Path, path: Path) -> None:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, names, title in zip(axes, (("near", "far", "point", "answer"), KINDS), ("loss", "right")):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points), label=name)
        axis.set(xlabel="step", title=title)
        axis.legend()
    axes[0].set_yscale("log")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------- evaluation

class Answer(NamedTuple):
    question: Question
    sample: Sample
    got: str


def iou(a: Box, b: Box) -> float:
    inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = lambda box: max(0, box[2] - box[0]) * max(0, box[3] - box[1])
    return inner / max(1, area(a) + area(b) - inner)


def overlap(answer: Answer) -> float:
    """IoU of the one box that was asked for; 0 where the label is another."""
    (box, label), *_ = read_boxes(answer.question.expected)
    return max((iou(box, other) for other, said in read_boxes(answer.got) if said == label), default=0.0)


def f1(answers: list[Answer]) -> float:
    """Of boxes with the right label and an IoU above 0.5, each found once."""
    hits = total = 0
    for answer in answers:
        expected, got = read_boxes(answer.question.expected), read_boxes(answer.got)
        total += len(expected) + len(got)
        for box, label in got:
            match = next((e for e in expected if e[1] == label and iou(e[0], box) > 0.5), None)
            if match:
                expected.remove(match)
                hits += 1
    return 2 * hits / max(1, total)


def good(answer: Answer) -> bool:
    """Whether an answer counts as right: boxes by label and overlap, the rest to the letter."""
    kind, expected = answer.question.kind, answer.question.expected
    return answer.got == expected or kind in ("locate", "every") and f1([answer]) == 1


def asked(seed: int, scenes: int, kinds: tuple[str, ...]) -> Iterator[tuple[Question, Sample]]:
    """One question of every kind about each of a number of scenes, which no training has seen."""
    for n in range(scenes):
        rng = random.Random(f"evaluation {seed} {n}")
        width, height = rng.choice(SIDES), rng.choice(SIDES)
        for kind in ("picture", "video", "compare"):
            sample = make_sample(rng, kind, width, height, rng.randint(4, 8))
            questions = {q.kind: q for q in rng.sample(sample.questions, len(sample.questions))}
            yield from ((questions[kind], sample) for kind in kinds if kind in questions)


def answers(path: Path, seed: int, scenes: int, kinds: tuple[str, ...] = KINDS) -> Iterator[Answer]:
    """What a checkpoint says to the questions of `asked`, 64 at a time."""
    model, processor, settings = load_model(path), load_processor(path), load_generation_config(path)
    questions = asked(seed, scenes, kinds)
    while batch := list(itertools.islice(questions, 64)):
        inputs = processor([conversation(*pair) for pair in batch])
        for (question, sample), ids in zip(batch, torch.stack(list(generate(model, inputs, **settings)), 1)):
            yield Answer(question, sample, processor.decode(ids))


def table(collected: list[Answer]) -> str:
    """The rows that the README shows."""
    share = lambda some: sum(map(good, some)) / max(1, len(some))
    mean_iou = lambda some: sum(map(overlap, some)) / max(1, len(some))
    lines = ["| question | measure | reached | aim |", "|---|---|---|---|"]
    for kind, question, measure, score, aim in (
        ("describe", "Describe the image.", "exact", share, 0.95),
        ("locate", "Locate the red circle.", "mean IoU", mean_iou, 0.80),
        ("locate", "", "IoU above 0.5", share, 0.95),
        ("count", "How many circles are there?", "exact", share, 0.97),
        ("color", "What color is the circle?", "exact", share, 0.98),
        ("every", "Locate every circle.", "F1 at IoU 0.5", f1, 0.90),
        ("video", "Which way does the circle move?", "exact", share, 0.95),
        ("compare", "Which image has more objects?", "exact", share, 0.90),
    ):
        reached = score([answer for answer in collected if answer.question.kind == kind])
        lines.append(f"| {question} | {measure} | {reached:.1%} | {aim:.0%} |")
    return "\n".join(lines)


def draw_failures(collected: list[Answer], path: Path, seed: int) -> None:
    """16 random answers that are wrong, as a contact sheet."""
    wrong = [answer for answer in collected if not good(answer)]
    figure, axes = plt.subplots(4, 4, figsize=(14, 15))
    for axis, answer in zip(axes.flat, random.Random(seed).sample(wrong, min(16, len(wrong)))):
        pictures = sum(answer.sample.pictures, [])      # the first and the last of them
        axis.imshow(np.concatenate(pictures[::max(1, len(pictures) - 1)], axis=1))
        for text, color in ((answer.question.expected, "black"), (answer.got, "red")):
            for (x1, y1, x2, y2), _ in read_boxes(text):
                axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color))
        short = lambda text: "; ".join(f"{label} {box}" for box, label in read_boxes(text)) or text
        said = short(answer.question.expected), short(answer.got)
        axis.set_title("\n".join((answer.question.text, *said)), fontsize=7, wrap=True)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/tiny"), help="where it grows; an interrupted run goes on")
    add("--seed", type=int, default=1)
    add("--steps", type=int, default=6600)
    add("--tower-steps", type=int, default=600, help="first steps, of the vision tower alone")
    add("--batch", type=int, default=16, help="pictures")
    add("--lr", type=float, default=3e-3)
    add("--evaluate", type=Path, metavar="DIR", help="print how well a checkpoint answers, and don't train")
    add("--scenes", type=int, default=500, help="for --evaluate")
    add("--failures", type=Path, metavar="PNG", help="for --evaluate: draw wrong answers")
    args = parser.parse_args()
    if not args.evaluate:
        return train(args.work, args.seed, args.steps, args.tower_steps, args.batch, args.lr)
    collected = []
    for answer in answers(args.evaluate, args.seed, args.scenes):
        collected.append(answer)
        print(f"\r{len(collected)} answers", end="", file=sys.stderr)
    print(f"\n{table(collected)}")
    if args.failures:
        draw_failures(collected, args.failures, args.seed)


if __name__ == "__main__":
    main()
