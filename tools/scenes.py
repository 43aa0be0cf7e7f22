"""What the tiny checkpoint is taught and asked: colored shapes, still or moving, with questions and answers.

Read from the top: things and how they are drawn, scenes, scenes that move, what can be asked of them, and
samples, which put all that together. Everything comes from one random.Random, so that a seed is a picture.
`train_tiny.py` makes batches of samples, `evaluate_tiny.py` asks about them.
"""

import io
import math
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLORS = dict(
    red=(215, 40, 40),
    green=(40, 160, 60),
    blue=(45, 75, 215),
    yellow=(230, 205, 40),
    purple=(140, 55, 175),
    orange=(235, 125, 25),
    black=(25, 25, 25),
)
SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS = dict(left=(-1, 0), right=(1, 0), up=(0, -1), down=(0, 1))
SIDES = (112, 140, 168, 196, 224)       # pixels, of pictures
FPS = 2                                 # of videos
KINDS = ("describe", "locate", "count", "color", "every", "video", "compare")

Pixels = tuple[int, int, int, int]      # x1, y1, x2, y2 of a drawn extent; x2 and y2 exclusive
Segment = tuple[str, int]               # a piece of an answer, and the thing that it speaks of, from 1; or 0


# ---------------------------------------------------------------------------- things

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
    last = n - 1
    mask = Image.new("L", (n, n))
    draw = ImageDraw.Draw(mask)

    if shape == "circle":
        draw.ellipse((0, 0, last, last), fill=255)
    elif shape == "square":
        draw.polygon([(0, 0), (last, 0), (last, last), (0, last)], fill=255)
    elif shape == "triangle":
        draw.polygon([(n / 2, 0), (last, last), (0, last)], fill=255)
    else:       # a star: five tips, and five corners between them, clockwise from the top
        corners = []
        for k, radius in enumerate([1, 0.4] * 5):
            angle = math.pi * k / 5
            corners.append((n / 2 * (1 + radius * math.sin(angle)), n / 2 * (1 - radius * math.cos(angle))))
        draw.polygon(corners, fill=255)

    # Drawn four times as large, a smooth shape has edges of all shades.
    mask = mask.resize((size, size), Image.Resampling.BOX)
    return mask.crop(mask.getbbox())


def shifted(box: Pixels, dx: int, dy: int) -> Pixels:
    return box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy


def overlaps(a: Pixels, b: Pixels) -> bool:
    """Whether two boxes come closer than two pixels."""
    return a[0] < b[2] + 2 and b[0] < a[2] + 2 and a[1] < b[3] + 2 and b[1] < a[3] + 2


# ---------------------------------------------------------------------------- scenes

