"""What the tiny checkpoint is taught and asked: coloured shapes, still or moving, with questions and answers.

Read from the top: things and how they are drawn, scenes, what can be asked of them. Everything comes from one
random.Random, so that a seed is a picture. `tools/train_tiny.py` makes batches of these.
"""

import io
import math
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLORS = dict(
    red=(215, 40, 40), green=(40, 160, 60), blue=(45, 75, 215), yellow=(230, 205, 40), purple=(140, 55, 175),
    orange=(235, 125, 25), black=(25, 25, 25),
)
SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS = dict(left=(-1, 0), right=(1, 0), up=(0, -1), down=(0, 1))
SIDES = (112, 140, 168, 196, 224)       # pixels, of pictures
FPS = 2                                 # of videos
KINDS = ("describe", "locate", "count", "color", "every", "video", "compare")

Pixels = tuple[int, int, int, int]      # x1, y1, x2, y2 of a drawn extent; x2 and y2 exclusive
Segment = tuple[str, int]               # a piece of an answer, and the thing that it speaks of, from 1; or 0


@dataclass
class Thing:
    color: str
    shape: str
    box: Pixels
    mask: Image.Image       # how much of each pixel of the box it covers, 0 to 255
    paint: tuple[int, ...]  # red, green, blue

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


def shape_mask(shape: str, size: int, smooth: bool) -> Image.Image:
    """The shape in white on black, cropped to its extent."""
    n = size * (4 if smooth else 1)
    mask = Image.new("L", (n, n))
    draw, last = ImageDraw.Draw(mask), n - 1
    star = [(n / 2 * (1 + r * math.sin(math.pi * k / 5)), n / 2 * (1 - r * math.cos(math.pi * k / 5)))
            for k, r in enumerate([1, 0.4] * 5)]
    corners = dict(square=[(0, 0), (last, 0), (last, last), (0, last)], star=star,
                   triangle=[(n / 2, 0), (last, last), (0, last)])
    if shape == "circle":
        draw.ellipse((0, 0, last, last), fill=255)
    else:
        draw.polygon(corners[shape], fill=255)
    mask = mask.resize((size, size), Image.Resampling.BOX)
    return mask.crop(mask.getbbox())


def shifted(box: Pixels, dx: int, dy: int) -> Pixels:
    return box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy


def overlaps(a: Pixels, b: Pixels) -> bool:
    """Whether two boxes come closer than two pixels."""
    return a[0] < b[2] + 2 and b[0] < a[2] + 2 and a[1] < b[3] + 2 and b[1] < a[3] + 2


