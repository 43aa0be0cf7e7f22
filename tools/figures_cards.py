"""Shares of a layer, and a word of four-bit weights: the figures of docs/cards.md, for figures.py."""

from dataclasses import replace
from pathlib import Path

import torch
from drawing import COLORS, WIDTH, canvas, cell, save, write
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
    figure, axis = canvas(4.1, f"Which part of a layer does each of {ranks} ranks have?")
    write(axis, WIDTH / 2, 0.58, "Columns of q, k, v, gate and up; rows of o and down", size=13)
    for y, names, between in (
        (1.15, ("q", "k", "v", "o"), "each rank\nattends with\nits own heads"),
        (2.75, ("gate", "up", "down"), "silu(gate) x up,\nchannel by\nchannel"),
    ):
        # From left to right: what is cut by columns, what happens between, what is cut by rows, the sum.
        x = 0.1
        for name in names:
            if name == names[-1]:
                write(axis, x + 0.65, y + 0.5, f"{between}\n→")
                x += 1.35
            x += 0.15 + draw_matrix(axis, x, y, name, found[name])
        write(axis, x, y + 0.5, "→ all_reduce:\nthe sum of all\nranks' parts", ha="left")

    save(figure, out / "shares.png")
    return found


def draw_matrix(axis: plt.Axes, x: float, y: float, name: str, shared: list[tuple[range, range]]) -> float:
    """A matrix in its ranks' pieces, x @ W, 1.2 inches wide at most. Returns its width."""
    C = BIG["hidden_size"]
    across = max(columns.stop for columns, _ in shared)
    down = max(rows.stop for _, rows in shared)
    width = min(across / C, 1.2)            # an MLP is drawn smaller than it is
    height = min(down / C, 1.2)

    for rank, (columns, rows) in enumerate(shared):
        cell(axis,
             x + columns.start / across * width,
             y + rows.start / down * height,
             rank if len(columns) > C // 16 else "",
             (COLORS[rank], 0.55),
             len(columns) / across * width,
             len(rows) / down * height)
    axis.text(x + width / 2, y - 0.07, name, ha="center", va="bottom", weight="bold")
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

    figure, axis = canvas(4, f"Which eight weights does {WORD:#x} hold?")
    side = 0.8
    for channel, place in enumerate(PLACES):
        color = (COLORS[channel], 0.5)
        x = 0.1 + side * channel

        # In the file: the lowest bits stand right, as one writes numbers.
        stored = 0.1 + side * (7 - place)
        cell(axis, stored, 0.85, f"{WORD >> 4 * place & 15:04b}", color, side, 0.4)
        axis.plot((stored + side / 2, x + side / 2), (1.3, 2.0), color=COLORS[channel], lw=2)

        # In order.
        cell(axis, x, 2.4, numbers[channel], color, side, 0.4)
        cell(axis, x, 3.45, f"{weights[channel]:.2f}", color, side, 0.4)

    for y, text in (
        (0.7, "In the file: four bits each, the lowest at the right"),
        (2.25, "In order: the numbers of output channels 0 to 7"),
        (3.3, f"Minus the zero, {zeros[0]}, times the scale, {scale}: the weights"),
    ):
        axis.text(0.1, y, text, va="center", size=13)
    save(figure, out / "four_bits.png")
    return dict(numbers=numbers, zeros=zeros, weights=weights)
