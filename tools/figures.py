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
from drawing import BLUE, COLORS, GRAY, GREEN, ORANGE, cell, outline, rectangle, save, show, tag, write
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
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))

    # What the model answers.
    show(left, picture, GROUP, title="What is where? The answers of tiny/", xlabel="pixels")
    for box, label in boxes:
        outline(left, box, BLUE)
        tag(left, box[0], box[1] - 3.5, label, BLUE)

    # What it sees: patches, and over the first of each merge group the whole of it.
    show(right, given, GROUP, xlabel="thin lines: patches; numbers: tokens; colors: windows",
         title=f"What does the model see? {len(patches)} patches, {windows.numel()} tokens")
    for i, (y, x) in enumerate(patches.tolist()):
        rectangle(right, x, y, SIDE, SIDE, edgecolor="black", lw=0.5)
        if i % MERGE**2 == 0:
            window = windows[y // GROUP, x // GROUP]
            color = (COLORS[window % len(COLORS)], 0.35)
            rectangle(right, x, y, GROUP, GROUP, color, edgecolor="black", lw=1.8)
            write(right, x + SIDE, y + SIDE, i // MERGE**2, halo="white")

    save(figure, out / "first.png")
    return dict(boxes=boxes, windows=windows)


# ---------------------------------------------------------------------------- the map

# Step of the README, name, what becomes of it there; column and row in the figure.
PLACES = [
    ("1", "picture", "resized, cut into patches", 0, 0),
    ("2", "pixel_values", "a row for each patch", 1, 0),
    ("3, 4", "tower", "blocks, most in windows", 2, 0),
    ("5", "vision tokens", "four patches become one", 3, 0),
    ("5", "input_ids", "prompt with placeholders", 0, 1),
    ("6", "position_ids", "time, row, column", 1, 1),
    ("7", "layers", "causal, with a cache", 2, 1),
    ("5", "x", "embeddings, spliced", 3, 1),
    ("8", "logits", "the next token is chosen", 2, 2),
]
ARROWS = [      # from the middle of a side to the middle of a side
    ((0.86, 0.39), (1, 0.39)),
    ((1.86, 0.39), (2, 0.39)),
    ((2.86, 0.39), (3, 0.39)),
    ((3.43, 0.78), (3.43, 1.15)),
    ((0.86, 1.54), (1, 1.54)),
    ((1.86, 1.54), (2, 1.54)),
    ((3, 1.54), (2.86, 1.54)),
    ((2.43, 1.93), (2.43, 2.3)),
]
ARROW = dict(arrowstyle="-|>", color="black", lw=1.6, shrinkA=2, shrinkB=2)
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
        "tower": (patches, tower.hidden_size),
        "vision tokens": (tokens, tower.out_hidden_size),
        "input_ids": (1, T),
        "position_ids": (3, 1, T),
        "layers": (1, T, config.hidden_size),
        "x": (1, T, config.hidden_size),
        "logits": (1, config.vocab_size),
    }


def draw_map(out: Path) -> dict:
    """The way from pixels and words to logits, with the shapes of the demo and of a larger run."""
    # The demo.
    small = load_config(TINY)
    inputs = load_processor(TINY)(question(DEMO_IMAGE))
    _, h, w = inputs["image_grid_thw"][0].tolist()
    words = (inputs["mm_token_type_ids"] == 0).sum().item()

    # The 7B and a picture of 448 x 672; to its tokenizer the same prompt has as many words.
    large = replace(small, **SIZES_7B, vision=replace(small.vision, **TOWER_7B))
    shapes = dict(
        tiny=shapes_of(small, h * SIDE, w * SIDE, words),
        large=shapes_of(large, 448, 672, words),
    )

    figure, axis = plt.subplots(figsize=(11, 6.9))
    for place in PLACES:
        name = place[1]
        draw_place(axis, *place, shapes["tiny"][name], shapes["large"][name])
    for start, end in ARROWS:
        axis.annotate("", end, start, arrowprops=ARROW)

    # Two roads with corners: words go straight to x, and a new token back to the start.
    road(axis, [(0.43, 1.15), (0.43, 1), (3.2, 1), (3.2, 1.15)], "-")
    road(axis, [(2, 2.69), (0.43, 2.69), (0.43, 1.93)], "--")
    axis.text(1.9, 0.97, "the words, embedded", ha="center", va="bottom", size=13)
    axis.text(1.22, 2.66, "again and again: the new token alone", ha="center", va="bottom", size=13)

    axis.set_title("What becomes of a picture and a question?", size=16)
    axis.set(xlim=(-0.01, 3.87), ylim=(3.09, -0.02), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    save(figure, out / "map.png")
    return shapes


def draw_place(
    axis: plt.Axes,
    step: str,
    name: str,
    what: str,
    column: int,
    row: int,
    small: tuple[int, ...],
    large: tuple[int, ...],
) -> None:
    """A box of the map, with the shapes of the small run and of the large one."""
    x = column
    y = 1.15 * row
    color = BLUE if row == 0 else ORANGE
    rectangle(axis, x, y, 0.86, 0.78, (color, 0.15), edgecolor=color, lw=1.5)

    left = x + 0.04
    indent = 0.12 if len(step) == 1 else 0.26
    axis.text(left, y + 0.06, step, va="top", size=18, weight="bold", color=color)
    axis.text(left + indent, y + 0.085, name, va="top", size=15, family="monospace")
    axis.text(left, y + 0.28, what, va="top", size=12.5)
    axis.text(left, y + 0.43, str(small), va="top", size=15)
    axis.text(left, y + 0.60, str(large), va="top", size=15, color="#444444")


def road(axis: plt.Axes, corners: list[tuple[float, float]], style: str) -> None:
    """A line through all corners, with an arrow at its end."""
    axis.plot(*zip(*corners[:-1]), color="black", lw=1.6, ls=style)
    axis.annotate("", corners[-1], corners[-2], arrowprops=ARROW)


# ---------------------------------------------------------------------------- patches and windows

def draw_patches(out: Path, tokens: int = 6) -> dict:
    """A photo with the row of pixel_values in which each of its patches is stored, and the first rows."""
    processor = load_processor(TINY, max_pixels=20_000)
    picture, patches = seen(processor, open_image(PHOTO))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.1), width_ratios=(12, 4.2))

    # The photo, with the numbers of its patches and lines around its merge groups.
    show(left, picture, GROUP, title="In which order are patches stored?", xlabel="pixels")
    for i, (y, x) in enumerate(patches.tolist()):
        rectangle(left, x, y, SIDE, SIDE, lw=0.5)
        write(left, x + SIDE / 2, y + SIDE / 2, i, ink="white", halo="black")
        if i % MERGE**2 == 0:
            rectangle(left, x, y, GROUP, GROUP, lw=2)

    # The patches of the first tokens, a token a line.
    for i, (y, x) in enumerate(patches[:tokens * MERGE**2].tolist()):
        token, place = divmod(i, MERGE**2)
        patch = picture.crop((x, y, x + SIDE, y + SIDE))
        right.imshow(patch, extent=(place, place + 1, token + 0.75, token))
        rectangle(right, place, token, 1, 0.75, lw=2)
        write(right, place + 0.5, token + 0.375, i, ink="white", halo="black")
    right.set(title="The first rows of pixel_values", aspect="auto")
    right.set(xlim=(0, MERGE**2), ylim=(tokens - 0.25, 0), xticks=[])
    right.set_yticks([token + 0.37 for token in range(tokens)])
    right.set_yticklabels([f"token {token}" for token in range(tokens)])
    right.spines[:].set_visible(False)

    save(figure, out / "patches.png")
    return dict(patches=patches, picture=picture)


