"""Draw the boxes of an answer on the original picture.

    python tools/boxes.py assets/demo.png "Locate every object." boxes.png
    python tools/boxes.py photo.jpg "Locate every cup." boxes.png --model Qwen/Qwen2.5-VL-7B-Instruct --json

The model answers in pixels of the resized picture, the only one it has seen. Here they become pixels of the
original, per axis, before they are printed and drawn.
"""

import json
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from load_weights import checkpoint, load_generation_config, load_model, load_processor
from model import Qwen2_5_VL
from processing import Box, Processor, Size, open_image, to_original
from sampling import generate

FARTHEST = 1e6      # pixels; no picture is as wide


def find_boxes(answer: str) -> tuple[list[tuple[Box, str]], int]:
    """(box, label) of every "bbox_2d" in an answer: bare, fenced, listed, nested, cut off. And how many could
    not be read.
    """
    boxes = []
    unread = len(re.findall("""["']bbox_2d["']""", answer))
    for brace in re.finditer("{", answer):
        # A model may write anything between braces, and a label may hold some.
        try:
            entry, _ = json.JSONDecoder().raw_decode(answer, brace.start())
        except (ValueError, RecursionError):
            continue
        if "bbox_2d" not in entry:
            continue

        # One box, or a list of them. What half of a surrogate pair means cannot be printed.
        unread -= 1
        label = str(entry.get("label") or "").encode(errors="replace").decode()
        value = entry["bbox_2d"]
        for box in value if isinstance(value, list) and value and isinstance(value[0], list) else [value]:
            if is_box(box):
                boxes.append((tuple(box), label))
            else:
                unread += 1
    return boxes, unread


def is_box(value: object) -> bool:
    """Four numbers that may be pixels: neither NaN nor infinite."""
    return isinstance(value, list) and len(value) == 4 and all(
        type(n) in (int, float) and abs(n) < FARTHEST for n in value)


def read_boxes(answer: str) -> list[tuple[Box, str]]:
    """(box, label) of every box in an answer that can be read."""
    boxes, _ = find_boxes(answer)
    return boxes


def locate(
    model: Qwen2_5_VL, processor: Processor, picture: Image.Image, prompt: str, **settings
) -> tuple[str, Size]:
    """The answer to a prompt about a picture, and the (height, width) of the picture it speaks of."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
    inputs = processor([{"role": "user", "content": content}])
    ids = [token.item() for token in generate(model, inputs, **settings)]
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    return processor.decode(ids), (rows * processor.patch_size, columns * processor.patch_size)


def upright(box: Box) -> Box:
    """The box with its upper left corner first, whichever two opposite ones were given."""
    x1, y1, x2, y2 = box
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def draw_boxes(picture: Image.Image, boxes: list[tuple[Box, str]]) -> Image.Image:
    """A copy with boxes and labels, white on black so that they show on anything."""
    picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    width = max(1, round(min(picture.size) / 200))
    for box, label in boxes:
        # The box: a black line with white beside it.
        draw.rectangle(box, outline="white", width=3 * width)
        draw.rectangle(box, outline="black", width=width)

        # The label, inside its upper left corner.
        place = (box[0] + 3 * width, box[1] + 3 * width)
        draw.rectangle(draw.textbbox(place, label), fill="black")
        draw.text(place, label, fill="white")
    return picture


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("picture")
    add("prompt")
    add("out", help="the picture to write")
    add("--model", default=ROOT / "tiny", help="a checkpoint's directory or hub id (default: tiny/)")
    add("--max-new-tokens", type=int, default=512)
    add("--json", action="store_true", help="print JSON instead of lines")
    args = parser.parse_args(argv)

    try:
        if Path(args.out).suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"{args.out}: not the name of a picture; name it, for instance, boxes.png")

        # Ask.
        picture = open_image(args.picture)
        path = checkpoint(args.model)
        settings = load_generation_config(path) | dict(max_new_tokens=args.max_new_tokens)
        answer, resized = locate(load_model(path), load_processor(path), picture, args.prompt, **settings)

        # From pixels of the resized picture to those of the original.
        original = (picture.height, picture.width)
        found, unread = find_boxes(answer)
        boxes = []
        for box, label in found:
            corners = to_original(box, resized, original)
            boxes.append((upright(tuple(round(n) for n in corners)), label))

        # Say, then draw: no answer is lost to a picture that cannot be written.
        if args.json:
            print(json.dumps([{"bbox_2d": box, "label": label} for box, label in boxes]))
        else:
            lines = [f"{label}: {', '.join(map(str, box))}" for box, label in boxes]
            print("\n".join(lines) or f"no boxes in: {answer}")
        if unread:
            print(f"boxes left out, since they are cut off or not four numbers: {unread}", file=sys.stderr)
        draw_boxes(picture, boxes).save(args.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
