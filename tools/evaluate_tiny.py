"""How well does the tiny checkpoint, or another, answer about scenes that no training has seen?

    python tools/evaluate_tiny.py tiny --seed 7 --scenes 500
    python tools/evaluate_tiny.py runs/tiny --failures failures.png

Prints a row for each kind of question. Read from the top: when an answer is right, the questions, the
answers, the table.
"""

import itertools
import random
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from boxes import read_boxes
from scenes import KINDS, SIDES, Question, Sample, conversation, make_sample

from load_weights import load_generation_config, load_model, load_processor
from processing import Box
from sampling import generate

BATCH = 64      # questions answered at once


class Answer(NamedTuple):
    question: Question
    sample: Sample
    got: str


# ---------------------------------------------------------------------------- when an answer is right

def area(box: Box) -> float:
    x1, y1, x2, y2 = box
    return max(0, x2 - x1) * max(0, y2 - y1)


def iou(a: Box, b: Box) -> float:
    """Intersection over union, from 0 to 1."""
    inner = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return inner / max(1, area(a) + area(b) - inner)


def overlap(answer: Answer) -> float:
    """IoU of the one box that was asked for; 0 where the label is another."""
    [(box, label)] = read_boxes(answer.question.expected)
    return max((iou(box, other) for other, said in read_boxes(answer.got) if said == label), default=0.0)


def f1(answers: list[Answer]) -> float:
    """Of boxes with the right label and an IoU above 0.5, each found once."""
    hits = 0
    total = 0
    for answer in answers:
        expected = read_boxes(answer.question.expected)
        got = read_boxes(answer.got)
        total += len(expected) + len(got)

        # What has been found cannot be found again.
        for box, label in got:
            match = next((e for e in expected if e[1] == label and iou(e[0], box) > 0.5), None)
            if match:
                expected.remove(match)
                hits += 1
    return 2 * hits / max(1, total)


def good(answer: Answer) -> bool:
    """Whether an answer counts as right: boxes by label and overlap, the rest to the letter."""
    if answer.got == answer.question.expected:
        return True
    return answer.question.kind in ("locate", "every") and f1([answer]) == 1


def share(answers: list[Answer]) -> float:
    """How many of the answers are right."""
    return sum(map(good, answers)) / max(1, len(answers))


def mean_iou(answers: list[Answer]) -> float:
    return sum(map(overlap, answers)) / max(1, len(answers))


# ---------------------------------------------------------------------------- questions and answers

def asked(seed: int, scenes: int, kinds: tuple[str, ...] = KINDS) -> Iterator[tuple[Question, Sample]]:
    """One question of every kind about each of a number of scenes."""
    for n in range(scenes):
        rng = random.Random(f"evaluation {seed} {n}")
        width = rng.choice(SIDES)
        height = rng.choice(SIDES)

        # Three samples: a picture, a video, two pictures to compare.
        for sample_kind in ("picture", "video", "compare"):
            sample = make_sample(rng, sample_kind, width, height, rng.randint(4, 8))
            shuffled = rng.sample(sample.questions, len(sample.questions))
            questions = {question.kind: question for question in shuffled}
            for kind in kinds:
                if kind in questions:
                    yield questions[kind], sample


def answers(path: Path, seed: int, scenes: int, kinds: tuple[str, ...] = KINDS) -> Iterator[Answer]:
    """What a checkpoint says to the questions of `asked`."""
    model = load_model(path)
    processor = load_processor(path)
    settings = load_generation_config(path)

    # As a padded batch, a step of which costs little more than that of a single question.
    questions = asked(seed, scenes, kinds)
    while batch := list(itertools.islice(questions, BATCH)):
        inputs = processor([conversation(question, sample) for question, sample in batch])
        rows = torch.stack(list(generate(model, inputs, **settings)), dim=1)
        for (question, sample), ids in zip(batch, rows, strict=True):
            yield Answer(question, sample, processor.decode(ids))


# ---------------------------------------------------------------------------- the table

class Row(NamedTuple):
    kind: str
    question: str
    measure: str
    score: Callable[[list[Answer]], float]
    aim: float


ROWS = [
    Row("describe", "Describe the image.", "exact", share, 0.95),
    Row("locate", "Locate the red circle.", "mean IoU", mean_iou, 0.80),
    Row("locate", "", "IoU above 0.5", share, 0.95),
    Row("count", "How many circles are there?", "exact", share, 0.97),
    Row("color", "What color is the circle?", "exact", share, 0.98),
    Row("every", "Locate every circle.", "F1 at IoU 0.5", f1, 0.90),
    Row("video", "Which way does the circle move?", "exact", share, 0.95),
    Row("compare", "Which image has more objects?", "exact", share, 0.90),
]


def table(collected: list[Answer]) -> str:
    lines = ["| question | measure | reached | aim |", "|---|---|---|---|"]
    for row in ROWS:
        reached = row.score([answer for answer in collected if answer.question.kind == row.kind])
        lines.append(f"| {row.question} | {row.measure} | {reached:.1%} | {row.aim:.0%} |")
    return "\n".join(lines)


def in_short(text: str) -> str:
    """Boxes without their JSON, other answers as they are."""
    return "; ".join(f"{label} {box}" for box, label in read_boxes(text)) or text


def draw_failures(collected: list[Answer], path: Path, seed: int) -> None:
    """A contact sheet of 16 random answers that are wrong: the right one in black, what was said in red."""
    wrong = [answer for answer in collected if not good(answer)]
    chosen = random.Random(seed).sample(wrong, min(16, len(wrong)))

    figure, axes = plt.subplots(4, 4, figsize=(14, 15))
    for axis in axes.flat:
        axis.axis("off")

    for axis, answer in zip(axes.flat, chosen):
        expected = answer.question.expected
        axis.set_title(f"{answer.question.text}\n{in_short(expected)}\n{in_short(answer.got)}",
                       fontsize=7, wrap=True)

        # Of a video the ends.
        frames = [frame for picture in answer.sample.pictures for frame in picture]
        shown = frames if len(frames) == 1 else [frames[0], frames[-1]]
        axis.imshow(np.concatenate(shown, axis=1))

        for text, color in ((expected, "black"), (answer.got, "red")):
            for (x1, y1, x2, y2), _ in read_boxes(text):
                box = plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color)
                axis.add_patch(box)

    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="its directory")
    add("--seed", type=int, default=1)
    add("--scenes", type=int, default=500)
    add("--failures", type=Path, metavar="PNG", help="draw wrong answers")
    args = parser.parse_args(argv)

    collected = []
    for answer in answers(args.checkpoint, args.seed, args.scenes):
        collected.append(answer)
        print(f"\r{len(collected)} answers", end="", file=sys.stderr)
    print(file=sys.stderr)
    print(table(collected))
    if args.failures:
        draw_failures(collected, args.failures, args.seed)


if __name__ == "__main__":
    main()
