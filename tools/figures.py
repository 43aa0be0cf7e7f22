"""Draw the README's figures with the project's own functions, so that they can't come to tell something else.
Each answers the question that is its title; the function that draws it returns the numbers in it.

    python tools/figures.py windows time    # these two, into assets/; without names all of them
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.patheffects import withStroke
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from boxes import locate, read_boxes
from scenes import COLORS as COLOR_WORDS

from generate import DEMO_IMAGE, DEMO_PROMPT, generate
from load_weights import SHARED_VISION, load_generation_config, load_model
from model import Qwen2_5_VL
from processing import Processor, load_processor, open_image, smart_resize, to_original
from rope import mrope_positions, vision_positions
from vision import attention_weights, repeat_heads, window_order

TINY, PHOTO = ROOT / "tiny", ROOT / "assets" / "photo.jpg"
SIDE, MERGE = SHARED_VISION["patch_size"], SHARED_VISION["spatial_merge_size"]
GROUP = SIDE * MERGE        # pixels a side of a merge group
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"      # told apart by every eye
COLORS = [BLUE, ORANGE, GREEN, "#F0E442", "#CC79A7", "#56B4E9", "#E69F00", "#999999"]
plt.rcParams.update({"font.size": 11, "figure.labelsize": 11})


def save(figure: plt.Figure, path: Path, **numbers) -> dict:
    """1210 pixels wide, in 128 colours, because photos would take megabytes. Gives the numbers back."""
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    return numbers


def cell(axis: plt.Axes, x: float, y: float, text: object, color: object, width: float = 1, height: float = 1,
         ink: str = "black", halo: str | None = None, **style) -> None:
    """A box with a text in its middle. color: of the ground, with its opacity; halo: around the letters."""
    axis.add_patch(plt.Rectangle((x, y), width, height, facecolor=color, **{"edgecolor": "white", **style}))
    axis.text(x + width / 2, y + height / 2, text, color=ink, ha="center", va="center",
              path_effects=[withStroke(linewidth=2.5, foreground=halo)] if halo else None)


def show(axis: plt.Axes, picture: Image.Image, tick: int, **labels: str) -> None:
    """A picture on axes in pixels."""
    axis.imshow(picture, extent=(0, picture.width, picture.height, 0))
    axis.set(xticks=range(0, picture.width + 1, tick), yticks=range(0, picture.height + 1, tick), **labels)


def seen(processor: Processor, picture: Image.Image) -> tuple[Image.Image, torch.Tensor]:
    """The picture as the model is given it, and y and x (N, 2) in it of each row of pixel_values."""
    h, w = smart_resize(picture.height, picture.width, GROUP, processor.min_pixels, processor.max_pixels)
    places = vision_positions(torch.tensor([[1, h // SIDE, w // SIDE]]), MERGE)
    return picture.resize((w, h), Image.Resampling.BICUBIC), places * SIDE


def windows_of(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The window of every merge group (rows, columns), numbered as stored, and the order they are stored."""
    grid = torch.tensor([[1, rows, columns]])
    order, (layout,) = window_order(grid, merge_size=1, window=SHARED_VISION["window_size"] // GROUP)
    sizes = torch.tensor([size for windows, size in layout.runs for _ in range(windows)])
    return torch.arange(len(sizes)).repeat_interleave(sizes)[order.argsort()].view(rows, columns), order


def draw_first(out: Path) -> dict:
    """The demo picture with the boxes that tiny/ finds, and the same as the model sees it."""
    model, processor, picture = load_model(TINY), load_processor(TINY), open_image(DEMO_IMAGE)
    ask = lambda prompt: locate(model, processor, picture, prompt, **load_generation_config(TINY))
    (described, resized), original = ask(DEMO_PROMPT), (picture.height, picture.width)
    names = dict.fromkeys(name.split(" ", 1)[-1] for name in described.rstrip(".").split(", "))
    boxes = [(to_original(box, resized, original), label) for name in names
             for box, label in read_boxes(ask(f"Locate the {name}.")[0])]
    (given, patches), (windows, _) = seen(processor, picture), windows_of(*(n // GROUP for n in resized))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    show(left, picture, GROUP, title="What is where? The answers of tiny/", xlabel="pixels")
    show(right, given, GROUP, xlabel="thin lines: patches; numbers: tokens; colours: windows",
         title=f"What does the model see? {len(patches)} patches, {windows.numel()} tokens")
    for (x1, y1, x2, y2), label in boxes:
        cell(left, x1, y1, "", "none", x2 - x1, y2 - y1, edgecolor=BLUE, lw=2.5)
        left.text(x1, y1 - 3.5, label, color="white", bbox=dict(facecolor=BLUE, lw=0, pad=2))
    for i, (y, x) in enumerate(patches.tolist()):
        cell(right, x, y, "", "none", SIDE, SIDE, edgecolor="black", lw=0.5)
        if i % MERGE**2 == 0:
            color = (COLORS[windows[y // GROUP, x // GROUP] % len(COLORS)], 0.35)
            cell(right, x, y, i // MERGE**2, color, GROUP, GROUP, halo="white", edgecolor="black", lw=1.8)
    return save(figure, out / "first.png", boxes=boxes, windows=windows)


def draw_patches(out: Path) -> dict:
    """A photo with the row of pixel_values in which each of its patches is stored, and the first rows."""
    picture, patches = seen(load_processor(TINY, max_pixels=20_000), open_image(PHOTO))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.1), width_ratios=(12, 4.2))
    show(left, picture, GROUP, title="In which order are patches stored?", xlabel="pixels")
    for i, (y, x) in enumerate(patches.tolist()):
        token, at = divmod(i, MERGE**2)
        cell(left, x, y, i, "none", SIDE, SIDE, ink="white", halo="black", lw=0.5)
        if at == 0:
            cell(left, x, y, "", "none", GROUP, GROUP, lw=2)
        if token < 6:
            right.imshow(picture.crop((x, y, x + SIDE, y + SIDE)), extent=(at, at + 1, token + 0.75, token))
            cell(right, at, token, i, "none", 1, 0.75, ink="white", halo="black", lw=2)
    right.set(title="The first rows of pixel_values", xlim=(0, 4), ylim=(5.75, 0), xticks=[], aspect="auto",
              yticks=[n + 0.37 for n in range(6)], yticklabels=[f"token {n}" for n in range(6)])
    right.spines[:].set_visible(False)
    return save(figure, out / "patches.png", patches=patches, picture=picture)


def draw_windows(out: Path, rows: int = 5, columns: int = 9) -> dict:
    """Which merge groups attend to each other, and the order in which that makes them neighbours."""
    windows, order = windows_of(rows, columns)
    depth, full = SHARED_VISION["depth"], SHARED_VISION["fullatt_block_indexes"]
    colors = [(COLORS[window], 0.6) for window in windows.flatten().tolist()]
    figure, axes = plt.subplots(4, figsize=(11, 6.8), height_ratios=(6, 1, 1, 1))
    for place, i in enumerate(order.tolist()):
        cell(axes[0], i % columns, i // columns, i, colors[i])
        cell(axes[1], i, 0, i, colors[i])
        cell(axes[2], place, 0, i, colors[i])
    for block in range(depth):
        cell(axes[3], block, 0, block, ORANGE if block in full else GREY)
    axes[0].set(title="Which merge groups see each other? Those of a window: 4 x 4, fewer at the edges",
                xlim=(0, columns), ylim=(rows, 0), xlabel="column", ylabel="row", aspect="equal")
    axes[1].set(title="Before: reading order, as the processor stores them", xlim=(0, len(order)), yticks=[])
    axes[2].set(title="After: whole windows, the right edge, the bottom edge, the corner", xlabel="place",
                xlim=(0, len(order)), yticks=[])
    axes[3].set(title=f"Which blocks look further? {len(full)} of {depth} see whole frames", xlabel="block",
                xlim=(0, depth), yticks=[])
    return save(figure, out / "windows.png", windows=windows, order=order, full=full)


def draw_positions(out: Path) -> dict:
    """A prompt with a small picture, token by token: its positions, its slots in the cache."""
    model, processor = load_model(TINY), load_processor(TINY, min_pixels=1, max_pixels=5000)
    inputs = processor([{"role": "user", "content": [{"image": PHOTO}, {"text": DEMO_PROMPT}]}])
    positions, following = model.positions(inputs["input_ids"], image_grid_thw=inputs["image_grid_thw"])
    table = torch.cat((positions[:, 0], following.expand(3, 1)), dim=1).T.tolist()      # and of the answer
    decode = lambda i: repr(processor.tokenizer.decode([i], skip_special_tokens=False)).strip("' ")
    names = [*map(decode, inputs["input_ids"][0].tolist()), "(the answer)"]
    slots = (inputs["mm_token_type_ids"][0] == 1).nonzero()[:, 0].tolist()
    start, resumed = table[slots[0]][0], table[slots[-1] + 1][0]
    figure, axis = plt.subplots(figsize=(11, 4.7))
    for slot in range(slots[0] - 3, len(table)):
        cell(axis, slot, 0, "", "white", height=3.05, edgecolor=GREY)
        cell(axis, slot, -4.6, slot, (GREY, 0.6))
        axis.text(slot + 0.3, 0.2, names[slot], rotation=90, va="bottom")
        for row, (value, color) in enumerate(zip(table[slot], COLORS)):
            edge = dict(edgecolor="black", lw=2, zorder=2) if value in (resumed - 1, resumed) else {}
            cell(axis, slot, -1.2 - row, value, (color, 0.7 if slot in slots else 0.3), **edge)
    axis.set(title="At which position is each token?", xlim=(slots[0] - 3, len(table)), ylim=(-4.65, 3.1),
             xticks=[], yticks=[1.5, -0.7, -1.7, -2.7, -4.1],
             yticklabels=["token", "time", "row", "column", "cache slot"],
             xlabel=f"The picture: {len(slots)} slots, positions {start} to {resumed - 1}. Text resumes one "
             f"above: {resumed}.\nThe answer begins in slot {len(table) - 1} at position {following.item()}.")
    axis.spines[:].set_visible(False)
    return save(figure, out / "positions.png", positions=positions[:, 0], following=following.item())


def draw_time(out: Path, seconds: int = 6) -> dict:
    """The same seconds of video at three frame rates: frames, time positions of their pairs, text after."""
    rate, pair, numbers = SHARED_VISION["tokens_per_second"], SHARED_VISION["temporal_patch_size"], {}
    figure, axis = plt.subplots(figsize=(11, 5))
    for lane, fps in zip((0, 3, 6), (1, 2, 4)):
        n = seconds * fps // pair       # tokens of a video that is one merge group high and wide; then text
        ids, video = torch.tensor([[1] * n + [0]]), dict(video_token_id=1, second_per_grid_ts=[pair / fps])
        positions, _ = mrope_positions(ids, **video, video_grid_thw=torch.tensor([[n, MERGE, MERGE]]),
                                       image_token_id=2, merge_size=MERGE, tokens_per_second=rate)
        numbers[f"{fps} fps"] = times = positions[0, 0].tolist()
        for i in range(seconds * fps):
            cell(axis, i / fps * rate, lane, i, (COLORS[5 + i // pair % 2], 0.5), rate / fps, 0.9)
        for i, at in enumerate(times):
            cell(axis, at, lane + 1, at if i < n else f"text {at}", COLORS[5 + i % 2] if i < n else GREY)
    axis.secondary_xaxis("top", functions=(lambda x: x / rate, lambda x: x * rate)).set_xlabel("seconds")
    axis.set(title=f"When is a frame, in positions? At the time of the first of its pair, {rate} a second",
             xlim=(0, seconds * rate + 2), ylim=(8.2, -0.2), xticks=range(0, seconds * rate + 3),
             yticks=[0.45, 1.5, 3.45, 4.5, 6.45, 7.5],
             yticklabels=[f"{name}, {what}" for name in numbers for what in ("frames", "pairs")],
             xlabel="time position, from the start of the video; text resumes at one more than the largest")
    return save(figure, out / "time.png", **numbers)


def weights_of(model: Qwen2_5_VL, inputs: dict, answer: torch.Tensor) -> torch.Tensor:
    """The decoder's attention (layers, heads, answer, tokens) from what wrote each token of an answer."""
    kept = []

    def attend(q, k, v, mask):
        kept.append(attention_weights(q, k, mask))
        return kept[-1] @ repeat_heads(v, q.shape[1])

    for layer in model.model.layers:
        layer.self_attn.attend = attend
    ids = torch.cat((inputs["input_ids"], answer[None]), dim=1)
    model.float()(ids, pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    return torch.cat(kept)[:, :, -1 - len(answer):-1]       # of the tokens one ahead


def draw_attention(out: Path) -> dict:
    """Where tiny/ reads when it writes some words of its answer: with two heads, and with all of them."""
    model, processor = load_model(TINY, "cpu"), load_processor(TINY)
    inputs = processor([{"role": "user", "content": [{"image": DEMO_IMAGE}, {"text": DEMO_PROMPT}]}])
    answer = torch.cat(list(generate(model, inputs, **load_generation_config(TINY))))
    weights, words = weights_of(model, inputs, answer), [processor.decode([i]).strip() for i in answer]
    shown = ([n for n, word in enumerate(words) if word in COLOR_WORDS] or [*range(len(words))])[:4]
    # In the fourth layer two heads are trained to look at the thing that a token of the answer speaks of.
    maps = torch.stack((weights[3, [0, 3]].mean(0), weights.mean((0, 1))))[:, shown]
    sink, (_, rows, columns) = weights[..., 0].mean().item(), (inputs["image_grid_thw"][0] // MERGE).tolist()
    maps = maps[..., inputs["mm_token_type_ids"][0].nonzero()[:, 0]].unflatten(2, (rows, columns))
    figure, axes = plt.subplots(2, len(shown), figsize=(11, 5.8), squeeze=False)
    for axis, heat, n in zip(axes.flat, maps.flatten(0, 1), 2 * shown):
        axis.imshow(open_image(DEMO_IMAGE), extent=(0, columns, rows, 0))
        axis.set(title=words[n], xticks=[], yticks=[], xlabel=f"{heat.sum():.0%} in the picture")
        for i, share in enumerate(heat.flatten().tolist()):
            text, color = f"{100 * share:.0f}" if share >= 0.05 else "", (BLUE, min(3 * share, 0.9))
            cell(axis, i % columns, i // columns, text, color, halo="white", lw=0)
    axes[0, 0].set_ylabel("layer 3, heads 0 and 3")
    axes[1, 0].set_ylabel("all layers and heads")
    figure.suptitle("Where does tiny/ read when it writes a word?")
    figure.supxlabel("Per cent of the attention that writes the word, from 5 on: where it is, not what for.\n"
                     f"Large models sink the rest into a prompt's first token; here that gets {sink:.0%}.")
    return save(figure, out / "attention.png", words=words, shown=shown, maps=maps, sink=sink)


def draw_boxes(out: Path) -> dict:
    """A box as a model would answer it, on the picture it was given and, mapped, on the original."""
    photo, box = open_image(PHOTO), (135, 28, 180, 138)
    given, _ = seen(load_processor(TINY), photo)
    (W, H), (w, h) = photo.size, given.size
    mapped = tuple(map(round, to_original(box, resized=(h, w), original=(H, W))))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.9), width_ratios=(3, 2))
    show(left, photo, 50, title=f"In which pixels are boxes? The original: {W} x {H}",
         xlabel=f"times {W} / {w} = {W / w:.3f} in x, times {H} / {h} = {H / h:.3f} in y")
    show(right, given, 28, title=f"A box as answered: resized to {w} x {h}", xlabel="pixels")
    for axis, name, (x1, y1, x2, y2), color in (
        (left, "spoon", mapped, BLUE), (left, "not mapped", box, "black"), (right, "spoon", box, BLUE),
    ):
        cell(axis, x1, y1, "", "none", x2 - x1, y2 - y1, edgecolor=color, lw=2.5)
        axis.text(x1 + 1, y2 + 5, f"{name}\n{x1}, {y1}, {x2}, {y2}", va="top", color="white",
                  bbox=dict(facecolor=color, lw=0, pad=2))
    return save(figure, out / "boxes.png", box=box, mapped=mapped)


FIGURES = dict(first=draw_first, patches=draw_patches, windows=draw_windows, positions=draw_positions,
               time=draw_time, attention=draw_attention, boxes=draw_boxes)

if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FIGURES)} (default: all)")
    for name in parser.parse_args().names or FIGURES:
        if name not in FIGURES:
            parser.error(f"{name}: no such figure; there are {', '.join(FIGURES)}")
        FIGURES[name](ROOT / "assets")
        print(f"assets/{name}.png", flush=True)
