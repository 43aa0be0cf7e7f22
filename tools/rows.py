"""What every step of a run returns, as named rows: of our model, of Hugging Face's, and of our steps on the
rows of another engine. `python tools/compare.py --help` lists the rows; that script writes and compares them.

Read from the top: the order of the rows, how a model is watched, the three runs.
"""

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as decoder
import vision as tower
from load_weights import published_name
from model import Qwen2_5_VL
from sampling import generate
from vision import reorder, window_order

INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "pixel_values_videos",
          "video_grid_thw", "second_per_grid_ts")
ORDER = (*INPUTS, "position_ids", "visual.window_order", "visual.patch_embed", "visual.blocks",
         "visual.merger", "inputs_embeds", "model.layers", "model.norm", "logits", "decode", "tokens")
POINTS = ("rotated", "attended", "position_ids", "logits", "")      # of a block, layer or step of decoding
MODULES = r"visual\.patch_embed|visual\.blocks\.\d+|visual\.merger|model\.layers\.\d+|model\.norm"
NEW_TOKENS = 32
DECODE_STEPS = 8

Rows = dict[str, Tensor]


def stage(name: str) -> tuple[int, int, int]:
    """Where a row stands in the run."""
    numbered = re.fullmatch(r"(visual\.blocks|model\.layers|decode)\.(\d+)\.?(.*)", name)
    base, number, point = numbered.groups() if numbered else (name, "0", "")
    point = point.rpartition(".")[2]
    return (ORDER.index(base) if base in ORDER else len(ORDER), int(number),
            POINTS.index(point) if point in POINTS else len(POINTS))


# ---------------------------------------------------------------------------- watching a model

