"""Walk one question through the model, with this run's numbers: the prompt, the stages, the answer's tokens.

    python tools/explain.py
    python tools/explain.py --video assets/demo.webp --prompt "Which way does the square move?"
    python tools/explain.py --image photo.jpg --prompt "What is this?" --model Qwen/Qwen2.5-VL-3B-Instruct

Steps are numbered as in the README. Size is the root of the mean square of all numbers of a stage.
"""

import os
import sys
import textwrap
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generate import DEMO_IMAGE, DEMO_MODEL, DEMO_PROMPT
from load_weights import checkpoint, load_generation_config, load_model, load_processor
from model import KVCache, Qwen2_5_VL
from processing import Processor, Size, apply_chat_template, open_image, open_video
from sampling import generate
from vision import window_order

WIDTH = 100                                             # columns of the page
KINDS = {0: "text", 1: "picture", 2: "video"}           # of a token, as in mm_token_type_ids


class Run(NamedTuple):
    """What there was while one answer was made."""
    inputs: dict[str, Tensor]
    grid: tuple[int, int, int]      # time, rows, columns in patches
    positions: Tensor               # (3, T)
    following: int                  # position of the answer's first token
    outputs: dict[str, Tensor]      # of a module, by its class, and "spliced"; for the prompt
    answer: list[int]
    logits: list[Tensor]            # (vocab,) float32, from which each token of the answer was chosen


def run(model: Qwen2_5_VL, inputs: dict[str, Tensor], settings: dict) -> Run:
    """Make the answer, and keep what there is on the way."""
    outputs = {}
    logits = []
    compute = model.logits

    # What comes first is the prompt's.
    def keep(module: nn.Module, args: tuple, x: Tensor) -> None:
        outputs.setdefault(type(module).__name__, x)

    def keep_input(module: nn.Module, args: tuple) -> None:
        outputs.setdefault("spliced", args[0])

    def keep_logits(*args, **kwargs) -> Tensor:
        logits.append(compute(*args, **kwargs))
        return logits[-1]

    # Of stacks the last module.
    tower = model.visual
    layers = model.model.layers
    for module in (tower.patch_embed, tower.blocks[-1], tower.merger, layers[-1]):
        module.register_forward_hook(keep)
    layers[0].register_forward_pre_hook(keep_input)
    model.logits = keep_logits
    answer = [ids.item() for ids in generate(model, inputs, graph=False, **settings)]

    # Where everything sits.
    grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs}
    seconds = inputs.get("second_per_grid_ts")
    positions, following = model.positions(inputs["input_ids"], second_per_grid_ts=seconds, **grids)
    (grid,) = grids.values()
    return Run(
        inputs=inputs,
        grid=tuple(grid[0].tolist()),
        positions=positions[:, 0],
        following=following.item(),
        outputs=outputs,
        answer=answer,
        logits=[x[0, -1].float().cpu() for x in logits],
    )


# ---------------------------------------------------------------------------- the prompt

def prompt_lines(messages: list[dict], vision_tokens: int) -> Iterator[str]:
    """The prompt as the tokenizer is given it, the placeholder once."""
    text = ""
    for part in apply_chat_template(messages, add_generation_prompt=True):
        text += part.text
        if part.item is not None:
            text += f" x {vision_tokens} "

    # Each of its lines, with its end written out.
    for line in text.splitlines(keepends=True):
        shown = repr(line)[1:-1]
        yield from textwrap.wrap(shown, WIDTH - 4, initial_indent="    ", subsequent_indent="    ")


# ---------------------------------------------------------------------------- the stages

def row(
    step: object, function: str, shape: object, what: str, weights: str = "", size: str = ""
) -> str:
    """A line of the table. What stands last may take several."""
    left = f"{step:>4}  {function:30} {shape}{weights:>{26 - len(str(shape))}} {size:>6}  "
    lines = textwrap.wrap(what, WIDTH - len(left))
    return left + ("\n" + " " * len(left)).join(lines)


def computed(step: int, function: str, x: Tensor, what: str, module: nn.Module) -> str:
    """A stage that has weights: x is what comes out."""
    weights = sum(p.numel() for p in module.parameters()) / 1e6
    return row(step, function, tuple(x.shape), what, f"{weights:,.2f}M", rms(x))


def rms(x: Tensor) -> str:
    return f"{x.float().square().mean().sqrt():.2f}"


def tower_stages(model: Qwen2_5_VL, run: Run, original: Size) -> Iterator[str]:
    """Pixels become vision tokens."""
    tower = model.visual
    config = tower.config
    merge = config.spatial_merge_size
    outputs = run.outputs
    pixels = run.inputs.get("pixel_values", run.inputs.get("pixel_values_videos"))

    # How the patches are cut into windows.
    t, h, w = run.grid
    order, (layout,) = window_order(torch.tensor([run.grid]), merge, config.window)
    windows = ", ".join(f"{count} of {patches}" for count, patches in layout.runs)
    full = ", ".join(map(str, config.fullatt_block_indexes))

    # Pixels, patches, vision tokens.
    yield row(1, "processing.smart_resize", (h * config.patch_size, w * config.patch_size),
              f"from {original[1]} x {original[0]} pixels")
    yield row(1, "processing.patchify", tuple(pixels.shape), f"{t} x {h} x {w} patches")
    yield row(2, "processing.Processor.normalize", tuple(pixels.shape), "colors around 0", size=rms(pixels))
    yield computed(2, "vision.PatchEmbed", outputs["PatchEmbed"], "a linear map of each", tower.patch_embed)
    yield row(3, "vision.window_order", tuple(order.shape), f"{windows} patches")
    yield row(4, "rope.vision_rotary", (len(pixels), config.head_dim), f"row 0..{h - 1}, column 0..{w - 1}")
    yield computed(4, f"vision.VisionBlock x {config.depth}", outputs["VisionBlock"],
                   f"whole frames in {full}", tower.blocks)
    yield computed(5, "vision.PatchMerger", outputs["PatchMerger"],
                   f"{merge} x {merge} patches to a token", tower.merger)


