"""Write a page on which one run can be touched: the picture, the prompt, the answer, and where it looked.

    python tools/look.py --prompt "Locate the red star." -o assets/look.html
    python tools/look.py --image photo.jpg --prompt "What is this?" -o look.html \\
        --model Qwen/Qwen2.5-VL-3B-Instruct --max-pixels 300000

One HTML file, which opens from disk and asks for nothing else. The numbers are made here; tools/look.html
shows them. Read from the top: attention, kept while it happens; the tokens of the answer; what the page is
told; the page. What is too much for a page is left out, heads before their mean, and the page says so.

Shapes: B windows or 1, H heads, T queries, S keys.
"""

import base64
import io
import json
import re
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from functools import partial
from html import escape
from pathlib import Path

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
PARTS = 65535                   # a row of attention adds up to it
BUDGET = 16_000_000             # bytes of attention that are kept, of the tower and of the decoder
QUERIES = 256                   # patches whose attention is computed at a time
RUNNERS_UP = 5
TRAINED = [(3, 0), (3, 3)]      # layer and head, in tiny/: they were trained to point (tools/train_tiny.py)


# ---------------------------------------------------------------------------- attention

def between_groups(size: int, q: Tensor, k: Tensor) -> Tensor:
    """Attention between merge groups of `size` patches, (B, H, T / size, S / size): the mean of what the
    patches of a group take, and the sum over those that they take it from.
    """
    rows = []
    for part in q.split(QUERIES, dim=2):
        weights = attention_weights(part.float(), k.float(), None, False)
        taken = weights.unflatten(3, (-1, size)).sum(dim=4)
        rows.append(taken.unflatten(2, (-1, size)).mean(dim=3))
    return torch.cat(rows, dim=2)


def of_newest(q: Tensor, k: Tensor) -> Tensor:
    """Attention of the newest token, which sees all that there are, (1, H, 1, S)."""
    return attention_weights(q[:, :, -1:].float(), k.float(), None, False)


def watch(modules: list[nn.Module], heads: int, measure: Callable[[Tensor, Tensor], Tensor]) -> list[list]:
    """From now on, for each module, what `measure` makes of its queries and keys; one head is their mean."""
    def attend(compute, calls, q, k, v, mask, causal):
        weights = measure(q, k)
        calls.append((weights if heads > 1 else weights.mean(dim=1, keepdim=True)).cpu())
        return compute(q, k, v, mask, causal)

    kept = [[] for _ in modules]
    for module, calls in zip(modules, kept):
        module.attend = partial(attend, module.attend, calls)
    return kept


def packed(row: Tensor) -> str:
    """A row (H, keys) of every head in parts of 65535, as uint16 in base64.

    What is rounded is where one share ends and the next begins, so that each head's still add up to 65535.
    """
    ends = (row.double().cumsum(dim=1) * PARTS).round()
    parts = ends.diff(dim=1, prepend=torch.zeros(len(row), 1))
    return base64.b64encode(parts.numpy().astype("<u2").tobytes()).decode()


def tower_rows(calls: list[Tensor], inverse: Tensor) -> list[str]:
    """A block's rows, of merge groups in reading order: each over its window, or over all in a full block.

    calls: weights (windows, H, groups, groups), in the tower's order. Inside a window that is reading order.
    """
    rows = []
    for weights in calls:
        whole = weights.shape[3] == len(inverse)
        rows += (weights[..., inverse] if whole else weights).transpose(1, 2).flatten(0, 1)
    return [packed(rows[i]) for i in inverse]


# ---------------------------------------------------------------------------- the answer

def chances(logits: Tensor, token: int, text: Callable[[int], str]) -> dict:
    """The probability of a token, and of the likeliest others."""
    p = logits.softmax(dim=-1)
    likeliest = p.topk(RUNNERS_UP + 1).indices.tolist()
    others = [(text(i), round(p[i].item(), 6)) for i in likeliest if i != token]
    return dict(chosen=round(p[token].item(), 6), others=others[:RUNNERS_UP])


def answer_tokens(run: explain.Run, penalty: float, text: Callable[[int], str]) -> Iterator[dict]:
    """Each token of the answer, with its chances before and after the repetition penalty."""
    seen = run.inputs["input_ids"][0]
    for token, logits in zip(run.answer, run.logits, strict=True):
        after = logits.clone()
        after[seen] = torch.where(logits < 0, logits * penalty, logits / penalty)[seen]
        told = partial(chances, token=token, text=text)
        yield dict(text=text(token), before=told(logits), after=told(after))
        seen = torch.cat((seen, torch.tensor([token])))


# ---------------------------------------------------------------------------- what the page is told

def fitting(name: str, heads: int, nbytes: int, left_out: list[str]) -> int:
    """How many heads of `nbytes` are kept: all, one for their mean, or none. What is not joins `left_out`."""
    kept = heads if heads * nbytes <= BUDGET else int(nbytes <= BUDGET)
    if kept < heads:
        left_out.append(f"heads of the {name}, but for their mean" if kept else f"attention in the {name}")
    return kept


