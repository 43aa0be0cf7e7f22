"""Draw the README's figures with the project's own functions, so that they can't come to tell something else.

    python tools/figures.py             # all of them, into assets/

Each function draws one figure and returns the numbers in it; tests compare them with the modules'.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from boxes import locate, read_boxes

from load_weights import SHARED_VISION, load_generation_config, load_model
from processing import load_processor, to_original
from vision import window_order

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

ASSETS, TINY = ROOT / "assets", ROOT / "tiny"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"      # told apart by every eye
COLORS = [BLUE, ORANGE, GREEN, "#F0E442", "#CC79A7", "#56B4E9", "#E69F00", "#999999"]


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, facecolor="white", bbox_inches="tight")
    plt.close(figure)


def cell(axis: plt.Axes, x: float, y: float, text: object, color: str, size: float = 1, **style) -> None:
    """A square with a text in its middle."""
    axis.add_patch(Rectangle((x, y), size, size, facecolor=color, **style))
    axis.text(x + size / 2, y + size / 2, text, ha="center", va="center", fontsize=8)


def windows_of(rows: int, columns: int, window: int) -> tuple[Tensor, Tensor]:
    """The window of every merge group (rows, columns), numbered as stored, and the order they are stored."""
    order, (layout,) = window_order(torch.tensor([[1, rows, columns]]), merge_size=1, window=window)
    sizes = torch.tensor([size for windows, size in layout.runs for _ in range(windows)])
    numbers = torch.arange(len(sizes)).repeat_interleave(sizes)
    return numbers[order.argsort()].view(rows, columns), order


def first_screen(out: Path) -> dict:
    """The demo with the boxes that the tiny checkpoint finds, and the same picture as the model sees it."""
    model, processor, settings = load_model(TINY), load_processor(TINY), load_generation_config(TINY)
    picture = Image.open(ASSETS / "demo.png").convert("RGB")
    described, resized = locate(model, processor, picture, "Describe the image.", **settings)
    names = [name.split(" ", 1)[1] for name in described.rstrip(".").split(", ")]       # "a red circle", ...
    answers = [locate(model, processor, picture, f"Locate the {name}.", **settings)[0] for name in names]
    boxes = [(to_original(box, resized, (picture.height, picture.width)), label)
             for answer in answers for box, label in read_boxes(answer)]

    config = model.config.vision
    patch, group = config.patch_size, config.patch_size * config.spatial_merge_size
    rows, columns = picture.height // group, picture.width // group
    windows, _ = windows_of(rows, columns, config.window_size // group)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    for axis, title, label in ((left, "What is where? The answers of tiny/", "pixels"),
                               (right, "What does the model see?", "patches, numbered tokens, windows")):
        axis.imshow(picture, extent=(0, picture.width, picture.height, 0))
        axis.set(title=title, xlabel=label, xticks=range(0, picture.width + 1, group),
                 yticks=range(0, picture.height + 1, group))
    for (x1, y1, x2, y2), label in boxes:
        left.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=BLUE, linewidth=2))
        left.text(x1, y2 + 3, label, color="white", backgroundcolor=BLUE, fontsize=7, va="top")
    for i, window in enumerate(windows.flatten().tolist()):
        cell(right, i % columns * group, i // columns * group, i, COLORS[window], group, alpha=0.25)
    for line, length in ((right.axvline, picture.width), (right.axhline, picture.height)):
        for at in range(0, length + 1, patch):
            line(at, color="black", linewidth=0.3 if at % group else 1.2)
    save(figure, out / "first.png")
    return dict(boxes=boxes, windows=windows)


def window_figure(out: Path, rows: int = 6, columns: int = 10) -> dict:
    """Which merge groups attend to each other, and the order in which that makes them neighbours."""
    windows, order = windows_of(rows, columns, window=4)
    depth, full = SHARED_VISION["depth"], SHARED_VISION["fullatt_block_indexes"]
    figure = plt.figure(figsize=(11, 6))
    grid = figure.add_gridspec(3, 1, height_ratios=(5, 1, 1), hspace=0.7)
    picture, sequence, blocks = (figure.add_subplot(place) for place in grid)
    for i, window in enumerate(windows.flatten().tolist()):
        cell(picture, i % columns, i // columns, i, COLORS[window], edgecolor="white", alpha=0.6)
    for place, i in enumerate(order.tolist()):
        cell(sequence, place, 0, i, COLORS[windows.flatten()[i]], edgecolor="white", alpha=0.6)
    for block in range(depth):
        cell(blocks, block, 0, block, ORANGE if block in full else GREY, edgecolor="white")
    picture.set(title="Which merge groups attend to each other? Those of a window: 4 x 4, fewer at the edges",
                xlim=(0, columns), ylim=(rows, 0), xlabel="column", ylabel="row", aspect="equal")
    sequence.set(title="In which order are they kept? Whole windows, right edge, bottom edge, corner",
                 xlim=(0, len(order)), ylim=(0, 1), yticks=[], xlabel="place in the sequence")
    blocks.set(title=f"Which blocks look further? Of {depth}, {len(full)} see the whole frame (orange)",
               xlim=(0, depth), ylim=(0, 1), yticks=[], xlabel="block")
    save(figure, out / "windows.png")
    return dict(windows=windows, order=order, full=full)


def position_figure(out: Path) -> dict:
    """A prompt with a small picture, token by token, and its three rows of positions."""
    model, processor = load_model(TINY), load_processor(TINY, min_pixels=1)
    picture, text = {"type": "image", "image": Image.new("RGB", (84, 56))}, {"text": "Describe the image."}
    inputs = processor([{"role": "user", "content": [picture, text]}])
    ids = inputs["input_ids"][0].tolist()
    positions, following = model.positions(inputs["input_ids"], image_grid_thw=inputs["image_grid_thw"])
    kept = range(ids.index(model.config.image_token_id) - 3, len(ids))
    figure, axis = plt.subplots(figsize=(11, 2.8))
    axis.set_title("At which position is each token? A picture of 2 x 3 tokens: 6 slots, 3 positions", pad=64)
    axis.spines[["top", "right"]].set_visible(False)
    for at, i in enumerate(kept):
        vision = ids[i] == model.config.image_token_id
        name = repr(processor.tokenizer.decode([ids[i]], skip_special_tokens=False)).strip("'")
        axis.text(at + 0.3, 3.1, name, rotation=40, ha="left", va="bottom", fontsize=8)
        for row, (value, color) in enumerate(zip(positions[:, 0, i].tolist(), (BLUE, ORANGE, GREEN))):
            cell(axis, at, 2 - row, value, color, alpha=0.7 if vision else 0.25, edgecolor="white")
    axis.set(xlim=(0, len(kept)), ylim=(0, 3), xticks=[at + 0.5 for at in range(len(kept))], xticklabels=kept,
             yticks=[0.5, 1.5, 2.5], yticklabels=["column", "row", "time"], xlabel="slot in the cache")
    save(figure, out / "positions.png")
    return dict(positions=positions[:, 0], following=following.item())


FIGURES = (first_screen, window_figure, position_figure)

if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS, help="where to (default: assets/)")
    for draw in FIGURES:
        draw(parser.parse_args().out)