def decoder_stages(model: Qwen2_5_VL, run: Run) -> Iterator[str]:
    """Tokens become logits."""
    config = model.config
    outputs = run.outputs
    T = run.inputs["input_ids"].shape[1]
    vision = len(outputs["PatchMerger"])
    sections = " + ".join(map(str, config.mrope_section))
    cache = KVCache(config, 1, T, "meta", model.dtype)
    head = model.model.embed_tokens if config.tie_word_embeddings else model.lm_head

    # Embeddings, positions, layers, logits.
    yield computed(5, "model.Qwen2_5_VL.embed", outputs["spliced"], f"{vision} of {T} are vision tokens",
                   model.model.embed_tokens)
    yield row(6, "rope.mrope_positions", (3, 1, T), "time, row, column")
    yield row(6, "rope.mrope_rotary", (1, T, config.head_dim), f"channel pairs: {sections}")
    yield computed(7, f"model.DecoderLayer x {config.num_hidden_layers}", outputs["DecoderLayer"],
                   f"{config.num_attention_heads} heads share {config.num_key_value_heads} keys",
                   model.model.layers)
    yield row(7, "model.KVCache", tuple(cache.k.shape), f"{cache.nbytes // T:,} bytes per token")
    yield computed(8, "model.Qwen2_5_VL.logits", run.logits[0][None], "of the last token", head)


# ---------------------------------------------------------------------------- positions and the answer

def span(numbers: Tensor) -> str:
    first = numbers.min().item()
    last = numbers.max().item()
    return f"{first} to {last}" if last > first else str(first)


def position_lines(run: Run) -> Iterator[str]:
    """Slots and positions of each stretch of text or vision tokens, and of the answer."""
    types = run.inputs["mm_token_type_ids"][0].tolist()
    T = len(types)
    table = torch.cat((torch.arange(T)[None], run.positions))       # slot, time, row, column

    yield f"      {'':12} {'slots':>12} {'time':>12} {'row':>12} {'column':>12}"
    start = 0
    for kind, tokens in groupby(types):
        end = start + len(list(tokens))
        cells = " ".join(f"{span(axis):>12}" for axis in table[:, start:end])
        yield f"      {KINDS[kind]:12} {cells}"
        start = end
    yield f"      {'the answer':12} {f'from {T}':>12}" + f" {f'from {run.following}':>12}" * 3


def answer_lines(run: Run, processor: Processor) -> Iterator[str]:
    """Each token of the answer: where it goes, how likely it was, and the likeliest other one."""
    def shown(token: int) -> str:
        return repr(processor.tokenizer.decode([token], skip_special_tokens=False))

    slot = run.inputs["input_ids"].shape[1]
    yield f"{'slot':>10} {'position':>9}  {'token':24} {'probability':>11}   runner-up"
    for n, (token, logits) in enumerate(zip(run.answer, run.logits, strict=True)):
        probabilities = logits.softmax(dim=-1)
        others = logits.clone()
        others[token] = -torch.inf
        second = others.argmax().item()

        yield (f"{slot + n:10} {run.following + n:9}  "
               f"{shown(token):24} {probabilities[token]:11.2%}   "
               f"{shown(second):24} {probabilities[second]:6.2%}")


# ---------------------------------------------------------------------------- the page

def page(model: Qwen2_5_VL, processor: Processor, item: dict, prompt: str, settings: dict) -> Iterator[str]:
    """All lines, for a picture or a video and a question about it."""
    messages = [{"role": "user", "content": [item, {"type": "text", "text": prompt}]}]
    this = run(model, processor(messages), settings)
    yield "The prompt"
    yield from prompt_lines(messages, len(this.outputs["PatchMerger"]))

    yield "\nWhat becomes of it"
    yield row("step", "function", "shape", "in this run", "weights", "rms")
    yield from tower_stages(model, this, original_size(item))
    yield from decoder_stages(model, this)

    yield "\nWhere its tokens are"
    yield from position_lines(this)

    yield "\nThe answer, token by token; the last one is not read again, and needs no slot"
    yield from answer_lines(this, processor)


def original_size(item: dict) -> Size:
    """Height and width of a picture, or of a video's frames."""
    if item["type"] == "image":
        picture = open_image(item["image"])
    else:
        frames, _, _ = open_video(item["video"], item["fps"])
        picture = next(iter(frames))
    return picture.height, picture.width


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=DEMO_MODEL, help="a directory or hub id (default: tiny/)")
    add("--image", default=DEMO_IMAGE, help="(default: the demo picture)")
    add("--video", help="instead: a folder of frames (with --fps) or an animated file")
    add("--fps", type=float)
    add("--prompt", default=DEMO_PROMPT)
    args = parser.parse_args(argv)

    item = {"type": "image", "image": args.image}
    if args.video is not None:
        item = {"type": "video", "video": args.video, "fps": args.fps}
    try:
        if args.fps is not None and args.video is None:
            raise ValueError("--fps without --video; give --video, or leave --fps out")
        path = checkpoint(args.model)
        processor = load_processor(path)
        model = load_model(path)
        for line in page(model, processor, item, args.prompt, load_generation_config(path)):
            print(line)
        sys.stdout.flush()
        return 0

    except BrokenPipeError:     # the reader has seen enough, as in `explain.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0

    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