class Scene:
    """A light ground, to be drawn on, and the things on it."""

    def __init__(self, rng: random.Random, width: int, height: int):
        self.size = width, height
        self.ground = tuple(rng.randint(225, 255) for _ in range(3))
        self.quality = rng.choice([None, rng.randint(75, 95)])      # of JPEG; None is PNG
        self.things: list[Thing] = []

    def draw(self, moving: int = 0, offset: tuple[int, int] = (0, 0)) -> Image.Image:
        """The picture, with thing number `moving` moved by an offset."""
        image = Image.new("RGB", self.size, self.ground)
        for i, thing in enumerate(self.things):
            dx, dy = offset if i == moving else (0, 0)
            image.paste(thing.paint, shifted(thing.box, dx, dy), thing.mask)
        if self.quality:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=self.quality)
            image = Image.open(file).convert("RGB")
        return image

    def cover(self, boxes: list[Pixels], side: int) -> np.ndarray:
        """Which thing covers most of each cell of side x side pixels, from 1, 0 for none: (rows, columns)."""
        width, height = self.size
        cover = np.zeros((len(boxes) + 1, height, width), np.float32)
        cover[0] = 0.1 * 255
        for i, (thing, (x1, y1, x2, y2)) in enumerate(zip(self.things, boxes), 1):
            cover[i, y1:y2, x1:x2] = np.asarray(thing.mask)
        return cover.reshape(-1, height // side, side, width // side, side).sum((2, 4)).argmax(0)


def shapes_scene(rng: random.Random, width: int, height: int, most: int = 4) -> Scene:
    """One to `most` shapes from the top down, which neither overlap nor begin in the same rows."""
    scene, smooth, wanted = Scene(rng, width, height), rng.random() < 0.5, rng.randint(1, most)
    for _ in range(200):
        if len(scene.things) == wanted:
            break
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        mask = shape_mask(shape, rng.randint(24, 64), smooth)
        x, y = rng.randint(0, width - mask.width), rng.randint(0, height - mask.height)
        box = (x, y, x + mask.width, y + mask.height)
        if not any(overlaps(box, other.box) or abs(other.box[1] - y) < 4 for other in scene.things):
            paint = tuple(min(255, max(0, c + rng.randint(-20, 20))) for c in COLORS[color])
            scene.things.append(Thing(color, shape, box, mask, paint))
    scene.things.sort(key=lambda thing: thing.box[1])
    return scene


@dataclass
class Motion:
    """A scene in which one thing moves straight on, step pixels a frame."""
    scene: Scene
    moving: int         # number of the thing
    way: str            # of DIRECTIONS
    step: int
    frames: int

    def offset(self, frame: int) -> tuple[int, int]:
        dx, dy = DIRECTIONS[self.way]
        return dx * self.step * frame, dy * self.step * frame

    def draw(self) -> list[Image.Image]:
        return [self.scene.draw(self.moving, self.offset(frame)) for frame in range(self.frames)]


def motion(rng: random.Random, width: int, height: int, frames: int) -> Motion:
    """One or two shapes of which one moves; it stays inside the picture and clear of the other."""
    while True:
        scene = shapes_scene(rng, width, height, most=2)
        found = Motion(scene, rng.randrange(len(scene.things)), rng.choice(list(DIRECTIONS)),
                       rng.randint(4, 12), frames)
        thing = scene.things[found.moving]
        end = shifted(thing.box, *found.offset(frames - 1))
        path = tuple(map(min, thing.box[:2], end[:2])) + tuple(map(max, thing.box[2:], end[2:]))
        others = [other for other in scene.things if other is not thing]
        if (0 <= path[0] and 0 <= path[1] and path[2] <= width and path[3] <= height
                and not any(other.shape == thing.shape or overlaps(path, other.box) for other in others)):
            return found


@dataclass
class Question:
    kind: str               # of KINDS
    text: str
    answer: list[Segment]

    @property
    def expected(self) -> str:
        return "".join(text for text, _ in self.answer)


def boxes_answer(things: list[tuple[int, Thing]]) -> list[Segment]:
    rows = [(f'{{"bbox_2d": [{", ".join(map(str, thing.box))}], "label": "{thing.name}"}}', i)
            for i, thing in things]
    rows = rows[:1] + [(f", {text}", i) for text, i in rows[1:]]
    return [("```json\n[", 0), *rows, ("]\n```", 0)]


def shape_questions(scene: Scene) -> list[Question]:
    """All that can be asked of a picture of shapes."""
    things = list(enumerate(scene.things, 1))
    names = Counter(thing.name for thing in scene.things)
    described = [(f"{', ' if i > 1 else ''}a{'n' if thing.color == 'orange' else ''} {thing.name}", i)
                 for i, thing in things]
    asked = [Question("describe", "Describe the image.", [*described, (".", 0)])]
    for what in ("object", *SHAPES):
        same = [(i, thing) for i, thing in things if what in ("object", thing.shape)]
        asked.append(Question("count", f"How many {what}s are there?", [(str(len(same)), 0)]))
        asked.append(Question("every", f"Locate every {what}.", boxes_answer(same)))
        if len(same) == 1 and what != "object":
            asked.append(Question("color", f"What color is the {what}?", [(same[0][1].color, same[0][0])]))
    asked += [Question("locate", f"Locate the {thing.name}.", boxes_answer([(i, thing)]))
              for i, thing in things if names[thing.name] == 1]
    return asked


def motion_question(motion: Motion) -> Question:
    shape = motion.scene.things[motion.moving].shape
    return Question("video", f"Which way does the {shape} move?", [(motion.way, motion.moving + 1)])


def compare_question(first: Scene, second: Scene) -> Question:
    more = len(first.things) - len(second.things)
    answer = "the first" if more > 0 else "the second" if more < 0 else "neither"
    return Question("compare", "Which image has more objects?", [(answer, 0)])
