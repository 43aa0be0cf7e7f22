"""Draw why decoding replays a graph: assets/graph.png. The times are made up, in proportion.

    python tools/figure_graph.py
"""

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
BLUE = "#0072B2"
ORANGE = "#D55E00"
GRAY = "#BBBBBB"

LAUNCH = 5.0                                            # microseconds of Python for a kernel, about
KERNELS = [1.5, 7.0, 1.5, 2.0, 1.5, 9.0, 1.5, 1.5]      # microseconds on the card: few are long
REPLAY = 6.0                                            # to launch them all

PORTS = [       # name, what the graph does with it, whether the arrow goes in and out
    ("token", "the one that was chosen", True, False),
    ("mask", "pads", True, False),
    ("position, cache.end", "moved on by one", True, True),
    ("cache", "a slot is filled, all are read", True, True),
    ("logits", "overwritten by the next replay", False, True),
]


def one_by_one() -> tuple[list[float], list[float]]:
    """When Python begins to launch each kernel, and when the card begins to run it."""
    launches = [LAUNCH * n for n in range(len(KERNELS))]
    starts = []
    free = 0.0
    for launch, length in zip(launches, KERNELS, strict=True):
        starts.append(max(free, launch + LAUNCH))
        free = starts[-1] + length
    return launches, starts


def replayed() -> list[float]:
    """When the card begins to run each kernel of a graph."""
    return [REPLAY + sum(KERNELS[:n]) for n in range(len(KERNELS))]


def draw_times(axis: Axes) -> float:
    """Both ways over time; gives back when the slower one ends."""
    launches, starts = one_by_one()
    axis.broken_barh([(x, LAUNCH) for x in launches], (3, 0.7), facecolor=ORANGE, edgecolor="white")
    axis.broken_barh(list(zip(starts, KERNELS)), (2.1, 0.7), facecolor=BLUE, edgecolor="white")
    axis.broken_barh([(0, REPLAY)], (0.9, 0.7), facecolor=ORANGE, edgecolor="white")
    axis.broken_barh(list(zip(replayed(), KERNELS)), (0, 0.7), facecolor=BLUE, edgecolor="white")

    axis.text(0, 3.85, "one by one: the card waits for Python")
    axis.text(0, 1.75, "a graph: launched once")
    axis.set_yticks([3.35, 2.45, 1.25, 0.35], ["Python", "card", "Python", "card"])
    axis.set(xticks=[], xlabel="time", ylim=(-0.2, 4.5))
    axis.spines[["top", "right"]].set_visible(False)
    return starts[-1] + KERNELS[-1]


def draw_ports(axis: Axes) -> None:
    """The graph as a box, and what goes in and out."""
    axis.add_patch(plt.Rectangle((1.0, 0), 1.0, 5, facecolor=GRAY))
    axis.text(1.5, 2.5, "kernels\nand\naddresses", ha="center", va="center")
    for row, (name, what, goes_in, goes_out) in enumerate(PORTS):
        y = 4.5 - row
        style = "<->" if goes_in and goes_out else "<-" if goes_in else "->"
        axis.annotate("", (2.6, y), (2.0, y), arrowprops=dict(arrowstyle=style, color=BLUE, lw=2))
        axis.text(2.7, y, f"{name}: {what}", va="center")
    axis.set(xlim=(0.9, 6.2), ylim=(-0.2, 5.2), title="All that a replay knows")
    axis.axis("off")


def draw_graph(path: Path) -> float:
    """How long the kernels take one by one, as a multiple of the graph's time in the figure."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 2.9), width_ratios=(1, 1), layout="constrained")
    slow = draw_times(left)
    draw_ports(right)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)
    return slow / (replayed()[-1] + KERNELS[-1])


if __name__ == "__main__":
    draw_graph(ROOT / "assets" / "graph.png")
