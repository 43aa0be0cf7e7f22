"""Which side is wrong, and from where on? Write down what every layer returns, and compare two such files.

    python tools/compare.py tiny -o ours.safetensors         # this implementation
    python tools/compare.py tiny --hf -o hf.safetensors      # Hugging Face's, from the same files and picture
    python tools/compare.py ours.safetensors hf.safetensors  # the first row that leaves is where to look

Another engine's dump counts too, also as .npz, if it uses these names, which are the checkpoint's:

    pixel_values, image_grid_thw, input_ids, position_ids  what the model is given; positions (3, 1, T)
    visual.patch_embed, visual.blocks.N                    (patches, width), rows in the order of pixel_values
    visual.merger                                          (tokens, width), in reading order
    model.layers.N, model.norm, logits                     (1, T, width)
    tokens                                                 the 32 greedy ones
"""

import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load_weights import checkpoint, load_model, load_processor, published_name
from processing import open_image
from sampling import generate
from vision import window_order

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("pixel_values", "image_grid_thw", "input_ids", "position_ids", "visual.patch_embed", "visual.blocks",
         "visual.merger", "model.layers", "model.norm", "logits", "tokens")
EXACT = (*NAMES[:4], "tokens")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}     # of the largest value of a row
NEW_TOKENS = 32


def stage(name: str) -> tuple[int, int]:
    """Where a name stands in the run."""
    base, number = re.fullmatch(r"(.*?)(?:\.(\d+))?", name).groups()
    return NAMES.index(base) if base in NAMES else len(NAMES), int(number or 0)


def record(
    model: nn.Module, inputs: dict, position_ids: Tensor, order: Tensor, run: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """What the model is given and what every named module returns while `run` runs, window order undone."""
    trace = {name: inputs[name] for name in NAMES[:3]} | dict(position_ids=position_ids)
    hooks = [
        module.register_forward_hook(lambda module, args, out, name=name: trace.update({name: out}))
        for live, module in model.named_modules() if stage(name := published_name(live))[0] < len(NAMES)]
    trace["logits"] = run()
    for hook in hooks:
        hook.remove()
    for name in trace:
        if name.startswith(("visual.blocks", "visual.merger")):
            trace[name] = trace[name].unflatten(0, (len(order), -1))[order.argsort()].flatten(0, 1)
    return trace


def trace_ours(path: Path, messages: list[dict], dtype: torch.dtype) -> dict[str, Tensor]:
    model, inputs = load_model(path, dtype=dtype), load_processor(path)(messages)
    config, grid = model.config.vision, inputs["image_grid_thw"]
    order, _ = window_order(grid, config.spatial_merge_size, config.window)
    positions, _ = model.positions(inputs["input_ids"], image_grid_thw=grid)
    trace = record(model, inputs, positions, order, lambda: model(**inputs))
    return trace | dict(tokens=torch.cat(list(generate(model, inputs, NEW_TOKENS))))


def trace_hf(path: Path, messages: list[dict], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same from Hugging Face's model, with its own inputs."""
    from hugging_face import hf_inputs
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.vision_utils import get_vision_window_index
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)
    inputs, config = hf_inputs(path, messages), model.config.vision_config
    ids, grid = inputs["input_ids"], inputs["image_grid_thw"]
    order, _ = get_vision_window_index(grid, config.spatial_merge_size, config.window_size, config.patch_size)
    positions, _ = model.model.get_rope_index(ids, inputs["mm_token_type_ids"], image_grid_thw=grid)
    trace = record(model, inputs, positions, order, lambda: model(**inputs, use_cache=False).logits)
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.0,
                            eos_token_id=None, pad_token_id=0)
    return trace | dict(tokens=tokens[0, ids.shape[1]:])


def load(path: str) -> dict[str, Tensor]:
    try:
        if path.endswith(".npz"):
            return {name: torch.from_numpy(x) for name, x in np.load(path, allow_pickle=False).items()}
        return load_file(path)
    except Exception as error:      # both libraries have exceptions of their own
        raise ValueError(f"{path}: not a trace ({error}); make it with -o") from None


def compare(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[list[str], str | None]:
    """A line per row, and the name of the first row that leaves: that differs by more than rounding."""
    lines, first = [f"{'':24} {'largest':>10} {'relative':>10}"], None
    for name in sorted(a.keys() | b.keys(), key=stage):
        if name not in a or name not in b:
            lines.append(f"{name:24} only in the {'first' if name in a else 'second'}")
            continue
        x, y = a[name], b[name]
        same = x.shape == y.shape
        largest = (x.double() - y.double()).abs().max().item() if same else float("inf")
        relative = largest / max(y.double().abs().max().item(), 1e-30)
        tolerance = 0.0 if name in EXACT else max(TOLERANCE.get(z.dtype, 1e-5) for z in (x, y))
        leaves = not relative <= tolerance
        remark = "  <-- leaves" * leaves + ("" if same else f"  shapes {tuple(x.shape)} and {tuple(y.shape)}")
        lines.append(f"{name:24} {largest:10.2e} {relative:10.2e}{remark}")
        first = first or (name if leaves else None)
    return lines, first


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="+", metavar="WHAT", help="a checkpoint's directory or hub id, or two files to compare")
    add("-o", "--out", help="the file to write")
    add("--hf", action="store_true", help="trace Hugging Face's model")
    add("--image", default=str(ROOT / "assets" / "demo.png"))
    add("--prompt", default="Describe the image.")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args(argv)
    try:
        if len(args.what) == 2:
            lines, first = compare(*map(load, args.what))
            print("\n".join(lines))
            print(f"the first row that leaves: {first}" if first else "no row leaves")
            return 1 if first else 0
        if len(args.what) != 1 or not args.out:
            raise ValueError("give a checkpoint and -o FILE, or two files to compare")
        picture = {"type": "image", "image": open_image(args.image)}
        messages = [{"role": "user", "content": [picture, {"type": "text", "text": args.prompt}]}]
        dtype = getattr(torch, args.dtype)
        trace = (trace_hf if args.hf else trace_ours)(checkpoint(args.what[0]), messages, dtype)
        save_file({name: tensor.contiguous() for name, tensor in trace.items()}, args.out)
        print(f"{len(trace)} rows in {args.out}")
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