class Scene:
    """A light ground, to be drawn on, and the things on it."""

    def __init__(self, rng: random.Random, width: int, height: int):
        self.size = (width, height)
        self.ground = tuple(rng.randint(225, 255) for _ in range(3))
        self.quality = rng.choice([None, rng.randint(75, 95)])      # of JPEG; None is PNG
        self.things: list[Thing] = []

    @property
    def boxes(self) -> list[Pixels]:
        return [thing.box for thing in self.things]

    def draw(self, boxes: list[Pixels] | None = None) -> Image.Image:
        """The picture; with `boxes`, its things are somewhere else."""
        image = Image.new("RGB", self.size, self.ground)
        for thing, box in zip(self.things, boxes or self.boxes, strict=True):
            image.paste(thing.paint, box, thing.mask)

        # Half of the pictures have been JPEGs.
        if self.quality:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=self.quality)
            image = Image.open(file).convert("RGB")
        return image

    def cover(self, boxes: list[Pixels], side: int) -> np.ndarray:
        """Which thing covers most of each cell of side x side pixels, from 1, 0 for none: (rows, columns)."""
        width, height = self.size
        cover = np.zeros((len(boxes) + 1, height, width), np.float32)
        cover[0] = 0.1 * 255        # what covers less than a tenth is none
        for i, (thing, (x1, y1, x2, y2)) in enumerate(zip(self.things, boxes, strict=True), 1):
            cover[i, y1:y2, x1:x2] = np.asarray(thing.mask)

        cells = cover.reshape(-1, height // side, side, width // side, side).sum((2, 4))
        return cells.argmax(0)


def shapes_scene(rng: random.Random, width: int, height: int, most: int = 4) -> Scene:
    """One to `most` shapes from the top down, which neither overlap nor begin in the same rows."""
    scene = Scene(rng, width, height)
    smooth = rng.random() < 0.5
    wanted = rng.randint(1, most)

    # Shapes are thrown at the picture, and stay where there is room. A small one may never have enough.
    for _ in range(200):
        if len(scene.things) == wanted:
            break
        color = rng.choice(list(COLORS))
        shape = rng.choice(SHAPES)
        mask = shape_mask(shape, rng.randint(24, 64), smooth)
        x = rng.randint(0, width - mask.width)
        y = rng.randint(0, height - mask.height)
        box = (x, y, x + mask.width, y + mask.height)
        if any(overlaps(box, other) or abs(other[1] - y) < 4 for other in scene.boxes):
            continue

        paint = tuple(min(255, max(0, channel + rng.randint(-20, 20))) for channel in COLORS[color])
        scene.things.append(Thing(color, shape, box, mask, paint))

    scene.things.sort(key=lambda thing: thing.box[1])
    return scene


# ---------------------------------------------------------------------------- scenes that move

@dataclass
class Motion:
    """A scene in which one thing moves straight on, step pixels a frame."""
    scene: Scene
    moving: int         # index of the thing
    way: str            # of DIRECTIONS
    step: int
    frames: int

    @property
    def thing(self) -> Thing:
        return self.scene.things[self.moving]

    def offset(self, frame: int) -> tuple[int, int]:
        dx, dy = DIRECTIONS[self.way]
        return dx * self.step * frame, dy * self.step * frame

    def boxes(self, dx: int, dy: int) -> list[Pixels]:
        """Where everything is when the moving thing has come so far."""
        boxes = self.scene.boxes
        boxes[self.moving] = shifted(self.thing.box, dx, dy)
        return boxes

    def draw(self) -> list[Image.Image]:
        return [self.scene.draw(self.boxes(*self.offset(frame))) for frame in range(self.frames)]


def motion(rng: random.Random, width: int, height: int, frames: int) -> Motion:
    """One or two shapes, one of which moves, inside the picture and clear of the other."""
    while True:
        scene = shapes_scene(rng, width, height, most=2)
        moving = rng.randrange(len(scene.things))
        way = rng.choice(list(DIRECTIONS))
        found = Motion(scene, moving, way, rng.randint(4, 12), frames)
        if is_clear(found, width, height):
            return found


def is_clear(motion: Motion, width: int, height: int) -> bool:
    """Whether the path is inside the picture, and the other thing out of its way and of another shape."""
    start = motion.thing.box
    end = shifted(start, *motion.offset(motion.frames - 1))
    x1 = min(start[0], end[0])
    y1 = min(start[1], end[1])
    x2 = max(start[2], end[2])
    y2 = max(start[3], end[3])
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        return False

    others = [thing for thing in motion.scene.things if thing is not motion.thing]
    return not any(other.shape == motion.thing.shape or overlaps((x1, y1, x2, y2), other.box)
                   for other in others)


# ---------------------------------------------------------------------------- questions

@dataclass
class Question:
    kind: str               # of KINDS
    text: str
    answer: list[Segment]

    @property
    def expected(self) -> str:
        return "".join(text for text, _ in self.answer)


Numbered = list[tuple[int, Thing]]      # things with their numbers, from 1


def boxes_answer(things: Numbered) -> list[Segment]:
    """Boxes as Qwen2.5-VL writes them."""
    rows = []
    for i, thing in things:
        box = ", ".join(map(str, thing.box))
        comma = ", " if rows else ""
        rows.append((f'{comma}{{"bbox_2d": [{box}], "label": "{thing.name}"}}', i))
    return [("```json\n[", 0), *rows, ("]\n```", 0)]


def description(things: Numbered) -> list[Segment]:
    described = []
    for i, thing in things:
        comma = ", " if described else ""
        article = "an" if thing.color == "orange" else "a"
        described.append((f"{comma}{article} {thing.name}", i))
    return [*described, (".", 0)]


def shape_questions(scene: Scene) -> list[Question]:
    """All that can be asked of a picture of shapes."""
    things = list(enumerate(scene.things, 1))
    asked = [Question("describe", "Describe the image.", description(things))]

    # All objects, or those of a shape: how many, where, and of a single one the color.
    for what in ("object", *SHAPES):
        same = [(i, thing) for i, thing in things if what in ("object", thing.shape)]
        asked.append(Question("count", f"How many {what}s are there?", [(str(len(same)), 0)]))
        asked.append(Question("every", f"Locate every {what}.", boxes_answer(same)))
        if len(same) == 1 and what != "object":
            i, thing = same[0]
            asked.append(Question("color", f"What color is the {what}?", [(thing.color, i)]))

    # What has a name of its own can be asked for.
    names = Counter(thing.name for thing in scene.things)
    for i, thing in things:
        if names[thing.name] == 1:
            asked.append(Question("locate", f"Locate the {thing.name}.", boxes_answer([(i, thing)])))
    return asked


def motion_question(motion: Motion) -> Question:
    answer = [(motion.way, motion.moving + 1)]
    return Question("video", f"Which way does the {motion.thing.shape} move?", answer)


def compare_question(first: Scene, second: Scene) -> Question:
    more = len(first.things) - len(second.things)
    answer = "the first" if more > 0 else "the second" if more < 0 else "neither"
    return Question("compare", "Which image has more objects?", [(answer, 0)])


# ---------------------------------------------------------------------------- samples

@dataclass
class Sample:
    """What is shown, and what can be asked about it."""
    scenes: list[Scene]                 # one, or two to compare
    motion: Motion | None               # of the one scene, if it is shown as a video
    pictures: list[list[Image.Image]]   # the frames of each picture (one) or video
    questions: list[Question]


def make_sample(rng: random.Random, kind: str, width: int, height: int, frames: int) -> Sample:
    """kind: "video", "compare", or "picture", which stands for all kinds of questions about one picture."""
    if kind == "video":
        moving = motion(rng, width, height, frames)
        return Sample([moving.scene], moving, [moving.draw()], [motion_question(moving)])

    scenes = [shapes_scene(rng, width, height)]
    if kind == "compare":
        scenes.append(shapes_scene(rng, width, height))
        questions = [compare_question(*scenes)]
    else:
        questions = shape_questions(scenes[0])
    return Sample(scenes, None, [[scene.draw()] for scene in scenes], questions)


def conversation(question: Question, sample: Sample) -> list[dict]:
    """As a user would ask."""
    content = []
    for frames in sample.pictures:
        if sample.motion is None:
            content.append({"type": "image", "image": frames[0]})
        else:
            content.append({"type": "video", "video": frames, "fps": FPS})
    content.append({"type": "text", "text": question.text})
    return [{"role": "user", "content": content}]
