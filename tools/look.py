"""Write a page on which one run can be touched: the picture, the prompt, the answer, and where it looked.

    python tools/look.py --prompt "Locate the red star." -o assets/look.html
    python tools/look.py --image photo.jpg --prompt "What is this?" -o look.html \\
        --model Qwen/Qwen2.5-VL-3B-Instruct --max-pixels 300000

One HTML file, which opens from disk and asks for nothing else. The numbers are made here, tools/look.html
shows them. Read from the top: attention, kept while it happens; the answer's chances; all that the page is
told; the page. What is too much for a page is left out, heads first, and the page names it.

Shapes: B windows or 1, H heads, T queries, S keys.
"""

import base64
import io
import json
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from functools import partial
from html import escape
from pathlib import Path
from typing import NoReturn

import torch
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import explain

from generate import DEMO_IMAGE, DEMO_MODEL, DEMO_PROMPT, UNSHOWN, enough_memory, note, progress, question
from load_weights import checkpoint, load_generation_config, load_model, load_processor
from model import Qwen2_5_VL
from processing import Processor, open_image
from rope import vision_positions
from vision import attention_weights, window_order

TEMPLATE = Path(__file__).with_suffix(".html")
WHOLE = 65535                   # parts that a row of attention adds up to
BUDGET = 16_000_000             # bytes of attention, for the tower and for the decoder
QUERIES = 256                   # patches whose attention is computed at a time
RUNNERS_UP = 5
TRAINED = [(3, 0), (3, 3)]      # layer and head, in tiny/: they were trained to point (tools/train_tiny.py)


# ---------------------------------------------------------------------------- attention

def between_groups(count: int, q: Tensor, k: Tensor) -> Tensor:
    """Attention from merge groups of `count` patches to merge groups, (B, H, T / count, S / count).

    The mean of what the patches of a group take; of the patches that they take it from, the sum.
    """
    rows = []
    for part in q.split(QUERIES, dim=2):
        weights = attention_weights(part.float(), k.float(), None, False)
        rows.append(weights.unflatten(3, (-1, count)).sum(dim=4).unflatten(2, (-1, count)).mean(dim=3))
    return torch.cat(rows, dim=2)


def of_newest(q: Tensor, k: Tensor) -> Tensor:
    """Attention of the newest token, which sees all that there are, (1, H, 1, S)."""
    return attention_weights(q[:, :, -1:].float(), k.float(), None, False)


def watch(modules: list[nn.Module], heads: int, measure: Callable[[Tensor, Tensor], Tensor]) -> list[list]:
    """From now on keep, for each module, what `measure` makes of queries and keys; the mean for one head."""
    def attend(compute, calls, q, k, v, mask, causal):
        weights = measure(q, k)
        calls.append((weights if heads > 1 else weights.mean(dim=1, keepdim=True)).cpu())
        return compute(q, k, v, mask, causal)

    kept = [[] for _ in modules]
    for module, calls in zip(modules, kept):
        module.attend = partial(attend, module.attend, calls)
    return kept


def packed(row: Tensor) -> str:
    """A row (H, keys) of every head as uint16 in base64, in parts of 65535, which each adds up to.

    So it is not the shares that are rounded, but where one ends and the next begins.
    """
    ends = (row.double().cumsum(dim=1) * WHOLE).round()
    parts = ends.diff(dim=1, prepend=torch.zeros(len(row), 1))
    return base64.b64encode(parts.numpy().astype("<u2").tobytes()).decode()


def tower_rows(calls: list[Tensor], inverse: Tensor) -> list[str]:
    """A block's rows, merge groups in reading order: one over its window, or over all if the block sees all.

    calls: weights (windows, H, groups, groups) in window order. Inside a window that is reading order, too.
    """
    rows = []
    for weights in calls:
        whole = weights.shape[3] == len(inverse)
        rows += (weights[..., inverse] if whole else weights).transpose(1, 2).flatten(0, 1)
    return [packed(rows[i]) for i in inverse]


def fitting(name: str, size: int, heads: int, left_out: list[str]) -> int:
    """How many heads of `size` bytes to keep: all, one for their mean, or none. The rest joins `left_out`."""
    if size * heads <= BUDGET:
        return heads
    left_out.append(f"single heads of the {name}" if size <= BUDGET else f"attention in the {name}")
    return int(size <= BUDGET)


# ---------------------------------------------------------------------------- the answer

def chances(logits: Tensor, token: int, text: Callable[[int], str]) -> dict:
    """The probability of a token, and of the likeliest others."""
    probabilities = logits.softmax(dim=-1).double()
    likeliest = probabilities.topk(RUNNERS_UP + 1).indices.tolist()
    others = [i for i in likeliest if i != token][:RUNNERS_UP]
    return {
        "chosen": round(probabilities[token].item(), 6),
        "others": [(text(i), round(probabilities[i].item(), 6)) for i in others],
    }


def answer_tokens(run: explain.Run, penalty: float, text: Callable[[int], str]) -> Iterator[dict]:
    """Each token of the answer, with its chances before and after the repetition penalty."""
    seen = set(run.inputs["input_ids"][0].tolist())
    for token, logits in zip(run.answer, run.logits, strict=True):
        penalized = logits.clone()
        ids = torch.tensor(sorted(seen))
        penalized[ids] = torch.where(logits < 0, logits * penalty, logits / penalty)[ids]
        yield {
            "text": text(token),
            "before": chances(logits, token, text),
            "after": chances(penalized, token, text),
        }
        seen.add(token)


