"""Which step of an engine is wrong? Write down what every step returns, and compare two such files.

    python tools/compare.py tiny -o ours.safetensors         # this implementation
    python tools/compare.py tiny --hf -o hf.safetensors      # Hugging Face's, from the same files and picture
    python tools/compare.py ours.safetensors hf.safetensors  # any engine's file, also .npz, with these rows
    python tools/compare.py CASES answers.json               # an engine without tensors: see tools/cases.py

What is asked: --image (repeatable), --video with --fps, --prompt; further --prompts are rows of text alone in
a left-padded batch. All inputs stand in the file, so that an engine can be fed them.

The rows, in the order of the run, for B prompts of T tokens, N patches, G = N / 4 merge groups. Any shape
with the same numbers in the same order will do. Pictures come before videos.

    input_ids, attention_mask       (B, T)          left-padded; the mask * may be left out
    pixel_values, image_grid_thw    (N, 1176), (pictures, 3)
    pixel_values_videos, video_grid_thw             the same of videos
    second_per_grid_ts              (videos,)       * may be left out
    position_ids                    (3, B, T)       time, row, column; anything at pads
    visual.window_order             (G,)            groups, window by window; * may be left out
    visual.patch_embed              (N, width)      in the order of pixel_values
    visual.blocks.I                 (N, width)      in the order of pixel_values, or in window order
    visual.merger                   (G, width)      in reading order (time, row, column), or in window order
    model.layers.I, model.norm      (B, T, width)   or (B, 1, width): of every prompt's last token
    logits                          (B, T, words)   or (B, 1, words)
    decode.I.position_ids           (3, B, 1)       where token number I of the answer sits, I from 1 to 8
    decode.I.logits                 (B, words)      what follows it
    tokens                          (B, n)          the greedy ones, at most 32, best not stopped at an end

With --deep also, queries before keys and tokens before heads:

    visual.blocks.I.attn.rotated            (N, 2, heads, head dim)
    visual.blocks.I.attn.attended           (N, width)      attention before its projection
    inputs_embeds                           (B, T, width)   embeddings with vision tokens in place
    model.layers.I.self_attn.rotated        (B, T, heads + kv heads, head dim)
    model.layers.I.self_attn.attended       (B, T, width)

The header (metadata of safetensors, strings in .npz) says engine, checkpoint, picture and dtype.

Differences are shown twice, of the row's largest value and by their rms, every channel in units of its own;
and of two things: `so far` is ours against theirs, `this step` our step on their previous row. The page for
authors of engines is docs/engines.md.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cases
from rows import INPUTS, NEW_TOKENS, Rows, stage, steps, trace_hf, trace_ours

from load_weights import checkpoint, load_model, load_processor
from model import Qwen2_5_VL
from vision import reorder

ROOT = Path(__file__).resolve().parent.parent
HEADER = ("engine", "checkpoint", "picture", "dtype")
OPTIONAL = ("attention_mask", "second_per_grid_ts", "visual.window_order")

# What rounding may cost: of a row's largest value, and in rms of its channels.
BOUNDS = {"float32": (3e-5, 1e-5), "float16": (2e-2, 1e-2), "bfloat16": (1e-1, 5e-2)}
PIXELS = (1e-6, 1e-6)   # divided by 255, or multiplied by 1/255
EXACT = (0.0, 0.0)
APPROXIMATION = 1e-3    # of the largest: float16 in one step, or the tanh form of GELU, stay below


# ---------------------------------------------------------------------------- comparing

@dataclass
class Row:
    """How one row compares. A pair: of the row's largest value, and in rms of its channels."""
    name: str
    leaves: bool                        # ours and theirs differ by more than rounding
    so_far: tuple[float, float]         # ours against theirs
    step: tuple[float, float] | None    # our step on their previous row, against theirs; None if unknown
    explained: bool                     # the step is the same, up to rounding: the difference is older
    remark: str = ""
    heals: bool = False                 # a later row of the prompt agrees

    @property
    def fails(self) -> bool:
        return self.leaves and not self.explained and not self.heals

    def __str__(self) -> str:
        numbers = [f"{x:8.1e}" for x in self.so_far] + [f"{x:8.1e}" for x in self.step or ()]
        return f"{self.name:34} {' '.join(numbers):36} {self.words()}  {self.remark}".rstrip()

    def words(self) -> str:
        """The verdict."""
        if not self.leaves:
            return ""
        if self.heals:
            return "differs, but what follows agrees"
        if self.explained:
            return "follows from above"
        if self.step is None:
            return "DIFFERS"

        # By itself.
        if 0 < self.step[0] < APPROXIMATION:
            return "ROUNDS MORE, or approximates: float16 in this step, or the tanh form of GELU"
        return "ANOTHER FORMULA"


