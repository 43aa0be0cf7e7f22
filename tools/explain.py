"""Walk one question through the model, with this run's numbers.

    python tools/explain.py
    python tools/explain.py --image photo.jpg --prompt "What is this?" --model Qwen/Qwen2.5-VL-3B-Instruct
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from load_weights import checkpoint, load_model
from model import KVCache, Qwen2_5_VL
from processing import Processor, load_processor, open_image
from vision import Layout, window_order


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def attention_flops(layout: Layout, width: int) -> int:
    """q k^T and weights v, 2 x 2 operations per pair of patches and channel, inside every window."""
    return 4 * width * layout.frames * sum(windows * patches**2 for windows, patches in layout.runs)


def journey(model: Qwen2_5_VL, inputs: dict, processor: Processor) -> list[str]:
    """What happens to a picture or video and the prompt on the way to the first token, a line each."""
    config, tower = model.config, model.config.vision
    merge, width, C = tower.spatial_merge_size, tower.hidden_size, config.hidden_size
    grids = {name: grid for name, grid in inputs.items() if name.endswith("grid_thw")}
    (grid,) = grids.values()
    (t, h, w), = grid.tolist()
    _, (windowed,) = window_order(grid, merge, tower.window_size // (tower.patch_size * merge))
    types, T = inputs["mm_token_type_ids"][0].tolist(), inputs["input_ids"].shape[1]
    positions, following = model.positions(
        inputs["input_ids"], **grids, second_per_grid_ts=inputs.get("second_per_grid_ts"))
    borders = [i for i in range(T) if i in (0, T - 1) or types[i] != types[i - 1] or types[i] != types[i + 1]]
    bytes_per_token = 2 * KVCache(config, 1, 1, "meta", torch.bfloat16).k.nbytes
    lines = [
        f"resized: {w * tower.patch_size} x {h * tower.patch_size} pixels",
        f"grid: {t} x {h} x {w} patches (time, rows, columns), {t * h * w // merge**2} tokens; windows in "
        f"each frame: {', '.join(f'{n} of {size} patches' for n, size in windowed.runs)}",
        f"prompt: {T} tokens, {T - types.count(0)} of them from pictures and videos",
        "positions (time, row, column): " + ", ".join(
            f"token {i} at {tuple(positions[:, 0, i].tolist())}" for i in borders),
        f"answer: begins in cache slot {T}, at position {following.item()}; in bfloat16 the cache takes "
        f"{bytes_per_token:,} bytes per token, {bytes_per_token * T:,} for the prompt",
        f"\n{'stage':20} {'shape':>18}  {'what it is':38} {'parameters':>15} {'GFLOP':>9}",
    ]

    N, full = t * h * w, len(tower.fullatt_block_indexes)
    head = model.model.embed_tokens if config.tie_word_embeddings else model.lm_head
    embed, blocks, merger, layers, head = map(parameters, (
        model.visual.patch_embed, model.visual.blocks, model.visual.merger, model.model.layers, head))
    attention = (full * attention_flops(Layout(t, [(1, h * w)]), width)
                 + (tower.depth - full) * attention_flops(windowed, width))
    causal = 2 * config.num_hidden_layers * T * T * C
    for stage, shape, what, count, flops in (
        ("pixel_values", (N, embed // width), "patches, merge group by merge group", 0, 0),
        ("patch_embed", (N, width), "a linear map of each", embed, 2 * N * embed),
        (f"{tower.depth} blocks, {full} full", (N, width), "attention in windows, in whole frames", blocks,
         2 * N * blocks + attention),
        ("merger", (N // merge**2, C), f"{merge} x {merge} patches become a token", merger,
         2 * N // merge**2 * merger),
        ("embed", (1, T, C), "vision tokens at their placeholders", parameters(model.model.embed_tokens), 0),
        (f"{config.num_hidden_layers} layers", (1, T, C), "the decoder", layers, 2 * T * layers + causal),
        ("head", (1, 1, config.vocab_size), "logits of the last token", head, 2 * head),
    ):
        lines.append(f"{stage:20} {shape!s:>18}  {what:38} {count:15,} {flops / 1e9:9.3f}")

    with torch.inference_mode():
        values, ids = model(**inputs)[0, -1].float().softmax(dim=-1).topk(5)
    likeliest = [f"{processor.tokenizer.id_to_token(i)!r} {100 * p:.1f} %"
                 for p, i in zip(values.tolist(), ids.tolist())]
    return [*lines, f"\nfirst token: {', '.join(likeliest)}"]


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ROOT / "tiny", help="a directory or hub id (default: tiny/)")
    parser.add_argument("--image", default=ROOT / "assets" / "demo.png", help="(default: the demo picture)")
    parser.add_argument("--video", help="instead: a folder of frames (with --fps) or an animated file")
    parser.add_argument("--fps", type=float)
    parser.add_argument("--prompt", default="Describe the image.")
    args = parser.parse_args(argv)
    try:
        path, item = checkpoint(args.model), {"type": "video", "video": args.video, "fps": args.fps}
        if args.video is None:
            item = {"type": "image", "image": open_image(args.image)}
            print(f"original: {item['image'].width} x {item['image'].height} pixels")
        processor, model = load_processor(path), load_model(path)
        inputs = processor([{"role": "user", "content": [item, {"type": "text", "text": args.prompt}]}])
        print("\n".join(journey(model, inputs, processor)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