# ---------------------------------------------------------------------------- the page

def look(model: Qwen2_5_VL, processor: Processor, inputs: dict, settings: dict) -> dict:
    """Answer, and return what the page is told. settings: of `generate`, with max_new_tokens."""
    def text(token: int) -> str:
        return processor.tokenizer.decode([token], skip_special_tokens=False)

    # Merge groups and their windows, in reading order.
    config = model.config
    tower = config.vision
    grid = inputs["image_grid_thw"]
    count = tower.spatial_merge_size**2
    order, (layout,) = window_order(grid, tower.spatial_merge_size, tower.window)
    inverse = order.argsort()
    lengths = torch.tensor(layout.lengths) // count
    windows = torch.arange(len(lengths)).repeat_interleave(lengths)[inverse]

    # How much attention fits.
    T = inputs["input_ids"].shape[1]
    new = settings["max_new_tokens"]
    full = [i in tower.fullatt_block_indexes for i in range(tower.depth)]
    left_out = ["where the prompt's tokens look in the decoder"]
    pairs = sum(full) * len(order)**2 + (tower.depth - sum(full)) * int(lengths.square().sum())
    tower_heads = fitting("tower", 2 * pairs, tower.num_heads, left_out)
    slots = config.num_hidden_layers * new * (T + new // 2)
    heads = fitting("decoder", 2 * slots, config.num_attention_heads, left_out)
    if not heads:
        raise ValueError(f"{T} and {new} new tokens are too much for a page; use a smaller --max-pixels or "
                         "--max-new-tokens")

    # The answer, watched.
    blocks = [block.attn for block in model.visual.blocks] if tower_heads else []
    seen = watch(blocks, tower_heads, partial(between_groups, count))
    read = watch([layer.self_attn for layer in model.model.layers], heads, of_newest)
    run = explain.run(model, inputs, settings)
    if len(run.answer) == new:
        left_out.append(f"what follows the first {new} tokens, if anything")

    _, h, w = run.grid
    return {
        "patch": tower.patch_size,
        "merge": tower.spatial_merge_size,
        "window": tower.window,
        "rows": h // tower.spatial_merge_size,
        "columns": w // tower.spatial_merge_size,
        "patches": vision_positions(grid, tower.spatial_merge_size).tolist(),
        "windows": windows.tolist(),
        "places": inverse.tolist(),
        "full": full,
        "first": run.inputs["input_ids"][0].tolist().index(config.image_token_id),
        "prompt": [text(i) for i in run.inputs["input_ids"][0].tolist()],
        "positions": run.positions.T.tolist(),
        "penalty": settings["repetition_penalty"],
        "answer": list(answer_tokens(run, settings["repetition_penalty"], text)),
        "tower_heads": tower_heads,
        "tower": [tower_rows(calls, inverse) for calls in seen],
        "heads": heads,
        "decoder": [[packed(weights[0, :, 0]) for weights in calls] for calls in read],
        "left_out": left_out,
    }


def page(data: dict, picture: Image.Image, **texts: str) -> str:
    """The template, filled. Nothing that a user or a model has written becomes markup."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    values = {name: escape(UNSHOWN.sub("", text)) for name, text in texts.items()}
    values["data"] = json.dumps(data, separators=(",", ":")).replace("<", r"\u003c")
    values["picture"] = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    values["width"], values["height"] = map(str, picture.size)
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))


class Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see python tools/look.py --help")


def run(args) -> None:
    # Ask.
    path = checkpoint(args.model)
    processor = load_processor(path, max_pixels=args.max_pixels)
    image = open_image(args.image)
    prompt = question(args.prompt)
    inputs = processor([{"role": "user", "content": [{"image": image}, {"text": prompt}]}])
    with progress("loading"):
        model = load_model(path)
    with progress("reading and answering"):
        settings = load_generation_config(path) | dict(max_new_tokens=args.max_new_tokens)
        data = look(model, processor, inputs, settings)

    # Show. The picture as the model has seen it.
    side = data["patch"] * data["merge"]
    seen = image.resize((side * data["columns"], side * data["rows"]), Image.Resampling.BICUBIC)
    data["trained"] = TRAINED if path.samefile(DEMO_MODEL) else []
    answer = "".join(token["text"] for token in data["answer"])
    Path(args.out).write_text(page(data, seen, model=Path(args.model).name, question=prompt, answer=answer))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=DEMO_MODEL, help="a directory or hub id (default: tiny/)")
    add("--image", default=DEMO_IMAGE, help="(default: the demo picture)")
    add("--prompt", help=f"(default: {DEMO_PROMPT!r})")
    add("--max-pixels", type=int, metavar="N", help="shrink a larger picture")
    add("--max-new-tokens", type=int, default=128, metavar="N")
    add("-o", "--out", required=True, help="the page to write")
    try:
        with enough_memory("use a smaller --max-pixels"):
            run(parser.parse_args(argv))
        return 0
    except (ValueError, OSError) as error:
        note(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