def per_token(name: str) -> bool:
    """Whether a row is (B, T, ...)."""
    return name.startswith(("input", "model", "logits"))


def fit(name: str, x: Tensor, y: Tensor) -> Tensor | None:
    """Their row in the shape of ours: the same numbers, or those of the last tokens, or fewer tokens."""
    if not x.is_floating_point():
        y = y.long()
    if x.numel() == y.numel():
        return y.reshape(x.shape)
    if per_token(name) and y.numel() == x[:, -1:].numel():
        return y.reshape(x[:, -1:].shape)
    if name == "tokens" and y.numel() and y.numel() % len(x) == 0:
        return y.reshape(len(x), -1)[:, :x.shape[1]]
    return None


def measure(name: str, x: Tensor, y: Tensor, mask: Tensor) -> tuple[float, float]:
    """The difference of their row y from ours, x: of the largest value, and in rms of channels."""
    # What is compared: (rows, channels), without pads, and no more tokens than both have.
    if name == "position_ids":
        x = x.movedim(0, 2)[mask]
        y = y.movedim(0, 2)[mask]
    elif per_token(name):
        mask = mask[:, -y.shape[1]:]
        x = x[:, -y.shape[1]:][mask]
        y = y[mask]
    elif name == "tokens":
        x = x[:, :y.shape[1]]
    x = x.double().flatten(1) if x.ndim > 1 else x.double()[:, None]
    y = y.double().reshape(x.shape)

    # A channel's unit is its rms, because a few channels are giants; with few rows, that of all channels.
    squares = x.pow(2)
    unit = squares.mean(dim=0) if len(x) >= 8 else squares.mean()
    unit = unit.clamp(min=max(1e-2 * squares.median().item(), 1e-30)).sqrt()
    difference = (y - x).abs()
    largest = difference.max() / x.abs().max().clamp(min=1e-30)
    return largest.item(), (difference / unit).pow(2).mean().sqrt().item()


def within(measures: tuple[float, float], bounds: tuple[float, float]) -> bool:
    return measures[0] <= bounds[0] and measures[1] <= bounds[1]        # NaN is not


def in_reading_order(theirs: Rows, ours: Rows) -> tuple[Rows, set[str]]:
    """Their rows with the tower's in reading order, and the names of those that were in window order."""
    order = theirs.get("visual.window_order", ours.get("visual.window_order"))
    moved = set()
    for part in ("visual.blocks", "visual.merger"):
        names = [name for name in theirs if name.startswith(part)]

        # Whichever order is nearer, over all rows.
        apart = [0.0, 0.0]
        turned = {}
        for name in names:
            group = len(theirs[name]) // len(order)
            turned[name] = reorder(theirs[name], order.argsort(), group)
            for i, y in enumerate((theirs[name], turned[name])):
                apart[i] += ((y.double() - ours[name]).norm() / ours[name].double().norm()).item()
        if apart[1] < apart[0]:
            theirs = theirs | turned
            moved |= turned.keys()
    return theirs, moved