def draw_windows(out: Path, rows: int = 5, columns: int = 9) -> dict:
    """Which merge groups attend to each other, and the order in which that makes them neighbors."""
    windows, order = windows_of(rows, columns)
    colors = [(COLORS[window], 0.6) for window in windows.flatten().tolist()]
    depth = SHARED_VISION["depth"]
    full = SHARED_VISION["fullatt_block_indexes"]
    figure, (frame, before, after, blocks) = plt.subplots(4, figsize=(11, 6.8), height_ratios=(6, 1, 1, 1))

    # Every merge group three times: in the frame, in reading order, as stored.
    for place, i in enumerate(order.tolist()):
        cell(frame, i % columns, i // columns, i, colors[i])
        cell(before, i, 0, i, colors[i])
        cell(after, place, 0, i, colors[i])
    frame.set(title="Which merge groups see each other? Those of a window: 4 x 4, fewer at the edges",
              xlabel="column", ylabel="row", aspect="equal")
    frame.set(xlim=(0, columns), ylim=(rows, 0))
    before.set(title="Before: reading order, as the processor stores them", xlim=(0, len(order)), yticks=[])
    after.set(title="After: whole windows, the right edge, the bottom edge, the corner",
              xlim=(0, len(order)), xlabel="place", yticks=[])

    for block in range(depth):
        cell(blocks, block, 0, block, ORANGE if block in full else GRAY)
    blocks.set(title=f"Which blocks look further? {len(full)} of {depth} see whole frames",
               xlim=(0, depth), xlabel="block", yticks=[])

    save(figure, out / "windows.png")
    return dict(windows=windows, order=order, full=full)


def draw_reach(out: Path, group: int = 9) -> dict:
    """How far a change of one merge group of the demo has spread: in the tower, and in the decoder."""
    model = load_model(TINY, "cpu", "float32")       # bfloat16 would round small changes away
    inputs = load_processor(TINY)(question(DEMO_IMAGE))
    _, rows, columns = (inputs["image_grid_thw"][0] // MERGE).tolist()
    reached = [*reach_in_tower(model, inputs, group), reach_in_decoder(model, inputs, group)]

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8))
    titles = ("Tower, block 0: its window", "Tower, block 1: everything", "Decoder: what comes later")
    for axis, moved, title in zip(axes, reached, titles, strict=True):
        for i, here in enumerate(moved.tolist()):
            color = ORANGE if i == group else BLUE if here else "#EEEEEE"
            cell(axis, i % columns, i // columns, i, color, ink="white" if here else "black")
        axis.set_title(title, size=13)
        axis.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[], aspect="equal")
        axis.spines[:].set_visible(False)

    figure.suptitle("How far does a change reach?", size=15)
    what = f"Orange: merge group {group}, which was changed. Blue: groups whose numbers changed with it."
    figure.supxlabel(what, size=13)
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