class Watch(ExitStack):
    """While it is open, the rows that a model's modules return, in `rows`, with the window order undone.

    order_of: a grid's window order. rotations: for the finer points, (module, name) of the functions that
    rotate queries and keys. theirs: rows that take the place of ours, so that the next step starts from them.
    T: the tokens of the prompts; what the decoder returns after them is no part of a row.
    """

    def __init__(
        self,
        model: nn.Module,
        T: int,
        order_of: Callable,
        rotations: Sequence[tuple] = (),
        theirs: Rows | None = None,
    ):
        super().__init__()
        self.rows = {}
        self.T = T
        self.order_of = order_of
        self.theirs = theirs or {}
        self.order = None           # of the windows, in the tower at work
        self.attention = None       # the name of the one at work

        early = r"visual|model\.layers\.0|.*attn|.*attn\.(o_)?proj" if rotations else "visual"
        for live, module in model.named_modules():
            name = published_name(live + ".")[:-1]
            if re.fullmatch(early, name):
                before = partial(self.before, name)
                self.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            if re.fullmatch(MODULES, name):
                after = partial(self.after, name)
                self.callback(module.register_forward_hook(after).remove)
        for owner, name in rotations:
            self.enter_context(patch.object(owner, name, partial(self.rotated, getattr(owner, name))))

    def before(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if name == "visual":
            self.order = self.order_of(kwargs["grid_thw"] if "grid_thw" in kwargs else args[1])
        elif name.endswith("attn"):
            self.attention = name
        else:
            row = "inputs_embeds" if name == "model.layers.0" else name.rpartition(".")[0] + ".attended"
            return (self.note(row, args[0]), *args[1:]), kwargs

    def after(self, name: str, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return self.note(name, out)

    def rotated(self, rotate: Callable, *args) -> Tensor | tuple[Tensor, Tensor]:
        """Ours rotates queries and keys in one tensor, Hugging Face's returns a pair."""
        out = rotate(*args)
        name = self.attention + ".rotated"
        if name.startswith("model"):        # heads before tokens
            both = out if torch.is_tensor(out) else torch.cat(out, dim=1)
            noted = self.note(name, both.transpose(1, 2)).transpose(1, 2)
        else:
            noted = self.note(name, out if torch.is_tensor(out) else torch.stack(out, dim=1))
        return noted if torch.is_tensor(out) else out

    def note(self, name: str, x: Tensor) -> Tensor:
        """Keep a row. Returns it, or theirs in its place."""
        if not name.startswith("visual"):
            return self.note_tokens(name, x)

        # Patches. The tower runs twice, for pictures and for videos.
        windowed = name.startswith(("visual.blocks", "visual.merger"))
        if windowed:
            group = len(x) // len(self.order)
            x = reorder(x, self.order.argsort(), group)
        done = len(self.rows.get(name, ()))
        self.rows[name] = torch.cat((self.rows[name], x)) if done else x
        if name in self.theirs:
            x = self.theirs[name][done:done + len(x)].to(x)
        return reorder(x, self.order, group) if windowed else x

    def note_tokens(self, name: str, x: Tensor) -> Tensor:
        row = x[:, :self.T]
        self.rows[name] = row
        if name not in self.theirs:
            return x
        theirs = self.theirs[name].to(x)        # of all tokens of the prompts, or of the last
        return torch.cat((row[:, :self.T - theirs.shape[1]], theirs, x[:, self.T:]), dim=1)


def window_by_window(grids: list[Tensor], merge: int, window: int) -> Tensor:
    """Merge groups window by window, windows in reading order, as most engines keep them."""
    order = []
    start = 0
    for t, h, w in torch.cat(grids).tolist():
        rows = torch.arange(h // merge)[:, None] // window
        columns = torch.arange(w // merge) // window
        numbers = rows * (w // merge) + columns                 # in a frame, growing in reading order
        for _ in range(t):
            order.append(start + numbers.flatten().argsort(stable=True))
            start += numbers.numel()
    return torch.cat(order)


def trace_ours(model: Qwen2_5_VL, inputs: Rows, deep: bool) -> Rows:
    """What our model is given, what its steps return, and how it answers."""
    config = model.config.vision
    rows = {name: inputs[name] for name in INPUTS if name in inputs}
    grids = [inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs]
    if grids:
        rows["visual.window_order"] = window_by_window(grids, config.spatial_merge_size, config.window)
    with our_watch(model, inputs["input_ids"].shape[1], deep) as watch:
        logits = model(**inputs)
    rows |= watch.rows | {"logits": logits}

    # The answer, by the loop that everybody uses: what it asks the decoder, and what it is told.
    calls = []
    ask = model.logits

    def listen(x: Tensor, position_ids: Tensor, *rest, **named) -> Tensor:
        positions = position_ids.clone()        # the loop moves them on in place
        logits = ask(x, position_ids, *rest, **named)
        calls.append((positions, logits[:, -1]))
        return logits

    with patch.object(model, "logits", listen):
        tokens = list(generate(model, inputs, NEW_TOKENS, graph=False))
    rows["position_ids"] = calls[0][0]
    return rows | decoded(calls) | {"tokens": torch.stack(tokens, dim=1)}


def our_watch(model: Qwen2_5_VL, T: int, deep: bool, theirs: Rows | None = None) -> Watch:
    config = model.config.vision

    def order_of(grid: Tensor) -> Tensor:
        return window_order(grid, config.spatial_merge_size, config.window)[0]

    return Watch(model, T, order_of, [(tower, "rotate"), (decoder, "rotate")] if deep else [], theirs)


def decoded(calls: list[tuple[Tensor, Tensor]]) -> Rows:
    """Rows of the first steps of decoding; calls: positions and logits of prompt and steps."""
    rows = {}
    for n, (position_ids, logits) in enumerate(calls[1:DECODE_STEPS + 1], 1):
        rows[f"decode.{n}.position_ids"] = position_ids
        rows[f"decode.{n}.logits"] = logits
    return rows


def trace_hf(path: Path, messages: list, inputs: Rows, dtype: torch.dtype, deep: bool) -> Rows:
    """The same from Hugging Face's model. Its own processor makes the inputs of a question about pictures."""
    from hugging_face import hf_inputs
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
    from transformers.vision_utils import get_vision_window_index

    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)
    config = hf.config.vision_config
    if "image_grid_thw" in inputs and "video_grid_thw" not in inputs and len(inputs["input_ids"]) == 1:
        inputs = hf_inputs(path, messages)
    rows = {name: inputs[name] for name in INPUTS if name in inputs}

    def order_of(grid: Tensor) -> Tensor:
        sizes = (config.spatial_merge_size, config.window_size, config.patch_size)
        return get_vision_window_index(grid, *sizes)[0]

    grids = [inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs]
    if grids:
        rows["visual.window_order"] = order_of(torch.cat(grids))

    # The prompt, then the answer.
    rotations = [(modeling, "apply_rotary_pos_emb_vision"), (modeling, "apply_rotary_pos_emb")]
    T = inputs["input_ids"].shape[1]
    with Watch(hf, T, order_of, rotations if deep else []) as watch:
        logits = hf(**inputs, use_cache=False).logits
    rows |= watch.rows | {"logits": logits}

    positions = []
    hf.model.rope_deltas = None     # left over
    hook = hf.model.language_model.register_forward_pre_hook(
        lambda module, args, named: positions.append(named["position_ids"][-3:].clone()), with_kwargs=True)
    answer = hf.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.0, eos_token_id=None,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    hook.remove()
    rows["position_ids"] = positions[0]
    tokens = answer.sequences[:, T:]
    return rows | decoded(list(zip(positions, answer.logits))) | {"tokens": tokens}


def steps(model: Qwen2_5_VL, ours: Rows, theirs: Rows) -> tuple[Rows, float]:
    """What each of our steps makes of their previous row, or of ours where they have none.

    Also how far, of the largest logit, their worst token is below the one that we would have chosen.
    """
    rows = ours | theirs
    inputs = {name: rows[name] for name in INPUTS if name in rows}
    tokens = rows["tokens"]
    B, T = inputs["input_ids"].shape
    expected = {}

    # Positions: by our rule; while decoding, one after the one before, the first one after the largest.
    given = {name: x for name, x in inputs.items() if not name.startswith("pixel")}
    expected["position_ids"], _ = model.positions(**given)
    positions = [rows["position_ids"]]
    following = positions[0].amax(dim=(0, 2)).expand(3, B)[..., None] + 1
    for n in range(1, tokens.shape[1]):
        name = f"decode.{n}.position_ids"
        expected[name] = following
        positions.append(theirs.get(name, following))
        following = positions[-1] + 1

    # The prompts and all their tokens but the last, in one go. Every step of the prompts starts from theirs.
    new = tokens[:, :-1]
    inputs["input_ids"] = torch.cat((inputs["input_ids"], new), dim=1)
    inputs["attention_mask"] = torch.cat((rows["attention_mask"], torch.ones_like(new)), dim=1)
    deep = any(name.endswith(POINTS[:2]) for name in theirs)
    with our_watch(model, T, deep, theirs) as watch:
        logits = model(**inputs, position_ids=torch.cat(positions, dim=2))
    expected |= watch.rows | {"logits": logits[:, :T]}
    for n in range(1, tokens.shape[1]):
        expected[f"decode.{n}.logits"] = logits[:, T - 1 + n]

    # A token is right if, up to rounding, it is our best one after those before it.
    logits = logits[:, T - 1:]
    chosen = logits.gather(2, tokens[..., None])[..., 0]
    gap = (logits.amax(dim=2) - chosen) / logits.abs().amax(dim=2)
    return expected, gap.max().item()
