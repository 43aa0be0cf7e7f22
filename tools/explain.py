"""Walk one question through the model, with this run's numbers.

    python tools/explain.py
    python tools/explain.py --image photo.jpg --prompt "What is this?" --model Qwen/Qwen2.5-VL-3B-Instruct
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from load_weights import checkpoint, load_model, load_processor
from model import KVCache, Qwen2_5_VL
from processing import Processor, open_image
from vision import Layout, window_order


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def attention_flops(layout: Layout, width: int) -> int:
    """q k^T and weights v, 2 x 2 operations per pair of patches and channel, inside every window."""
    return 4 * width * layout.frames * sum(windows * patches**2 for windows, patches in layout.runs)


def sizes(model: Qwen2_5_VL, inputs: dict[str, Tensor], layout: Layout) -> list[str]:
    """Picture or video, prompt and cache in numbers. layout: how a windowed block cuts the patches."""
    patch = model.config.vision.patch_size
    grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    t, h, w = next(grid[0].tolist() for grid in grids.values() if grid is not None)
    windows = ", ".join(f"{count} of {patches} patches" for count, patches in layout.runs)

    # Positions, wherever text or vision tokens begin or end.
    types = inputs["mm_token_type_ids"][0].tolist()
    T = len(types)
    positions, following = model.positions(
        inputs["input_ids"], **grids, second_per_grid_ts=inputs.get("second_per_grid_ts"))
    places = []
    for i in range(T):
        if i in (0, T - 1) or types[i - 1] != types[i] or types[i] != types[i + 1]:
            places.append(f"token {i} at {tuple(positions[:, 0, i].tolist())}")

    bytes_per_token = KVCache(model.config, 1, 1, "meta", torch.bfloat16).nbytes
    return [
        f"resized: {w * patch} x {h * patch} pixels",
        f"grid: {t} x {h} x {w} patches (time, rows, columns), {T - types.count(0)} tokens; "
        f"windows in each frame: {windows}",
        f"prompt: {T} tokens, {T - types.count(0)} of them from pictures and videos",
        f"positions (time, row, column): {', '.join(places)}",
        f"answer: begins in cache slot {T}, at position {following.item()}; in bfloat16 the cache takes "
        f"{bytes_per_token:,} bytes per token, {bytes_per_token * T:,} for the prompt",
    ]


def row(stage: str, shape: tuple[int, ...], what: str, count: int = 0, flops: int = 0) -> str:
    return f"{stage:20} {shape!s:>18}  {what:38} {count:15,} {flops / 1e9:9.3f}"


def stages(model: Qwen2_5_VL, inputs: dict[str, Tensor], layout: Layout) -> list[str]:
    """A table of the stages: the shape of what comes out, parameters, operations."""
    config = model.config
    tower = config.vision
    merge = tower.spatial_merge_size
    T = inputs["input_ids"].shape[1]
    C = config.hidden_size
    N = sum(layout.lengths)

    patch_embed = parameters(model.visual.patch_embed)
    blocks = parameters(model.visual.blocks)
    merger = parameters(model.visual.merger)
    embed = parameters(model.model.embed_tokens)
    layers = parameters(model.model.layers)
    head = embed if config.tie_word_embeddings else parameters(model.lm_head)

    # A weight multiplies and adds once per row of x. Attention comes on top: in the tower every patch sees
    # its whole window or frame, in the decoder a token sees half of the prompt on average.
    full_blocks = len(tower.fullatt_block_indexes)
    full = Layout(layout.frames, [(1, N // layout.frames)])
    tower_attention = (full_blocks * attention_flops(full, tower.hidden_size)
                       + (tower.depth - full_blocks) * attention_flops(layout, tower.hidden_size))
    decoder_attention = 2 * config.num_hidden_layers * T * T * C

    return [
        f"{'stage':20} {'shape':>18}  {'what it is':38} {'parameters':>15} {'GFLOP':>9}",
        row("pixel_values", (N, patch_embed // tower.hidden_size), "patches, merge group by merge group"),
        row("patch_embed", (N, tower.hidden_size), "a linear map of each", patch_embed, 2 * N * patch_embed),
        row(f"{tower.depth} blocks, {full_blocks} full", (N, tower.hidden_size),
            "attention in windows, in whole frames", blocks, 2 * N * blocks + tower_attention),
        row("merger", (N // merge**2, C), f"{merge} x {merge} patches become a token", merger,
            2 * N // merge**2 * merger),
        row("embed", (1, T, C), "vision tokens at their placeholders", embed),
        row(f"{config.num_hidden_layers} layers", (1, T, C), "the decoder", layers,
            2 * T * layers + decoder_attention),
        row("head", (1, 1, config.vocab_size), "logits of the last token", head, 2 * head),
    ]


def likeliest(model: Qwen2_5_VL, inputs: dict[str, Tensor], processor: Processor) -> str:
    """The five likeliest first tokens of the answer."""
    with torch.inference_mode():
        probabilities = model(**inputs)[0, -1].float().softmax(dim=-1)
    best = probabilities.topk(5)

    tokens = []
    for p, i in zip(best.values.tolist(), best.indices.tolist()):
        text = processor.tokenizer.decode([i], skip_special_tokens=False)
        tokens.append(f"{text!r} {100 * p:.1f} %")
    return f"first token: {', '.join(tokens)}"


def journey(model: Qwen2_5_VL, inputs: dict[str, Tensor], processor: Processor) -> list[str]:
    """What happens to a picture or video and the prompt on the way to the first token, a line each."""
    tower = model.config.vision
    grid = inputs["image_grid_thw"] if "image_grid_thw" in inputs else inputs["video_grid_thw"]
    _, (layout,) = window_order(grid, tower.spatial_merge_size, tower.window)
    table = stages(model, inputs, layout)
    return [*sizes(model, inputs, layout), "", *table, "", likeliest(model, inputs, processor)]


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=ROOT / "tiny", help="a directory or hub id (default: tiny/)")
    add("--image", default=ROOT / "assets" / "demo.png", help="(default: the demo picture)")
    add("--video", help="instead: a folder of frames (with --fps) or an animated file")
    add("--fps", type=float)
    add("--prompt", default="Describe the image.")
    args = parser.parse_args(argv)

    try:
        path = checkpoint(args.model)
        if args.video is None:
            item = {"type": "image", "image": open_image(args.image)}
            print(f"original: {item['image'].width} x {item['image'].height} pixels")
        else:
            item = {"type": "video", "video": args.video, "fps": args.fps}

        processor = load_processor(path)
        model = load_model(path)
        inputs = processor([{"role": "user", "content": [item, {"type": "text", "text": args.prompt}]}])
        print("\n".join(journey(model, inputs, processor)), flush=True)
        return 0

    except BrokenPipeError:     # the reader has seen enough, as in `explain.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0

    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