# ---------------------------------------------------------------------------- positions

def draw_positions(out: Path) -> dict:
    """A prompt with a small picture, token by token: its positions, its slots in the cache."""
    model = load_model(TINY)
    processor = load_processor(TINY, min_pixels=1, max_pixels=5000)
    inputs = processor(question(PHOTO))
    positions, following = model.positions(inputs["input_ids"], image_grid_thw=inputs["image_grid_thw"])

    # Every token's name and its three positions, and those of the answer's first.
    names = []
    for i in inputs["input_ids"][0].tolist():
        text = processor.tokenizer.decode([i], skip_special_tokens=False)
        names.append(repr(text).strip("' "))
    names.append("(the answer)")
    table = positions[:, 0].T.tolist()
    table.append([following.item()] * 3)

    picture = inputs["mm_token_type_ids"][0].nonzero()[:, 0].tolist()       # its slots
    first = picture[0] - 3                                                  # slot that is drawn
    start = table[picture[0]][0]
    resumed = table[picture[-1] + 1][0]

    # A column for each token. The largest position of the picture and the one after it stand out.
    figure, axis = plt.subplots(figsize=(11, 4.7))
    for slot in range(first, len(table)):
        rectangle(axis, slot, 0, 1, 3.05, "white", edgecolor=GRAY)
        axis.text(slot + 0.3, 0.2, names[slot], rotation=90, va="bottom")
        for row, value in enumerate(table[slot]):
            color = (COLORS[row], 0.7 if slot in picture else 0.3)
            edge = {}
            if value in (resumed - 1, resumed):
                edge = dict(edgecolor="black", lw=2, zorder=2)
            cell(axis, slot, -1.2 - row, value, color, **edge)
        cell(axis, slot, -4.6, slot, (GRAY, 0.6))

    axis.set(title="At which position is each token?", xticks=[])
    axis.set(xlim=(first, len(table)), ylim=(-4.65, 3.1), yticks=[1.5, -0.7, -1.7, -2.7, -4.1])
    axis.set_yticklabels(["token", "time", "row", "column", "cache slot"])
    axis.set_xlabel(
        f"The picture: {len(picture)} slots, positions {start} to {resumed - 1}. Text resumes one above: "
        f"{resumed}.\nThe answer begins in slot {len(table) - 1} at position {following.item()}.")
    axis.spines[:].set_visible(False)

    save(figure, out / "positions.png")
    return dict(positions=positions[:, 0], following=following.item())