def look(model: Qwen2_5_VL, processor: Processor, inputs: dict[str, Tensor], settings: dict) -> dict:
    """Answer, with the settings of `generate`, and return what the page is told about it.

    Raises ValueError if prompt and answer may become too long for any attention of the decoder.
    """
    # Merge groups and their windows.
    tower = model.config.vision
    merge = tower.spatial_merge_size
    grid = inputs["image_grid_thw"]
    order, (layout,) = window_order(grid, merge, tower.window)
    inverse = order.argsort()
    lengths = [patches // merge**2 for patches in layout.lengths]
    windows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[inverse]

    # How much attention is kept: of every group in every block, of every word in every layer.
    ids = inputs["input_ids"][0].tolist()
    new = settings["max_new_tokens"]
    full = [i in tower.fullatt_block_indexes for i in range(tower.depth)]
    windowed = sum(n * n for n in lengths)
    pairs = sum(len(order)**2 if whole else windowed for whole in full)
    slots = len(model.model.layers) * new * (len(ids) + new // 2)
    left_out = ["where tokens of the prompt look in the decoder"]
    tower_heads = fitting("tower", tower.num_heads, 2 * pairs, left_out)
    heads = fitting("decoder", model.config.num_attention_heads, 2 * slots, left_out)
    if not heads:
        raise ValueError(f"{len(ids)} tokens and {new} new ones are too many for a page; use a smaller "
                         "--max-pixels or --max-new-tokens")

    # From now on it is.
    blocks = model.visual.blocks if tower_heads else []
    seen = watch([block.attn for block in blocks], tower_heads, partial(between_groups, merge**2))
    read = watch([layer.self_attn for layer in model.model.layers], heads, of_newest)

    def say(module: nn.Module, args: tuple) -> None:
        if len(read[0]) % 16 == 0:
            note(f"{len(read[0])} tokens ...")
    model.model.norm.register_forward_pre_hook(say)

    # The answer.
    run = explain.run(model, inputs, settings)
    if len(run.answer) == new:
        left_out.append(f"whatever follows {new} tokens")

    def text(token: int) -> str:
        return processor.tokenizer.decode([token], skip_special_tokens=False)

    penalty = settings["repetition_penalty"]
    _, h, w = run.grid
    return dict(
        rows=h // merge, columns=w // merge, merge=merge, patch=tower.patch_size, window=tower.window,
        patches=vision_positions(grid, merge).tolist(),
        windows=windows.tolist(), places=inverse.tolist(), full=full,
        prompt=list(map(text, ids)), first=ids.index(model.config.image_token_id),
        positions=run.positions.T.tolist(),
        answer=list(answer_tokens(run, penalty, text)), penalty=penalty,
        said=processor.decode(run.answer),
        tower=[tower_rows(calls, inverse) for calls in seen], tower_heads=tower_heads,
        decoder=[[packed(weights[0, :, 0]) for weights in calls] for calls in read], heads=heads,
        left_out=left_out,
    )


# ---------------------------------------------------------------------------- the page

def page(data: dict, picture: Image.Image, **texts: str) -> str:
    """The template, filled. Nothing that a user or a model has written becomes markup."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    values = {name: escape(UNSHOWN.sub("", text)) for name, text in texts.items()}
    values["width"], values["height"] = map(str, picture.size)
    values["picture"] = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    values["data"] = json.dumps(data, separators=(",", ":")).replace("<", r"\u003c")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def run(args: Namespace) -> None:
    # Ask.
    path = checkpoint(args.model)
    processor = load_processor(path, max_pixels=args.max_pixels)
    image = open_image(args.image)
    prompt = question(args.prompt)
    inputs = processor([{"role": "user", "content": [{"image": image}, {"text": prompt}]}])
    settings = load_generation_config(path) | dict(max_new_tokens=args.max_new_tokens)
    with progress("loading"):
        model = load_model(path)
    with progress("reading and answering"):
        data = look(model, processor, inputs, settings)

    # Show, with the picture as the model has seen it.
    side = data["merge"] * data["patch"]
    seen = image.resize((side * data["columns"], side * data["rows"]), Image.Resampling.BICUBIC)
    data["trained"] = TRAINED if path.samefile(DEMO_MODEL) else []
    text = page(data, seen, model=Path(args.model).name, question=prompt, answer=data["said"])
    Path(args.out).write_text(text, encoding="utf-8")


class Parser(ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(f"{message}; see python tools/look.py --help")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=DEMO_MODEL, help="a directory or hub id (default: tiny/)")
    add("--image", default=DEMO_IMAGE, help="(default: the demo picture)")
    add("--prompt", help=f"(default: {DEMO_PROMPT!r})")
    add("--max-pixels", type=int, metavar="N", help="shrink a larger picture; 784 pixels become a token")
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
