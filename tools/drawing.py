"""What figures are made of: their colors, boxes, texts and pictures, and how they are saved.

`figures.py`, `figures_cards.py` and `figures_graph.py` draw with it.
"""

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.patheffects import withStroke
from PIL import Image

from processing import Box

# Told apart by every eye.
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
GRAY = "#BBBBBB"
COLORS = [BLUE, ORANGE, GREEN, "#F0E442", "#CC79A7", "#56B4E9", "#E69F00", "#999999"]
plt.rcParams.update({"font.size": 11, "figure.labelsize": 11})

Color = str | tuple[str, float]     # with its opacity


def save(figure: plt.Figure, path: Path) -> None:
    """1210 pixels wide, in 128 colors, because photos would take megabytes."""
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)
    picture = Image.open(path).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


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
    axis: plt.Axes, x: float, y: float, text: object, ink: str = "black", halo: str | None = None
) -> None:
    """A text with its middle at (x, y), each letter with a halo."""
    effects = [withStroke(linewidth=2.5, foreground=halo)] if halo else None
    place = dict(ha="center", va="center")
    axis.text(x, y, text, color=ink, path_effects=effects, **place)


def cell(
    axis: plt.Axes, x: float, y: float, text: object, color: Color, ink: str = "black", **edge
) -> None:
    """A box of a diagram, 1 x 1."""
    rectangle(axis, x, y, 1, 1, color, **edge)
    write(axis, x + 0.5, y + 0.5, text, ink)


def outline(axis: plt.Axes, box: Box, color: str) -> None:
    """A box of an answer."""
    x1, y1, x2, y2 = box
    rectangle(axis, x1, y1, x2 - x1, y2 - y1, edgecolor=color, lw=2.5)


def tag(axis: plt.Axes, x: float, y: float, text: str, color: str, **style) -> None:
    """White on a color."""
    box = dict(facecolor=color, lw=0, pad=2)
    axis.text(x, y, text, color="white", bbox=box, **style)


def show(axis: plt.Axes, picture: Image.Image, tick: int, **labels: str) -> None:
    """A picture on axes in pixels."""
    w, h = picture.size
    axis.imshow(picture, extent=(0, w, h, 0))
    axis.set_xticks(range(0, w + 1, tick))
    axis.set_yticks(range(0, h + 1, tick))
    axis.set(**labels)
