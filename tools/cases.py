"""Questions with known answers, for an engine from which no tensor can be had.

    python tools/cases.py CASES                     # a folder of pictures, frames and questions about them
    python tools/cases.py --random CASES            # the same of a random checkpoint, which lies in it too
    python tools/compare.py CASES answers.json      # a line per kind: {"id of a case": "its answer", ...}

CASES/cases.json has what to ask, our greedy answers in float32, and where it is known the truth. A case's
content is that of a user's message, without a system turn; files are relative to the folder. Cases with the
same "batch" are asked together, padded on the left. Boxes are pixels of the resized picture.

The random checkpoint, tools/random_checkpoint.py, is the stricter judge. Its answers are lists of 40 token
ids: an engine must not stop at an end token. At none of them is the choice a close call.
"""

import json
import random
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from boxes import read_boxes
from evaluate_tiny import iou
from random_checkpoint import TINY, random_checkpoint
from scenes import SIDES, compare_question, motion, motion_question, shape_questions, shapes_scene

from load_weights import load_generation_config, load_model, load_processor
from model import Qwen2_5_VL
from processing import Processor
from sampling import generate

TEXTS = ("Hello", "How many circles are there?", "Name a color.", "What is a star?", "Count to five.")
SCENES = 20
PAIRS = 12
VIDEOS = 6
UNEVEN = ((130, 190), (203, 111), (150, 150), (97, 305))       # width, height: to be resized

RANDOM_TOKENS = 40


# ---------------------------------------------------------------------------- what is asked

def case(name: str, kind: str, media: list[dict], question: str, truth: str | None = None, **more) -> dict:
    return dict(id=name, kind=kind, content=[*media, {"type": "text", "text": question}], truth=truth, **more)


def picture(folder: Path, name: str, image: Image.Image) -> dict:
    image.save(folder / f"{name}.png")
    return {"type": "image", "image": f"{name}.png"}


def video(folder: Path, name: str, frames: list[Image.Image], fps: int) -> dict:
    (folder / name).mkdir(exist_ok=True)
    for i, frame in enumerate(frames):
        frame.save(folder / name / f"{i:02}.png")
    return {"type": "video", "video": name, "fps": fps}


def tiny_cases(folder: Path, seed: int) -> list[dict]:
    """What the tiny checkpoint knows about; writes the pictures and frames."""
    cases = []
    rng = random.Random(f"cases {seed}")

    # One picture, three questions.
    for n in range(SCENES):
        scene = shapes_scene(rng, rng.choice(SIDES), rng.choice(SIDES))
        media = [picture(folder, f"scene-{n:02}", scene.draw())]
        asked = {question.kind: question for question in shape_questions(scene)}
        for kind in ("describe", "locate", "count"):
            if kind in asked:
                cases.append(case(f"{kind}-{n:02}", kind, media, asked[kind].text, asked[kind].expected))

    # Two pictures, of different size.
    for n in range(PAIRS):
        sizes = rng.sample(SIDES, 4)
        scenes = shapes_scene(rng, *sizes[:2]), shapes_scene(rng, *sizes[2:])
        media = [picture(folder, f"pair-{n:02}-{i}", scene.draw()) for i, scene in enumerate(scenes)]
        question = compare_question(*scenes)
        cases.append(case(f"pair-{n:02}", "two pictures", media, question.text, question.expected))

    # The same frames at two rates.
    for n in range(VIDEOS):
        moving = motion(rng, rng.choice(SIDES), rng.choice(SIDES), rng.randint(4, 8))
        question = motion_question(moving)
        for fps in (2, 4):
            media = [video(folder, f"video-{n}", moving.draw(), fps)]
            cases.append(case(f"video-{n}-at-{fps}", f"video at {fps} fps", media, question.text,
                              question.expected))

    # Text alone, and sides that must be rounded.
    cases += [case(f"text-{n}", "text alone", [], text) for n, text in enumerate(TEXTS)]
    for n, size in enumerate(UNEVEN):
        scene = shapes_scene(rng, *size)
        question = shape_questions(scene)[0]
        media = [picture(folder, f"resized-{n}", scene.draw())]
        cases.append(case(f"resized-{n}", "resized", media, question.text, question.expected))

    # A batch of what was asked before: different pictures, a video, text alone.
    known = {one["id"]: one for one in cases}
    for name in ("describe-00", "text-3", "video-0-at-2", "count-01"):
        cases.append(known[name] | dict(id=f"batch-{name}", kind="padded batch", batch="one"))
    return cases


