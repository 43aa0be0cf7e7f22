"""Draw all figures but speed.png, and the demo video, with the project's own functions, so that they can't
come to tell something else. Each figure answers the question that is its title; the function that draws it
returns the numbers in it.

    python tools/figures.py windows time    # these two, into assets/; without names all of them
"""

import random
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import scenes
from boxes import locate, read_boxes
from drawing import (
    BLUE,
    COLORS,
    GRAY,
    GREEN,
    ORANGE,
    PALE,
    SMALLEST,
    canvas,
    cell,
    outline,
    panels,
    rectangle,
    save,
    show,
    write,
)
from figures_cards import draw_four_bits, draw_shares
from figures_graph import draw_graph

from generate import DEMO_IMAGE, DEMO_PROMPT
from load_weights import SHARED_VISION, load_config, load_generation_config, load_model, load_processor
from model import Config, Qwen2_5_VL
from processing import Box, Processor, open_image, smart_resize, to_original
from rope import mrope_positions, vision_positions
from sampling import generate
from vision import attention_weights, repeat_heads, window_order

TINY = ROOT / "tiny"
PHOTO = ROOT / "assets" / "photo.jpg"
SIDE = SHARED_VISION["patch_size"]              # pixels of a patch
MERGE = SHARED_VISION["spatial_merge_size"]     # patches of a merge group
GROUP = SIDE * MERGE                            # pixels of a merge group


# ---------------------------------------------------------------------------- what several figures need

def question(picture: Path) -> list[dict]:
    return [{"role": "user", "content": [{"image": picture}, {"text": DEMO_PROMPT}]}]