VIDEOS = [      # frames per second, seconds, merge groups across
    (1, 6, 1),
    (2, 6, 1),
    (4, 6, 1),
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
    figure, axis = plt.subplots(figsize=(11, 7))
    numbers = {}
    ticks = {}
    top = 0.0
    for fps, seconds, columns in VIDEOS:
        *tokens, text = video_positions(seconds * fps // pair, columns, pair / fps)
        times = sorted({time for time, _, _ in tokens})
        what = f"{fps} fps" if columns == 1 else f"{columns} groups wide, {fps} fps"
        numbers[what] = dict(times=times, text=text[0])

        # The frames where they are in time, and under them the pairs where they are in positions.
        for frame in range(seconds * fps):
            color = (COLORS[5 + frame // pair % 2], 0.5)
            x = frame / fps * rate
            rectangle(axis, x, top, rate / fps, 0.6, color)
            write(axis, x + rate / fps / 2, top + 0.3, frame)
        for i, time in enumerate(times):
            cell(axis, time, top + 0.7, f"pair {i}\nat {time}", COLORS[5 + i % 2])
        ticks[top + 0.3] = f"{what}: frames"
        ticks[top + 1.2] = "pairs and text"

        # Of a wide video the columns as well.
        last = top + 0.7
        if columns > 1:
            last = top + 1.8
            for column in range(columns):
                cell(axis, column, last, f"column\nat {column}", (GREEN, 0.5))
            ticks[top + 1.2] = "pairs"
            ticks[last + 0.5] = "columns and text"
        cell(axis, text[0], last, f"text\nat {text[0]}", GRAY)
        top = last + 1.4

    axis.secondary_xaxis("top", functions=(lambda x: x / rate, lambda x: x * rate)).set_xlabel("seconds")
    axis.set(title=f"When is a frame, in positions? At the time of the first of its pair, {rate} a second",
             xlabel="position, from the start of the video. Text resumes at one more than the largest:\n"
                    "mostly that is the last pair's time, in a short wide video its last column")
    axis.set(xlim=(0, 13.2), ylim=(top - 0.2, -0.2), xticks=range(14))
    axis.set_yticks(list(ticks), list(ticks.values()))

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

    figure, axes = plt.subplots(2, len(shown), figsize=(11, 5.8), squeeze=False)
    for line, title in enumerate(("heads trained to point", "mean of all heads")):
        axes[line, 0].set_ylabel(title)
        for column, n in enumerate(shown):
            draw_heat(axes[line, column], maps[line, column], words[n])
    figure.suptitle("Where does tiny/ read when it writes a word?")
    figure.supxlabel(
        "Percent of the attention that writes a word, from 5 on. Top: heads 0 and 3 of layer 3, which were\n"
        "trained to point at what a word names (tools/train_tiny.py). Bottom: all heads of all layers.")

    save(figure, out / "attention.png")
    return dict(words=words, shown=shown, maps=maps)


def draw_heat(axis: plt.Axes, heat: Tensor, word: str) -> None:
    """The demo picture under the share of attention that each of its tokens gets, (rows, columns)."""
    rows, columns = heat.shape
    axis.imshow(open_image(DEMO_IMAGE), extent=(0, columns, rows, 0))
    axis.set(title=word, xticks=[], yticks=[], xlabel=f"{heat.sum():.0%} in the picture")
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
    given, _ = seen(load_processor(TINY), photo)
    W, H = photo.size
    w, h = given.size
    mapped = to_original(box, resized=(h, w), original=(H, W))
    mapped = tuple(round(side) for side in mapped)

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.9), width_ratios=(3, 2))
    show(left, photo, 50, title=f"In which pixels are boxes? The original: {W} x {H}",
         xlabel=f"times {W} / {w} = {W / w:.3f} in x, times {H} / {h} = {H / h:.3f} in y")
    show(right, given, GROUP, title=f"A box as answered: resized to {w} x {h}", xlabel="pixels")

    for axis, name, sides, color in (
        (left, "spoon", mapped, BLUE),
        (left, "not mapped", box, "black"),
        (right, "spoon", box, BLUE),
    ):
        x1, _, _, y2 = sides
        outline(axis, sides, color)
        tag(axis, x1 + 1, y2 + 5, f"{name}\n{', '.join(map(str, sides))}", color, va="top")

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
    positions=draw_positions,
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