def compare(
    ours: Rows,
    theirs: Rows,
    dtype: str = "float32",
    model: Qwen2_5_VL | None = None,
    left_out: Sequence[str] = (),
) -> tuple[list[Row], list[str]]:
    """The rows that both have, in the order of the run, and the names of ours that are missing.

    dtype: the coarser one of both. model: ours, for the column `this step`.
    """
    # Which rows. Decoding may end with their tokens.
    wanted = [name for name in sorted(ours, key=stage)
              if not any(f"{name}.".startswith(f"{part}.") for part in left_out)]
    length = theirs["tokens"].shape[-1] if "tokens" in theirs else NEW_TOKENS
    missing = [name for name in wanted if name not in theirs and name not in OPTIONAL
               and not (name.startswith("decode") and stage(name)[1] >= length)]
    names = [name for name in wanted if name in theirs]

    # In our shape and order.
    mask = ours["attention_mask"].bool()
    fitted = {name: fit(name, ours[name], theirs[name]) for name in names}
    fitted = {name: y.to(ours[name].device) for name, y in fitted.items() if y is not None}
    fitted, turned = in_reading_order(fitted, ours)

    # Our steps, unless it is another question: other ids or grids.
    expected = {}
    asked = [name for name in names if name in INPUTS and not ours[name].is_floating_point()]
    same = all(name in fitted and measure(name, ours[name], fitted[name], mask) == EXACT for name in asked)
    if model is not None and same:
        expected, gap = steps(model, ours, fitted)

    rows = []
    for name in names:
        x = ours[name]
        bounds = EXACT if not x.is_floating_point() else PIXELS if "pixel" in name else BOUNDS[dtype]
        if name not in fitted:
            shapes = f"shapes {tuple(x.shape)} and {tuple(theirs[name].shape)}"
            rows.append(Row(name, True, (torch.inf, torch.inf), None, False, shapes))
            continue

        so_far = measure(name, x, fitted[name], mask)
        row = Row(name, not within(so_far, bounds), so_far, None, False)
        if name in expected:
            row.step = measure(name, expected[name], fitted[name], mask)
            row.explained = within(row.step, bounds)
        if name == "tokens":
            alike = (x[:, :length] == fitted[name]).all(dim=0)
            row.remark = f"{alike.cumprod(dim=0).sum()} of {len(alike)} alike"
            if expected:
                row.step = (gap, gap)
                row.explained = gap <= BOUNDS[dtype][0]
        if name in turned:
            row.remark = "in window order"
        rows.append(row)
    look_around(rows)
    return rows, missing


def look_around(rows: list[Row]) -> None:
    """What can be said of a row only by looking at others."""
    # What is right again further down was only written in another form.
    parts = ("pixel", "visual.p", "visual.b", "visual.m", "inputs_embeds", "model", "logits")
    prompt = [row for row in rows if row.name.startswith(parts)]
    for i, row in enumerate(prompt):
        row.heals = row.leaves and any(not later.leaves for later in prompt[i + 1:])

    # A step of decoding is made by the layers, so it follows from them.
    if any(row.fails and row.name.startswith(("model", "logits")) for row in rows):
        for row in rows:
            row.explained |= row.name.startswith(("decode", "tokens"))


def summary(rows: list[Row], missing: list[str]) -> tuple[list[str], bool]:
    """The last lines, and whether all is well."""
    failing = [row.name for row in rows if row.fails]
    lines = [f"{len(rows)} rows compared"]
    if failing:
        lines.append(f"the first that does not heal: {failing[0]}")
        if any(row.step for row in rows):
            lines.append(f"wrong by themselves: {', '.join(failing)}")
    elif rows and not missing:
        lines.append("no step differs by more than rounding")
    if missing:
        lines.append(f"MISSING: {', '.join(missing)} (leave out by name: --without NAME)")
    return lines, bool(rows) and not failing and not missing


# ---------------------------------------------------------------------------- files and the command line

def load(path: str) -> tuple[dict[str, str], Rows]:
    """Header and rows of a file."""
    try:
        if path.endswith(".npz"):
            arrays = dict(np.load(path, allow_pickle=False))
            header = {name: str(x) for name, x in arrays.items() if x.dtype.kind == "U"}
            return header, {name: torch.from_numpy(x) for name, x in arrays.items() if name not in header}
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:      # both libraries have exceptions of their own
        raise ValueError(f"{path}: no rows in it ({error}); make it with -o") from None