def seen(processor: Processor, picture: Image.Image) -> tuple[Image.Image, Tensor]:
    """The picture as the model is given it, and y and x (N, 2) in it of each row of pixel_values."""
    h, w = smart_resize(picture.height, picture.width, GROUP, processor.min_pixels, processor.max_pixels)
    patches = vision_positions(torch.tensor([[1, h // SIDE, w // SIDE]]), MERGE)
    return picture.resize((w, h), Image.Resampling.BICUBIC), patches * SIDE


def windows_of(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The window of every merge group (rows, columns), numbered as stored, and their stored order."""
    window = SHARED_VISION["window_size"] // GROUP
    order, (layout,) = window_order(torch.tensor([[1, rows, columns]]), merge_size=1, window=window)
    lengths = torch.tensor(layout.lengths)
    stored = torch.arange(len(lengths)).repeat_interleave(lengths)
    return stored[order.argsort()].view(rows, columns), order


# ---------------------------------------------------------------------------- the first screen

def find_everything(picture: Image.Image) -> list[tuple[Box, str]]:
    """What tiny/ names when it describes the picture, and the boxes that it then gives for each."""
    model = load_model(TINY)
    processor = load_processor(TINY)
    settings = load_generation_config(TINY)
    described, resized = locate(model, processor, picture, DEMO_PROMPT, **settings)
    original = (picture.height, picture.width)

    # "a red star, an orange circle." Every name once.
    names = [name.split(" ", 1)[-1] for name in described.rstrip(".").split(", ")]
    boxes = []
    for name in dict.fromkeys(names):
        answer, _ = locate(model, processor, picture, f"Locate the {name}.", **settings)
        for box, label in read_boxes(answer):
            boxes.append((to_original(box, resized, original), label))
    return boxes


def draw_first(out: Path) -> dict:
    """The demo picture with the boxes that tiny/ finds, and the same as the model sees it."""
    picture = open_image(DEMO_IMAGE)
    boxes = find_everything(picture)
    given, patches = seen(load_processor(TINY), picture)
    windows, _ = windows_of(given.height // GROUP, given.width // GROUP)
    figure, (left, right) = panels(1, 2, 3.3)

    # What the model answers.
    show(left, picture, title="What is where?", xlabel="What the tiny checkpoint answers,\nbox by box")
    for box, label in boxes:
        outline(left, box, BLUE, label, box[1] - 3.5, "baseline")

    # What it sees: patches in the colors of their windows, and over the first of each merge group all of it.
    show(right, given, title="What does the model see?",
         xlabel=f"{len(patches)} patches, {windows.numel()} tokens (numbers),\n"
                f"{windows.max() + 1} windows (colors)")
    for i, (y, x) in enumerate(patches.tolist()):
        color = COLORS[windows[y // GROUP, x // GROUP] % len(COLORS)]
        rectangle(right, x, y, SIDE, SIDE, (color, 0.35), lw=0.8)
        if i % MERGE**2 == 0:
            rectangle(right, x, y, GROUP, GROUP, edgecolor="black", lw=1.5, zorder=2)
            write(right, x + SIDE, y + SIDE, i // MERGE**2, halo="white", size=SMALLEST)

    save(figure, out / "first.png")
    return dict(boxes=boxes, windows=windows)


# ---------------------------------------------------------------------------- the map

# Step of the README, name, what happens there, left edge and top in inches, width.
PLACES = [
    ("1", "picture", "resized to\nmultiples of 28", 0.1, 0.5, 2.75),
    ("1", "pixel_values", "a row for each patch", 0.1, 1.72, 2.75),
    ("2", "patch embedding", "each row becomes a vector", 0.1, 2.69, 2.75),
    ("3, 4", "tower", "blocks, most in windows", 0.1, 3.66, 2.75),
    ("5", "vision tokens", "four patches become one", 0.1, 4.63, 2.75),
    ("5", "input_ids", f'"{DEMO_PROMPT}"\nand placeholders', 3.2, 0.5, 2.95),
    ("6", "position_ids", "time, row, column", 3.65, 2.69, 2.5),
    ("5", "x", "vision tokens spliced in", 3.2, 4.63, 2.6),
    ("7", "layers", "causal, with a cache", 3.2, 5.6, 2.95),
    ("8", "logits", "the next token is chosen", 3.2, 6.57, 2.95),
]
ROADS = [       # through corners, with an arrow at the end
    [(1.45, 1.48), (1.45, 1.72)],
    [(1.45, 2.47), (1.45, 2.69)],
    [(1.45, 3.44), (1.45, 3.66)],
    [(1.45, 4.41), (1.45, 4.63)],
    [(2.85, 5.0), (3.2, 5.0)],
    [(3.42, 1.48), (3.42, 4.63)],
    [(3.9, 1.48), (3.9, 2.69)],
    [(5.98, 3.44), (5.98, 5.6)],
    [(4.5, 5.38), (4.5, 5.6)],
    [(4.5, 6.35), (4.5, 6.57)],
]
LOOP = [(6.15, 6.95), (6.48, 6.95), (6.48, 1.0), (6.15, 1.0)]
NOTES = [       # left edge and baseline of the last line, color
    (4.5, 2.1, "black", "again and again:\nthe new token alone"),
    (3.55, 3.8, "black", "words, embedded"),
    (0.1, 5.95, "black", "Black: the demo with tiny/."),
    (0.1, 6.45, "#666666", "Gray: 672 x 448 pixels\nwith the 7B."),
    (0.1, 6.95, "black", "Numbers in color: the step\nthat explains it."),
]
SIZES_7B = dict(hidden_size=3584, vocab_size=152064)
TOWER_7B = dict(hidden_size=1280, num_heads=16, out_hidden_size=3584)


def shapes_of(config: Config, height: int, width: int, words: int) -> dict[str, tuple[int, ...]]:
    """What is at each place of the map, for a resized picture in a prompt with so many other tokens."""
    tower = config.vision
    patches = height * width // tower.patch_size**2
    pixels = tower.in_chans * tower.temporal_patch_size * tower.patch_size**2
    tokens = patches // tower.spatial_merge_size**2
    T = words + tokens
    return {
        "picture": (height, width, tower.in_chans),
        "pixel_values": (patches, pixels),
        "patch embedding": (patches, tower.hidden_size),
        "tower": (patches, tower.hidden_size),
        "vision tokens": (tokens, tower.out_hidden_size),
        "input_ids": (1, T),
        "position_ids": (3, 1, T),
        "x": (1, T, config.hidden_size),
        "layers": (1, T, config.hidden_size),
        "logits": (1, config.vocab_size),
    }


def draw_map(out: Path) -> dict:
    """The way from pixels and words to logits, with the shapes of the demo and of a larger run."""
    # The demo.
    small = load_config(TINY)
    inputs = load_processor(TINY)(question(DEMO_IMAGE))
    _, h, w = inputs["image_grid_thw"][0].tolist()
    words = (inputs["mm_token_type_ids"] == 0).sum().item()

    # The 7B and a picture of 672 x 448; to its tokenizer the same prompt has as many words.
    large = replace(small, **SIZES_7B, vision=replace(small.vision, **TOWER_7B))
    shapes = dict(
        tiny=shapes_of(small, h * SIDE, w * SIDE, words),
        large=shapes_of(large, 448, 672, words),
    )

    figure, axis = canvas(7.45, "What happens to a picture and a question?")
    for place in PLACES:
        name = place[1]
        draw_place(axis, *place, shapes["tiny"][name], shapes["large"][name])
    for corners in ROADS:
        draw_road(axis, corners, "-")
    draw_road(axis, LOOP, "--")
    for x, y, color, text in NOTES:
        axis.text(x, y, text, color=color)

    axis.imshow(open_image(DEMO_IMAGE), extent=(1.93, 2.77, 1.21, 0.58), aspect="auto", zorder=2)
    save(figure, out / "map.png")
    return shapes


def draw_place(
    axis: plt.Axes,
    step: str,
    name: str,
    what: str,
    x: float,
    y: float,
    width: float,
    small: tuple[int, ...],
    large: tuple[int, ...],
) -> None:
    """A box of the map, with the shapes of the small run and of the large one."""
    color = BLUE if x < 3 else ORANGE
    lines = what.splitlines()
    height = 0.52 + 0.23 * len(lines)
    rectangle(axis, x, y, width, height, (color, 0.13), edgecolor=color, lw=1.5)

    left = x + 0.09
    indent = 0.22 if len(step) == 1 else 0.5
    axis.text(left, y + 0.16, step, va="center", size=15, weight="bold", color=color)
    axis.text(left + indent, y + 0.16, name, va="center", size=13, family="monospace")
    for i, line in enumerate(lines):
        axis.text(left, y + 0.44 + 0.23 * i, line)
    axis.text(left, y + height - 0.09, str(small))
    axis.text(left + 1.17, y + height - 0.09, str(large), color="#666666")


def draw_road(axis: plt.Axes, corners: list[tuple[float, float]], style: str) -> None:
    axis.plot(*zip(*corners[:-1]), color="black", lw=1.5, ls=style)
    arrow = dict(arrowstyle="-|>", color="black", lw=1.5, ls=style, shrinkA=0, shrinkB=1)
    axis.annotate("", corners[-1], corners[-2], arrowprops=arrow)


# ---------------------------------------------------------------------------- patches and windows

def draw_patches(out: Path, tokens: int = 6) -> dict:
    """A photo with the row of pixel_values in which each of its patches is stored, and the first rows."""
    processor = load_processor(TINY, max_pixels=20_000)
    picture, patches = seen(processor, open_image(PHOTO))
    figure, (above, below) = panels(2, 1, 6.8, height_ratios=(4.27, 1.58))

    # The photo, with the numbers of its patches and lines around its merge groups.
    show(above, picture, title="In which order are patches stored?")
    for i, (y, x) in enumerate(patches.tolist()):
        rectangle(above, x, y, SIDE, SIDE, lw=0.5)
        write(above, x + SIDE / 2, y + SIDE / 2, i, ink="white", halo="black", size=13)
        if i % MERGE**2 == 0:
            rectangle(above, x, y, GROUP, GROUP, lw=2.5)

    # The patches of the first tokens, three tokens a line.
    for i, (y, x) in enumerate(patches[:tokens * MERGE**2].tolist()):
        token, place = divmod(i, MERGE**2)
        line, column = divmod(token, 3)
        x1 = 4.3 * column + place
        y1 = 1.6 * line
        patch = picture.crop((x, y, x + SIDE, y + SIDE))
        below.imshow(patch, extent=(x1, x1 + 1, y1 + 1, y1))
        rectangle(below, x1, y1, 1, 1, lw=1.5)
        write(below, x1 + 0.5, y1 + 0.5, i, ink="white", halo="black", size=13)
        if place == 0:
            write(below, x1 + 2, y1 - 0.28, f"token {token}")
    below.set(title="The first rows of pixel_values", xlim=(0, 12.6), ylim=(2.6, -0.5))
    for axis in (above, below):
        axis.axis("off")

    save(figure, out / "patches.png")
    return dict(patches=patches, picture=picture)


def draw_windows(out: Path) -> dict:
    """Which merge groups attend to each other, and the order in which that makes them neighbors."""
    columns = 5
    windows, order = windows_of(5, columns)
    colors = [(COLORS[window], 0.6) for window in windows.flatten().tolist()]
    depth = SHARED_VISION["depth"]
    full = SHARED_VISION["fullatt_block_indexes"]
    figure, axis = canvas(6.1, "Which merge groups see each other?")

    # Every merge group three times: in the frame, in reading order, as stored.
    side = 6.4 / len(order)
    for place, i in enumerate(order.tolist()):
        cell(axis, 2.2 + 0.44 * (i % columns), 0.55 + 0.44 * (i // columns), i, colors[i], 0.44, 0.44)
        cell(axis, 0.1 + side * i, 3.45, i, colors[i], side, 0.4)
        cell(axis, 0.1 + side * place, 4.4, i, colors[i], side, 0.4)

    # Some blocks are full.
    for block in range(depth):
        x = 0.1 + 6.4 / depth * block
        rectangle(axis, x, 5.35, 6.4 / depth, 0.4, ORANGE if block in full else GRAY)
        if block in (0, *full):
            write(axis, x + 3.2 / depth, 5.9, block)

    # What is what.
    for x, y, text, end in (
        (2.05, 1.43, "a whole window:\n4 x 4 groups", "right"),
        (4.55, 1.43, "smaller at the\nright edge", "left"),
        (2.05, 2.53, "at the bottom edge", "right"),
        (4.55, 2.53, "in the corner", "left"),
        (0.1, 3.3, "Before: reading order", "left"),
        (0.1, 4.25, "In the tower: window after window", "left"),
        (0.1, 5.2, f"Blocks: {len(full)} of {depth} see the whole frame, the rest their windows", "left"),
    ):
        axis.text(x, y, text, ha=end, va="center", size=13)

    save(figure, out / "windows.png")
    return dict(windows=windows, order=order, full=full)


def draw_reach(out: Path, group: int = 9) -> dict:
    """How far a change of one merge group of the demo has spread: in the tower, and in the decoder."""
    model = load_model(TINY, "cpu", "float32")       # bfloat16 would round small changes away
    inputs = load_processor(TINY)(question(DEMO_IMAGE))
    _, rows, columns = (inputs["image_grid_thw"][0] // MERGE).tolist()
    reached = [*reach_in_tower(model, inputs, group), reach_in_decoder(model, inputs, group)]

    figure, axis = canvas(7, "How far does a change reach?")
    for part, (moved, (title, text)) in enumerate(zip(reached, (
        ("In the tower, block 0", f"The pixels of group {group} have changed.\nOnly its window notices."),
        ("In the tower, block 1", "Block 1 sees the whole frame,\nso every group notices."),
        ("In the decoder", f"Another experiment: token {group} alone\nis changed, after the tower.\n"
                           f"Tokens 0 to {group - 1} don't notice:\nnobody looks ahead."),
    ), strict=True)):
        top = 0.55 + 2.05 * part
        for i, here in enumerate(moved.tolist()):
            color = ORANGE if i == group else BLUE if here else PALE
            x = 0.1 + 0.32 * (i % columns)
            y = top + 0.32 * (i // columns)
            cell(axis, x, y, i, color, 0.32, 0.32, ink="white" if here else "black")
        axis.text(2.9, top + 0.1, title, va="top", size=13, weight="bold")
        axis.text(2.9, top + 0.4, text, va="top", size=13)

    write(axis, 3.3, 6.8, "Orange: changed. Blue: different because of it. Gray: as before.")
    save(figure, out / "reach.png")
    return dict(group=group, reached=torch.stack(reached).view(3, rows, columns))


def reach_in_tower(model: Qwen2_5_VL, inputs: dict, group: int) -> list[Tensor]:
    """Of each merge group, whether it has moved after block 0, and after block 1, when one has changed."""
    grid = inputs["image_grid_thw"]
    changed = inputs["pixel_values"].clone()
    changed[MERGE**2 * group:MERGE**2 * (group + 1)] += 1

    # What the two blocks return for the picture as it is, and changed.
    kept = []
    hooks = [block.register_forward_hook(lambda module, args, x: kept.append(x))
             for block in model.visual.blocks[:2]]
    model.visual(inputs["pixel_values"], grid)
    model.visual(changed, grid)
    for hook in hooks:
        hook.remove()

    # A group has moved if one of its patches has. Blocks see groups in another order.
    order, _ = window_order(grid, MERGE, model.config.vision.window)
    reached = []
    for before, after in zip(kept[:2], kept[2:]):
        moved = (before != after).view(len(order), -1).any(dim=1)
        reached.append(moved[order.argsort()])
    return reached


def reach_in_decoder(model: Qwen2_5_VL, inputs: dict, group: int) -> Tensor:
    """Of each merge group, whether the logits at its token have moved, when one token has changed."""
    ids = inputs["input_ids"]
    grid = inputs["image_grid_thw"]
    picture = (ids[0] == model.config.image_token_id).nonzero()[:, 0]
    position_ids, _ = model.positions(ids, image_grid_thw=grid)

    x = model.embed(ids, inputs["pixel_values"], grid)
    changed = x.clone()
    changed[0, picture[group]] += 1
    moved = model.logits(x, position_ids) != model.logits(changed, position_ids)
    return moved[0, picture].any(dim=1)


# ---------------------------------------------------------------------------- time

VIDEOS = [      # frames per second, seconds, merge groups across
    (1, 4, 1),
    (2, 4, 1),
    (4, 4, 1),
    (2, 2, 6),
]


def video_positions(pairs: int, columns: int, interval: float) -> list[list[int]]:
    """[time, row, column] of the tokens of a video one merge group high, and of a token of text after it."""
    positions, _ = mrope_positions(
        torch.tensor([[1] * pairs * columns + [0]]),
        image_token_id=2,
        video_token_id=1,
        merge_size=MERGE,
        tokens_per_second=SHARED_VISION["tokens_per_second"],
        video_grid_thw=torch.tensor([[pairs, MERGE, MERGE * columns]]),
        second_per_grid_ts=[interval],
    )
    return positions[:, 0].T.tolist()


def draw_time(out: Path) -> dict:
    """Videos on the axis of positions: their frames, their pairs of frames, and the text after them."""
    rate = SHARED_VISION["tokens_per_second"]
    pair = SHARED_VISION["temporal_patch_size"]
    figure, axis = panels(1, 1, 7.4)
    numbers = {}
    ticks = {}
    top = 0.0
    for fps, seconds, columns in VIDEOS:
        *tokens, text = video_positions(seconds * fps // pair, columns, pair / fps)
        times = sorted({time for time, _, _ in tokens})
        what = f"{fps} fps" if columns == 1 else f"{columns} groups wide, {fps} fps"
        numbers[what] = dict(times=times, text=text[0])
        axis.text(0.05, top + 0.3, what, size=13, weight="bold")

        # The frames where they are in time, and under them the pairs where they are in positions.
        for frame in range(seconds * fps):
            color = (COLORS[5 + frame // pair % 2], 0.5)
            cell(axis, frame / fps * rate, top + 0.4, frame, color, rate / fps, 0.6)
        for i, time in enumerate(times):
            cell(axis, time, top + 1.1, f"at {time}", COLORS[5 + i % 2], 1, 0.6)
        ticks[top + 0.7] = "frames"
        ticks[top + 1.4] = "pairs"

        # Of a wide video the columns as well.
        last = top + 1.1
        if columns > 1:
            last = top + 1.8
            for column in range(columns):
                cell(axis, column, last, f"at {column}", (GREEN, 0.5), 1, 0.6)
            ticks[last + 0.3] = "columns"
        cell(axis, text[0], last, f"text at {text[0]}", GRAY, 1.6, 0.6)
        top = last + 1

    axis.secondary_xaxis("top", functions=(lambda x: x / rate, lambda x: x * rate)).set_xlabel("seconds")
    axis.set_xlabel("position, from the start of the video")
    axis.set(xlim=(0, 9.7), ylim=(top - 0.2, -0.2), xticks=range(10))
    axis.set_yticks(list(ticks), list(ticks.values()))
    axis.tick_params(axis="y", length=0)
    axis.spines[["left", "right"]].set_visible(False)
    figure.suptitle("Where do a video's frames sit in time?")
    figure.supxlabel(f"A pair of frames sits where its first frame is: {rate} positions a second.\n"
                     "Text resumes one above the largest position: mostly that of the last\n"
                     "pair, but in a short, wide video that of the last column.")

    save(figure, out / "time.png")
    return numbers


# ---------------------------------------------------------------------------- attention

def weights_of(model: Qwen2_5_VL, inputs: dict, answer: Tensor) -> Tensor:
    """The decoder's attention (layers, heads, answer, tokens) from what wrote each token of an answer."""
    kept = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        kept.append(attention_weights(q, k, mask, causal))
        return kept[-1] @ repeat_heads(v, q.shape[1])

    for layer in model.model.layers:
        layer.self_attn.attend = attend
    ids = torch.cat((inputs["input_ids"], answer[None]), dim=1)
    model.float()(ids, pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])

    # A token is written by the one before it.
    return torch.cat(kept)[:, :, -1 - len(answer):-1]


def draw_attention(out: Path) -> dict:
    """Where tiny/ reads when it writes some words of its answer: with two heads, and with all of them."""
    model = load_model(TINY, "cpu")
    processor = load_processor(TINY)
    inputs = processor(question(DEMO_IMAGE))
    answer = torch.cat(list(generate(model, inputs, **load_generation_config(TINY))))
    weights = weights_of(model, inputs, answer)

    # Up to four words: colors, or any if the answer has none.
    words = [processor.decode([i]).strip() for i in answer]
    colored = [n for n, word in enumerate(words) if word in scenes.COLORS]
    shown = (colored or list(range(len(words))))[:4]

    # In the fourth layer two heads are trained to look at the thing that a token of the answer speaks of.
    trained = weights[3, [0, 3]].mean(dim=0)
    everything = weights.mean(dim=(0, 1))
    maps = torch.stack((trained, everything))[:, shown]                     # (2, words, tokens)

    # Of the prompt, the picture's tokens, as a map.
    _, rows, columns = (inputs["image_grid_thw"][0] // MERGE).tolist()
    picture = inputs["mm_token_type_ids"][0].nonzero()[:, 0]
    maps = maps[..., picture].unflatten(2, (rows, columns))

    figure, axes = panels(len(shown), 2, 1.8 * len(shown) + 1.7, squeeze=False)
    for line, n in enumerate(shown):
        axes[line, 0].set_ylabel(f'"{words[n]}"', size=14, rotation=0, ha="right", va="center")
        for column, heats in enumerate(maps):
            draw_heat(axes[line, column], heats[line])
    axes[0, 0].set_title("heads trained to point")
    axes[0, 1].set_title("mean of all heads")
    figure.suptitle("Where does the model look when it writes a word?")
    figure.supxlabel(
        "Percent of the attention that writes the word: in the cells, from 5 on;\n"
        "in the corner, of the whole picture. Left: heads 0 and 3 of layer 3,\n"
        "which were trained to point at what a word names (tools/train_tiny.py).\n"
        "Right: all heads of all layers.")

    save(figure, out / "attention.png")
    return dict(words=words, shown=shown, maps=maps)


def draw_heat(axis: plt.Axes, heat: Tensor) -> None:
    """The demo picture under the share of attention that each of its tokens gets, (rows, columns)."""
    rows, columns = heat.shape
    axis.imshow(open_image(DEMO_IMAGE), extent=(0, columns, rows, 0))
    axis.set(xticks=[], yticks=[])
    write(axis, 0.2, 0.25, f"{heat.sum():.0%}", ha="left", va="top", size=13)
    for i, share in enumerate(heat.flatten().tolist()):
        x = i % columns
        y = i // columns
        rectangle(axis, x, y, 1, 1, (BLUE, min(3 * share, 0.9)), lw=0)
        if share >= 0.05:
            write(axis, x + 0.5, y + 0.5, f"{100 * share:.0f}", halo="white")


# ---------------------------------------------------------------------------- boxes

def draw_boxes(out: Path) -> dict:
    """A box as a model would answer it, on the picture it was given and, mapped, on the original."""
    box = (135, 28, 180, 138)
    photo = open_image(PHOTO)
    processor = load_processor(TINY)
    given, _ = seen(processor, photo)
    W, H = photo.size
    w, h = given.size
    mapped = to_original(box, resized=(h, w), original=(H, W))
    mapped = tuple(round(side) for side in mapped)

    # Both pictures on one scale, in inches.
    scale = 6.4 / W
    figure, axis = canvas(7.25, "Which picture do a box's numbers belong to?")
    for picture, top, name, sides, color in (
        (given, 0.55, "spoon", box, BLUE),
        (photo, 2.65, "mapped", mapped, BLUE),
        (photo, 2.65, "not mapped", box, "black"),
    ):
        axis.imshow(picture, extent=(0.1, 0.1 + scale * picture.width, top + scale * picture.height, top))
        x1, y1, x2, y2 = (scale * side for side in sides)
        text = f"{name}: {', '.join(map(str, sides))}"
        outline(axis, (0.1 + x1, top + y1, 0.1 + x2, top + y2), color, text, top + y2 + 0.08, "top")

    text = (f"To the resized one, {w} x {h}: here at\nmost {processor.max_pixels:,} pixels are allowed.\n\n"
            f"On the original, {W} x {H},\nx is {W / w:.3f} times as large,\ny {H / h:.3f} times.")
    axis.text(3.2, 0.65, text, va="top", size=13)
    save(figure, out / "boxes.png")
    return dict(box=box, mapped=mapped)


# ---------------------------------------------------------------------------- the demo video

def draw_demo(out: Path) -> dict:
    """demo.webp: frames of shapes of which one moves, and what can be asked about it."""
    motion = scenes.motion(random.Random(208), 224, 168, frames=8)
    frames = motion.draw()
    frames[0].save(
        out / "demo.webp",
        save_all=True,
        append_images=frames[1:],
        duration=1000 // scenes.FPS,
        loop=0,
        lossless=True,
    )
    asked = scenes.motion_question(motion)
    return dict(frames=frames, question=asked.text, answer=asked.expected)


FIGURES = dict(
    first=draw_first,
    map=draw_map,
    patches=draw_patches,
    windows=draw_windows,
    reach=draw_reach,
    time=draw_time,
    attention=draw_attention,
    boxes=draw_boxes,
    demo=draw_demo,
    graph=draw_graph,
    shares=draw_shares,
    four_bits=draw_four_bits,
)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FIGURES)} (default: all)")
    names = parser.parse_args().names or list(FIGURES)
    for name in names:
        if name not in FIGURES:
            parser.error(f"{name}: no such figure; there are {', '.join(FIGURES)}")
        FIGURES[name](ROOT / "assets")
        print(name, flush=True)


if __name__ == "__main__":
    main()
