"""What figures are made of: their width, colors, boxes, texts and pictures, and how they are saved.

`figures.py`, `figures_cards.py` and `figures_graph.py` draw with it.
"""

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.patheffects import withStroke
from PIL import Image

from processing import Box

# GitHub shows a figure 358 pixels wide on a phone: 11.5 points are 8.7 of them.
WIDTH = 6.6             # inches
PIXELS = 1210
SMALLEST = 11.5         # points

# Told apart by every eye.
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
GRAY = "#BBBBBB"
PALE = "#EEEEEE"
COLORS = [BLUE, ORANGE, GREEN, "#F0E442", "#CC79A7", "#56B4E9", "#E69F00", "#999999"]
plt.rcParams.update({
    "font.size": 12,
    "xtick.labelsize": SMALLEST,
    "ytick.labelsize": SMALLEST,
    "axes.titlesize": 14,
    "figure.titlesize": 15,
    "figure.labelsize": 12,
    "figure.dpi": PIXELS / WIDTH,
})

Color = str | tuple[str, float]     # with its opacity


def canvas(height: float, title: str) -> tuple[plt.Figure, plt.Axes]:
    """An empty figure with a title, in inches from its upper left corner."""
    figure = plt.figure(figsize=(WIDTH, height))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axis.axis("off")
    axis.text(WIDTH / 2, 0.27, title, ha="center", va="center", size=15)
    return figure, axis


def panels(rows: int, columns: int, height: float, **style) -> tuple[plt.Figure, plt.Axes]:
    """A figure of panels."""
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), layout="compressed", **style)
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    return figure, axes


def save(figure: plt.Figure, path: Path) -> None:
    """1210 pixels wide, in 128 colors, because photos would take megabytes."""
    figure.savefig(path, facecolor="white")
    check_texts(figure)
    plt.close(figure)
    picture = Image.open(path).convert("RGB")
    picture = picture.quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)


def check_texts(figure: plt.Figure) -> None:
    """AssertionError for a text too small to be read on a phone, and for what reaches out of the figure."""
    for text in figure.findobj(plt.Text):
        size = text.get_fontsize()
        assert size >= SMALLEST or not text.get_text(), f"{text.get_text()!r} has {size} points"

    width, height = figure.get_size_inches()
    drawn = figure.get_tightbbox()
    assert drawn.xmin >= 0 and drawn.xmax <= width, f"from {drawn.xmin} to {drawn.xmax} of {width} inches"
    assert drawn.ymin >= 0 and drawn.ymax <= height, f"from {drawn.ymin} to {drawn.ymax} of {height} inches"


def rectangle(
    axis: plt.Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    color: Color = "none",
    **edge,
) -> None:
    edge = {"edgecolor": "white"} | edge
    patch = plt.Rectangle((x, y), width, height, facecolor=color, **edge)
    axis.add_patch(patch)


def write(
    axis: plt.Axes, x: float, y: float, text: object, ink: str = "black", halo: str | None = None, **style
) -> None:
    """A text with its middle at (x, y), each letter with a halo."""
    effects = [withStroke(linewidth=2.5, foreground=halo)] if halo else None
    place = dict(ha="center", va="center")
    axis.text(x, y, text, color=ink, path_effects=effects, **place | style)


def cell(
    axis: plt.Axes,
    x: float,
    y: float,
    text: object,
    color: Color,
    width: float = 1,
    height: float = 1,
    ink: str = "black",
) -> None:
    """A box of a diagram."""
    rectangle(axis, x, y, width, height, color)
    write(axis, x + width / 2, y + height / 2, text, ink)


def outline(axis: plt.Axes, box: Box, color: str, label: str, y: float, va: str) -> None:
    """A box of an answer, and over or under its middle at y its label, white on the same color."""
    x1, y1, x2, y2 = box
    rectangle(axis, x1, y1, x2 - x1, y2 - y1, edgecolor=color, lw=2.5)
    plate = dict(facecolor=color, lw=0, pad=2)
    write(axis, (x1 + x2) / 2, y, label, "white", va=va, size=SMALLEST, bbox=plate)


def show(axis: plt.Axes, picture: Image.Image, **labels: str) -> None:
    """A picture in pixels, without numbers on its axes."""
    w, h = picture.size
    axis.imshow(picture, extent=(0, w, h, 0))
    axis.set(xticks=[], yticks=[], **labels)