def random_cases(folder: Path) -> list[dict]:
    """Questions to the random checkpoint, which knows nothing; writes the pictures and frames."""
    rng = random.Random("random cases")
    first = picture(folder, "first", shapes_scene(rng, 224, 168).draw())
    second = picture(folder, "second", shapes_scene(rng, 140, 196).draw())
    frames = motion(rng, 112, 112, 12).draw()
    cases = [
        case("picture", "picture", [first], "Describe the image."),
        case("pictures", "two pictures", [first, second], "Which image has more objects?"),
    ]
    for fps in (1, 2, 4):
        media = [video(folder, "video", frames, fps)]
        cases.append(case(f"video-at-{fps}", "video", media, "Which way does the star move?"))
    return cases


# ---------------------------------------------------------------------------- our answers

def inputs_of(folder: Path, processor: Processor, asked: list[dict]) -> dict[str, Tensor]:
    """Of a case, or of several as a batch."""
    conversations = []
    for one in asked:
        content = [dict(item) for item in one["content"]]
        for item in content:
            if item["type"] != "text":
                item[item["type"]] = str(folder / item[item["type"]])
        conversations.append([{"role": "user", "content": content}])
    return processor(conversations)


def answer(folder: Path, model: Qwen2_5_VL, processor: Processor, cases: list[dict], **settings) -> None:
    """Note what our model says: text, or ids where there is no end token."""
    together = defaultdict(list)
    for one in cases:
        together[one.get("batch", one["id"])].append(one)
    for asked in together.values():
        ids = torch.stack(list(generate(model, inputs_of(folder, processor, asked), **settings)), dim=1)
        for one, row in zip(asked, ids):
            one["ours"] = processor.decode(row) if "eos_token_id" in settings else row.tolist()


# ---------------------------------------------------------------------------- their answers

def is_right(truth: str, said: str) -> bool:
    """Word for word; a box, if it is of the same thing and overlaps the true one by more than half."""
    true_boxes = read_boxes(truth)
    boxes = read_boxes(said)
    if len(true_boxes) != 1 or len(boxes) != 1:
        return said.strip() == truth
    (box, label), = boxes
    (true_box, true_label), = true_boxes
    return label == true_label and iou(box, true_box) > 0.5


def judge(folder: Path, answers_file: Path) -> bool:
    """Print a line for each kind of question. Whether all answers are ours, letter by letter or id by id."""
    try:
        cases = json.loads((folder / "cases.json").read_text())["cases"]
        answers = json.loads(answers_file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; give a folder of tools/cases.py and a JSON file of answers") from None

    kinds = defaultdict(list)
    for one in cases:
        kinds[one["kind"]].append(one)
    well = True
    for kind, asked in kinds.items():
        known = [one for one in asked if one["id"] in answers]
        different = [one for one in known if answers[one["id"]] != one["ours"]]
        line = f"{kind:14} {len(known) - len(different):3} of {len(asked)} as ours"

        # Where the truth is known.
        judged = [one for one in known if one["truth"] is not None]
        if judged:
            theirs = sum(is_right(one["truth"], answers[one["id"]]) for one in judged)
            ours = sum(is_right(one["truth"], one["ours"]) for one in judged)
            line += f", {theirs} right (ours: {ours} of {len(judged)})"
        if len(known) < len(asked):
            line += f"; MISSING: {', '.join(one['id'] for one in asked if one['id'] not in answers)}"
        for one in different[:1]:
            line += "; " + difference(one, answers[one["id"]])
        print(line)
        well = well and not different and len(known) == len(asked)
    return well


def difference(one: dict, said: str | list[int]) -> str:
    """Where an answer parts from ours."""
    if isinstance(said, str):
        return f"{one['id']}: {said!r}, ours {one['ours']!r}"
    alike = 0
    while alike < min(len(said), len(one["ours"])) and said[alike] == one["ours"][alike]:
        alike += 1
    return f"{one['id']}: {alike} of {len(one['ours'])} ids, then others"


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, metavar="CASES", help="the folder to write")
    parser.add_argument("--random", action="store_true", help="a random checkpoint, and questions to it")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (0); not of the random checkpoint")
    args = parser.parse_args(argv)

    args.cases.mkdir(parents=True, exist_ok=True)
    if args.random:
        model = random_checkpoint(args.cases)
        cases = random_cases(args.cases)
        settings = dict(max_new_tokens=RANDOM_TOKENS)
    else:
        model = load_model(TINY, "cpu", "float32")
        cases = tiny_cases(args.cases, args.seed)
        settings = load_generation_config(TINY)
    answer(args.cases, model, load_processor(TINY), cases, **settings)

    said = dict(checkpoint="." if args.random else "tiny", seed=args.seed, dtype="float32", decoding="greedy",
                max_new_tokens=RANDOM_TOKENS if args.random else 256, cases=cases)
    (args.cases / "cases.json").write_text(json.dumps(said, indent=1))
    print(f"{len(cases)} cases in {args.cases / 'cases.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