def question(args: Namespace) -> tuple[list, str]:
    """The conversation that the arguments stand for, or a batch of several; and what to call it."""
    images = args.image
    if not (images or args.video or args.text):
        images = [ROOT / "assets" / "demo.png"]
    content = [{"image": str(path)} for path in images]
    names = [Path(path).name for path in images]
    if args.video:
        content.append({"video": args.video, "fps": args.fps})
        names.append(f"{Path(args.video).name} at {args.fps:g} frames a second")

    first, *others = args.prompt or ["Describe the image."]
    messages = [{"role": "user", "content": [*content, {"text": first}]}]
    called = "; ".join([*names, first, *others])
    if not others:
        return messages, called
    return [messages] + [[{"role": "user", "content": prompt}] for prompt in others], called


def write(args: Namespace) -> None:
    """Trace a checkpoint, ours or with Hugging Face's classes, and write the rows down."""
    path = checkpoint(args.what[0])
    messages, called = question(args)
    inputs = load_processor(path)(messages)
    dtype = getattr(torch, args.dtype)
    if args.hf:
        import transformers
        engine = f"transformers {transformers.__version__}"
        rows = trace_hf(path, messages, inputs, dtype, args.deep)
    else:
        engine = "ours"
        rows = trace_ours(load_model(path, "cpu", dtype), inputs, args.deep)

    header = dict(engine=engine, checkpoint=args.what[0], picture=called, dtype=args.dtype)
    save_file({name: x.cpu().clone().contiguous() for name, x in rows.items()}, args.out, header)
    print(f"{len(rows)} rows in {args.out}")


def judge(args: Namespace) -> bool:
    """Compare two files and print what there is to say. Whether all is well."""
    (our_header, ours), (their_header, theirs) = map(load, args.what)
    for name in HEADER:
        values = our_header.get(name, "not said"), their_header.get(name, "not said")
        print(f"{name:12} {values[0]}  |  {values[1]}")
        if name in ("checkpoint", "picture") and name in our_header and name in their_header:
            if Path(values[0]).name != Path(values[1]).name:
                raise ValueError(f"these are two different runs: {name} {values[0]} and {values[1]}")

    # The coarser dtype decides what is rounding; our steps are made in theirs.
    dtypes = [header.get("dtype", "float32") for header in (our_header, their_header)]
    if not set(dtypes) <= BOUNDS.keys():
        raise ValueError(f"dtypes {' and '.join(dtypes)}: a header can say {', '.join(BOUNDS)}")
    coarser = max(dtypes, key=list(BOUNDS).index)
    step_dtype = "bfloat16" if dtypes[1] == "bfloat16" else "float32"
    model = load_model(checkpoint(args.model or our_header.get("checkpoint", "")), "cpu", step_dtype)

    rows, missing = compare(ours, theirs, coarser, model, args.without)
    lines, well = summary(rows, missing)
    print(f"\n{'':34} {'so far':17} {'this step':17}\n{'':34} " + 2 * f"{'largest':>8} {'rms':>8} ")
    print("\n".join([*map(str, rows), "", *lines]))
    return well


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="+", metavar="WHAT", help="a checkpoint's directory or hub id; or what to compare")

    # To write.
    add("-o", "--out", help="the file to write")
    add("--hf", action="store_true", help="trace Hugging Face's model")
    add("--image", action="append", default=[], help="repeatable (default: the demo picture)")
    add("--video", help="a folder of frames, with --fps, or an animation")
    add("--fps", type=float)
    add("--text", action="store_true", help="ask without a picture")
    add("--prompt", action="append", help="repeatable: the second and later ones are a batch's rows of text")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--deep", action="store_true", help="finer points as well")

    # To compare.
    add("--without", nargs="+", default=[], metavar="NAME", help="rows or groups that may be missing")
    add("--model", help="the checkpoint of our steps (default: the one that our file names)")
    args = parser.parse_args(argv)

    try:
        if len(args.what) == 2 and Path(args.what[0]).is_dir():
            return 0 if cases.judge(*map(Path, args.what)) else 1
        if len(args.what) == 2:
            return 0 if judge(args) else 1
        if len(args.what) > 2 or not args.out:
            raise ValueError("give a checkpoint and -o FILE, or two files to compare")
        write(args)
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
