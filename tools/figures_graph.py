"""Why decoding replays a graph, for figures.py. The times are made up, in proportion."""

from pathlib import Path

from drawing import BLUE, GRAY, ORANGE, panels, rectangle, save, write
from matplotlib import pyplot as plt

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


def draw_times(axis: plt.Axes) -> None:
    """Both ways over time."""
    launches, starts = one_by_one()
    draw_spans(axis, 3.3, launches, [LAUNCH] * len(launches), ORANGE)
    draw_spans(axis, 2.5, starts, KERNELS, BLUE)
    draw_spans(axis, 0.8, [0.0], [REPLAY], ORANGE)
    draw_spans(axis, 0, replayed(), KERNELS, BLUE)

    # What they are.
    axis.text(0, 4.15, "one by one: the card waits for Python")
    axis.text(0, 1.65, "a graph: launched once")
    axis.set_yticks([3.65, 2.85, 1.15, 0.35], ["Python", "card", "Python", "card"])
    axis.set(xticks=[], xlabel="time", xlim=(-1, starts[-1] + 3), ylim=(-0.2, 4.6),
             title="Why replay a graph?")
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def draw_spans(axis: plt.Axes, y: float, starts: list[float], lengths: list[float], color: str) -> None:
    for start, length in zip(starts, lengths, strict=True):
        rectangle(axis, start, y, length, 0.7, color)


def draw_ports(axis: plt.Axes) -> None:
    """The graph as a box, and what goes in and out."""
    rectangle(axis, 1, 0, 1, 5, GRAY)
    write(axis, 1.5, 2.5, "kernels\nand\naddresses")

    for row, (name, what, goes_in, goes_out) in enumerate(PORTS):
        y = 4.5 - row
        style = "<->" if goes_in and goes_out else "<-" if goes_in else "->"
        axis.annotate("", (2.6, y), (2.0, y), arrowprops=dict(arrowstyle=style, color=BLUE, lw=2))
        axis.text(2.7, y, f"{name}: {what}", va="center")
    axis.set(xlim=(0.9, 6.2), ylim=(-0.2, 5.2), title="What does a replay read and write?")
    axis.axis("off")


def draw_graph(out: Path) -> dict:
    """Kernels launched one by one and all at once, and what a graph reads and writes."""
    figure, (above, below) = panels(2, 1, 6.2)
    draw_times(above)
    draw_ports(below)

    save(figure, out / "graph.png")
    launches, starts = one_by_one()
    return dict(launches=launches, starts=starts, replayed=replayed())
