"""Shares of a layer, and a word of four-bit weights: the figures of docs/cards.md, for figures.py."""

from dataclasses import replace
from pathlib import Path

import torch
from drawing import COLORS, Color, rectangle, save, write
from matplotlib import pyplot as plt
from parallel import Share, cut
from torch import nn

from int4 import PLACES, Int4Linear, unpack
from load_weights import load_config
from model import Qwen2_5_VL

TINY = Path(__file__).parent.parent / "tiny"
BIG = dict(hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, intermediate_size=29568,
           num_hidden_layers=1, mrope_section=(16, 24, 24))      # a layer of the 72B
WORD = 0x9B47D20E
ZEROS = 0x77777777


def box(axis: plt.Axes, x: float, y: float, width: float, height: float, color: Color, text: object) -> None:
    rectangle(axis, x, y, width, height, color)
    write(axis, x + width / 2, y + height / 2, text)


# ---------------------------------------------------------------------------- shares

def pieces(ranks: int) -> dict[str, list[tuple[range, range]]]:
    """Of each matrix of a layer, the columns and rows (as in x @ W) that each rank has."""
    config = load_config(TINY)
    config = replace(config, **BIG, vision=replace(config.vision, out_hidden_size=BIG["hidden_size"]))
    with torch.device("meta"):
        whole = Qwen2_5_VL(config).model.layers[0]
        share = Share(config, ranks).model.layers[0]

    found = {}
    for name, module in whole.named_modules():
        if not isinstance(module, nn.Linear):
            continue

        # Cut the numbers of columns and rows, as long as the weight (N, K) and one wide.
        N, K = share.get_submodule(name).weight.shape
        columns = torch.arange(module.out_features)[:, None]
        rows = torch.arange(module.in_features)[None]
        short = name.split(".")[1].removesuffix("_proj")
        found[short] = [
            (stretch(cut(columns, (N, 1), rank)), stretch(cut(rows, (1, K), rank)))
            for rank in range(ranks)
        ]
    return found


def stretch(numbers: torch.Tensor) -> range:
    return range(numbers.min().item(), numbers.max().item() + 1)


def draw_shares(out: Path, ranks: int = 4) -> dict:
    """Which columns and rows of a layer's matrices a rank has."""
    found = pieces(ranks)
    figure, axes = plt.subplots(2, 1, figsize=(11, 5.2), height_ratios=(1.25, 1.85))
    for axis, names, between in (
        (axes[0], ("q", "k", "v", "o"), "each rank attends\nwith its own heads"),
        (axes[1], ("gate", "up", "down"), "silu(gate) x up,\nchannel by channel"),
    ):
        # From left to right: what is cut by columns, what happens between, what is cut by rows, the sum.
        x = 0.0
        for name in names:
            if name == names[-1]:
                axis.text(x + 0.6, 0.5, f"{between}\n→", ha="center", va="center")
                x += 1.3
            x += 0.15 + draw_matrix(axis, x, name, found[name])
        axis.text(x, 0.5, "→ all_reduce: the sum\n     of all ranks' parts", va="center")

        bottom = 1.65 if axis is axes[1] else 1.05
        axis.set(xlim=(0, 6.4), ylim=(bottom, -0.2), aspect="equal", anchor="W")
        axis.axis("off")

    figure.suptitle(f"Which part of a layer has each of {ranks} ranks? "
                    "Columns of q, k, v, gate, up; rows of o, down")
    save(figure, out / "shares.png")
    return found


def draw_matrix(axis: plt.Axes, x: float, name: str, shared: list[tuple[range, range]]) -> float:
    """A matrix in its ranks' pieces, x @ W, as wide as x at most 1.6 times. Returns its width."""
    C = BIG["hidden_size"]
    across = max(columns.stop for columns, _ in shared)
    down = max(rows.stop for _, rows in shared)
    width = min(across / C, 1.6)            # an MLP is drawn smaller than it is
    height = min(down / C, 1.6)

    for rank, (columns, rows) in enumerate(shared):
        box(axis,
            x + columns.start / across * width,
            rows.start / down * height,
            len(columns) / across * width,
            len(rows) / down * height,
            (COLORS[rank], 0.55),
            rank if len(columns) > C // 16 else "")
    axis.text(x + width / 2, -0.05, name, ha="center", va="bottom", weight="bold")
    return width


# ---------------------------------------------------------------------------- four bits

def signed(word: int) -> int:
    """The same 32 bits as an int32."""
    return word - (word >> 31 << 32)


def draw_four_bits(out: Path, scale: float = 0.01) -> dict:
    """A word of a file, the numbers in it, and the weights that they are."""
    layer = Int4Linear(nn.Linear(128, 8))
    layer.qweight.fill_(signed(WORD))
    layer.qzeros.fill_(signed(ZEROS))
    layer.scales.fill_(scale)

    # Its first row: the weights that lead from input channel 0 to eight output channels.
    numbers = unpack(layer.qweight)[0].tolist()
    zeros = unpack(layer.qzeros)[0].tolist()
    weights = layer.weight()[:, 0].tolist()

    figure, axis = plt.subplots(figsize=(11, 4.4))
    for channel, place in enumerate(PLACES):
        color = (COLORS[channel], 0.5)

        # In the file: the lowest bits stand right, as one writes numbers.
        stored = 7 - place
        bits = f"{WORD >> 4 * place & 15:04b}"
        box(axis, stored, 0, 1, 0.8, color, f"{bits}\nchannel {channel}")
        axis.plot((stored + 0.5, channel + 0.5), (0.84, 1.96), color=COLORS[channel], lw=2)

        # In order.
        box(axis, channel, 2, 1, 0.8, color, numbers[channel])
        box(axis, channel, 3, 1, 0.8, color, f"({numbers[channel]} - {zeros[channel]}) x {scale}")
        box(axis, channel, 4, 1, 0.8, color, f"{weights[channel]:.2f}")

    axis.set(title=f"What does an int32 hold? Eight weights: {WORD:#x}",
             xlim=(0, 8), ylim=(4.85, -0.1), xticks=[], yticks=[0.4, 2.4, 3.4, 4.4],
             yticklabels=["in the file", "numbers", "(number - zero) x scale", "weights"])
    axis.spines[:].set_visible(False)
    save(figure, out / "four_bits.png")
    return dict(numbers=numbers, zeros=zeros, weights=weights)
