"""Put a known bug into a copy of this project: which test turns red, and what does it cost a trained model?

    python tools/bugs.py                        # every bug, a row each
    python tools/bugs.py windows --scenes 50    # those whose name contains the word

Each entry of BUGS is a line of the code as it is and the same line with a bug that somebody shipped, or could
have. The line must be found exactly once, and the test must turn red. Then the tiny checkpoint is asked about
pictures and videos: exact descriptions, boxes with an IoU above 0.5, exact counts, directions of movement.
"""

import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KINDS, SURVIVED = ("describe", "locate", "count", "video"), "SURVIVED"


class Bug(NamedTuple):
    name: str
    file: str
    right: str
    wrong: str
    test: str
    shipped: str = ""   # the issue or pull request that reports it


BUGS = [
    Bug("windows left out", "vision.py", "full if i in config.fullatt_block_indexes else windowed", "full",
        "test_windows_left_out_or_not_put_back", "Emericen/tiny-qwen, in its code"),
    Bug("full blocks never found", "vision.py", "if i in config.fullatt_block_indexes",
        "if str(i) in config.fullatt_block_indexes", "test_windows_left_out_or_not_put_back",
        "nvidia-cosmos/cosmos-rl#171"),
    Bug("permutation not undone", "vision.py", "self.merger(x)[inverse]", "self.merger(x)",
        "test_windows_left_out_or_not_put_back"),
    Bug("permutation undone by itself", "vision.py", "self.merger(x)[inverse]", "self.merger(x)[order]",
        "test_windows_left_out_or_not_put_back", "lablup/mlxcel#1601"),
    Bug("positions left in raster order of windows", "vision.py", "vision_rotary(to_windows(positions)",
        "vision_rotary((positions)", "test_windows_left_out_or_not_put_back"),
    Bug("window size taken for patches", "vision.py", "config.window_size // (config.patch_size * merge)",
        "config.window_size // merge", "test_windows_left_out_or_not_put_back"),
    Bug("h and w swapped in the tower", "vision.py", "positions = vision_positions(grid_thw, merge)",
        "positions = vision_positions(grid_thw, merge).flip(1)", "test_windows_left_out_or_not_put_back"),
    Bug("frames see each other", "vision.py", "full = [Layout(t, [(1, h * w)])",
        "full = [Layout(1, [(1, t * h * w)])", "test_frames_see_each_other", "ml-explore/mlx-swift-lm#509"),
    Bug("items see each other", "vision.py", "sizes = [layout.patches for layout in layouts]",
        "sizes = [layout.patches for layout in layouts]\n"
        "        if all(len(one.runs) == 1 for one in layouts) and len(sizes) > 1:\n"
        "            sizes, layouts = [len(x)], [Layout(1, [(1, len(x))])]", "test_items_see_each_other",
        "vllm-project/tpu-inference#769"),
    Bug("one temporal slice", "vision.py", "return F.linear(x, self.proj.weight.flatten(1))",
        "w = self.proj.weight\n"
        "        return F.linear(x, torch.cat((w[:, :, :1], 0 * w[:, :, 1:]), 2).flatten(1))",
        "test_windows_left_out_or_not_put_back", "mlx-node/mlx-node#80"),
    Bug("tanh GELU", "vision.py", "nn.GELU()", 'nn.GELU("tanh")', "test_windows_left_out_or_not_put_back",
        "ggml-org/llama.cpp#13667"),
    Bug("bias dropped in the tower's MLP", "vision.py", "intermediate_size, bias=True)",
        "intermediate_size, bias=False)", "test_names_shapes_or_bytes_not_as_published"),
    Bug("norm after the weight", "vision.py",
        "self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)",
        "(self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps)).to(x.dtype)",
        "test_norm_casts_back_after_the_weight", "NVIDIA/TransformerEngine#1132"),
    Bug("wrong eps", "vision.py", "NORM_EPS = 1e-6", "NORM_EPS = 1e-5", "test_wrong_eps",
        "paiml/aprender#1606"),
    Bug("angles in bfloat16", "vision.py", "rotate(qkv[:, :2].float(), cos, sin).to(x.dtype)",
        "rotate(qkv[:, :2], cos.to(x.dtype), sin.to(x.dtype))", "test_angles_in_bfloat16",
        "Dao-AILab/flash-attention#823"),
    Bug("tower waits for the device", "vision.py", "full = [Layout(",
        "pixel_values.sum().item()\n        full = [Layout(", "test_tower_waits_for_the_device",
        "huggingface/transformers#39870"),
    Bug("rotary interleaved", "rope.py",
        "    left, right = x.chunk(2, dim=-1)\n    return x * cos + torch.cat((-right, left), dim=-1) * sin",
        "    left, right = x[..., ::2], x[..., 1::2]\n"
        "    return x * cos + torch.stack((-right, left), dim=-1).flatten(-2) * sin",
        "test_rotary_of_neighbours_instead_of_halves", "ikawrakow/ik_llama.cpp#2290"),
    Bug("sections interleaved", "rope.py",
        "angles = torch.cat([axis[..., None].float() * part for axis, part in zip(position_ids, parts)], "
        "dim=-1)", "s = inv_freq(head_dim, theta, position_ids.device)\n"
        "    angles = torch.stack([position_ids[i % 3].float() * s[i] for i in range(len(s))], dim=-1)",
        "test_sections_interleaved"),
    Bug("raster patch order", "rope.py",
        "groups = frame.unflatten(1, (-1, merge_size)).unflatten(0, (-1, merge_size)).transpose(1, 2)",
        "groups = frame", "test_patches_in_raster_order", "vllm-project/vllm#52932"),
    Bug("text resumes by token count", "rope.py", "start = 1 + max(map(max, block))", "start += len(block)",
        "test_text_after_a_picture_counts_its_tokens"),
    Bug("text resumes by the larger side", "rope.py", "start = 1 + max(map(max, block))",
        "start = 1 + max(max(row[1:]) for row in block)", "test_seconds_truncated_or_text_too_early",
        "huggingface/transformers, in its code"),
    Bug("one position too far", "rope.py", "next_position.append(start)", "next_position.append(start + 1)",
        "test_first_answer_token_one_position_too_far", "huan-yin/Qwen2.5VL-from-scratch, in its code"),
    Bug("seconds truncated before the product", "rope.py",
        "(torch.arange(t) * interval * tokens_per_second).long()",
        "torch.arange(t) * int(interval) * tokens_per_second", "test_seconds_truncated_or_text_too_early",
        "huggingface/transformers#48669"),
    Bug("seconds ignored", "rope.py", "(torch.arange(t) * interval * tokens_per_second).long()",
        "torch.arange(t) * (interval > 0)", "test_seconds_truncated_or_text_too_early",
        "sgl-project/sglang#3674"),
    Bug("batch rows take the last row's positions", "model.py",
        "return self.decode(x, position_ids.to(x.device), attention_mask)",
        "return self.decode(x, position_ids[:, -1:].to(x.device).expand_as(position_ids), attention_mask)",
        "test_batch_differs_from_single", "Emericen/tiny-qwen, in its code"),
    Bug("top-left causal mask on a chunk", "model.py",
        "mask = None if T == 1 else causal_mask(slots, S, None, x.dtype)",
        "mask = None if T == 1 else causal_mask(torch.arange(T), S, None, x.dtype)",
        "test_prefill_and_decode_disagree", "pytorch/executorch#21749"),
    Bug("mask by position", "model.py", "            mask = CAUSAL\n", "            p = position_ids[0, 0]\n"
        "            mask = torch.where(p[None] <= p[:, None], 0.0, -1e30)[None, None].to(x.dtype)\n",
        "test_mask_goes_by_position", "ggml-org/llama.cpp#16745"),
    Bug("mask accepted and not used", "model.py", "    if attention_mask is not None:\n        visible",
        "    if attention_mask is None:\n        visible", "test_batch_differs_from_single",
        "mistralai/mistral-inference#218"),
    Bug("pads are NaN", "model.py", " | (keys == queries)", "", "test_logits_differ",
        "unslothai/unsloth#9848"),
    Bug("key heads in the wrong groups", "vision.py",
        "x[:, :, None].expand(-1, -1, H // x.shape[1], -1, -1).flatten(1, 2)",
        "x.repeat(1, H // x.shape[1], 1, 1)", "test_logits_differ", "ekzhang/jax-js#180"),
    Bug("a mask tensor for every prompt", "model.py", "            mask = CAUSAL\n",
        "            mask = causal_mask(slots, S, None, x.dtype)\n", "test_prefill_makes_a_mask",
        "mlx-node/mlx-node#34"),
    Bug("decode at the cache length", "generate.py",
        "axes = position.expand(3, -1, -1)       # text moves all three alike",
        "axes = torch.full_like(position, cache.length).expand(3, -1, -1)",
        "test_decoding_at_the_cache_length", "Blaizzy/mlx-vlm#1621"),
    Bug("tower run for every token", "generate.py",
        "    logits = model.decode(model.embed(token), axes, mask, cache, last_only=True)",
        "    g = torch.tensor([[1, 4, 4]])\n    model.visual(torch.zeros(16, 1176), g)\n"
        "    logits = model.decode(model.embed(token), axes, mask, cache, last_only=True)",
        "test_tower_or_prompt_run_again", "Emericen/tiny-qwen, in its code"),
    Bug("penalty over the answer only", "generate.py",
        "seen = seen.scatter_add(1, input_ids, mask[:, :T]) > 0", "seen = seen > 0",
        "test_decoding_at_the_cache_length", "huggingface/transformers#45389"),
    Bug("penalty over pads", "generate.py", "seen.scatter_add(1, input_ids, mask[:, :T])",
        "seen.scatter_add(1, input_ids, torch.ones_like(input_ids))", "test_penalty_for_pads_or_answer_only",
        "huggingface/text-generation-inference#1765"),
    Bug("top-p before temperature", "generate.py", "ascending.softmax(dim=-1).cumsum",
        "(ascending * temperature).softmax(dim=-1).cumsum", "test_filters_in_another_order",
        "huggingface/transformers#8686"),
    Bug("end tokens cut to one", "generate.py", "else list(eos_token_id))", "else list(eos_token_id)[:1])",
        "test_end_tokens_cut_to_one", "Blaizzy/mlx-vlm#309"),
    Bug("half a character shown", "generate.py", 'if not text.endswith("\\N{REPLACEMENT CHARACTER}"):',
        "if True:", "test_half_a_character_is_shown", "exo-explore/exo#1691"),
    Bug("half-up rounding", "processing.py",
        "h, w = round(height / factor) * factor, round(width / factor) * factor",
        "h, w = int(height / factor + 0.5) * factor, int(width / factor + 0.5) * factor",
        "test_sizes_rounded_half_up", "bytedance/UI-TARS-desktop#1892"),
    Bug("width and height swapped in the resize", "processing.py", "frame.resize((width, height)",
        "frame.resize((height, width)", "test_wrong_filter_or_sides_swapped", "EricLBuehler/mistral.rs#1950"),
    Bug("another resize filter", "processing.py", "Image.Resampling.BICUBIC", "Image.Resampling.BILINEAR",
        "test_wrong_filter_or_sides_swapped", "ggml-org/llama.cpp#24629"),
    Bug("times 1/255 in float32", "processing.py", "/ np.float32(255)", "* np.float32(1 / 255)",
        "test_normalised_in_another_arithmetic"),
    Bug("patches stored in raster order", "processing.py", "x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)",
        "x.transpose(0, 2, 3, 5, 6, 8, 1, 4, 7)", "test_patches_in_the_wrong_order", "warpfront/hipfire#325"),
    Bug("alpha dropped", "processing.py",
        'if "A" in image.getbands() or image.info.get("transparency") is not None:', "if False:",
        "test_alpha_dropped_or_mode_misread", "NousResearch/hermes-agent#64548"),
    Bug("orientation ignored", "processing.py", "yield ImageOps.exif_transpose(frame)", "yield frame.copy()",
        "test_orientation_ignored", "sgl-project/sglang#33464"),
    Bug("typed control tokens steer", "processing.py", "tokenizer.encode_special_tokens = True",
        "tokenizer.encode_special_tokens = False", "test_typed_token_steers",
        "huggingface/transformers#47853"),
    Bug("text tokenized piecewise", "processing.py",
        'if part.kind == joined[-1].kind == "text":', "if False:",
        "test_text_tokenized_piecewise", "radixark/miles#1377"),
    Bug("padded on the right", "processing.py",
        "[[token_id(ENDOFTEXT)] * (T - len(row)) + row for row in rows])\n"
        "        mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])",
        "[row + [token_id(ENDOFTEXT)] * (T - len(row)) for row in rows])\n"
        "        mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])",
        "test_batch_padded_on_the_right", "EvolvingLMMs-Lab/lmms-eval#889"),
    Bug("frames in alphabetical order", "processing.py", "[int(s) if s.isdecimal() else s for", "[s for",
        "test_folder_in_alphabetical_order", "roboflow/trackers#558"),
    Bug("boxes scaled the wrong way", "processing.py", "original[0] / resized[0], original[1] / resized[1]",
        "original[1] / resized[1], original[0] / resized[0]", "test_boxes_in_the_wrong_pixels"),
    Bug("the 32B without windows", "load_weights.py", "fullatt_block_indexes=(7, 15, 23, 31)",
        "fullatt_block_indexes=tuple(range(32))", "test_sparse_config_read_as_having_no_windows"),
    Bug("a tensor never loaded", "load_weights.py", "strict=True", "strict=False", "test_tensor_never_loaded",
        "microsoft/olive-recipes#380"),
    Bug("weights copied", "load_weights.py", "tensors.get_tensor(name)", "tensors.get_tensor(name).clone()",
        "test_weights_copied_into_memory", "Comfy-Org/ComfyUI#11286"),
    Bug("tied head silently untied", "load_weights.py", "and not torch.equal(", "and torch.equal(",
        "test_tied_head_silently_untied", "huggingface/transformers#42612"),
]


def test_fails(copy: Path, test: str) -> bool:
    file = next(file for file in copy.glob("tests/test_*.py") if f"def {test}(" in file.read_text())
    command = [sys.executable, "-m", "pytest", "-x", "-q", f"{file}::{test}"]
    run = subprocess.run(command, cwd=copy, capture_output=True)
    if run.returncode not in (0, 1):        # 1 is a test that failed; anything else no test at all
        raise ValueError(run.stdout.decode()[-2000:])
    return run.returncode == 1


def shares(copy: Path, scenes: int) -> list[str]:
    """Of each of KINDS, how many of the tiny checkpoint's answers are right."""
    code = f"""import sys; sys.path.insert(0, "tools"); import pathlib, train_tiny
for kind in {KINDS}:
    answers = list(train_tiny.answers(pathlib.Path("tiny"), 0, {scenes}, (kind,)))
    print(f"{{sum(map(train_tiny.good, answers)) / len(answers):.0%}}")"""
    run = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    return run.stdout.split() if run.returncode == 0 else ["fails"] * len(KINDS)


def row(bug: Bug, copy: Path, scenes: int) -> list[str]:
    """The cells of a bug's row. Raises ValueError for an entry that is stale."""
    source = (ROOT / bug.file).read_text()
    found = source.count(bug.right)
    if found != 1:
        raise ValueError(f"{bug.name}: the line is found {found} times in {bug.file}, not once")
    (copy / bug.file).write_text(source.replace(bug.right, bug.wrong))
    caught = bug.test if test_fails(copy, bug.test) else SURVIVED
    cells = [bug.name, bug.shipped or "nobody found", caught, *shares(copy, scenes)]
    (copy / bug.file).write_text(source)
    return cells


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only bugs whose name contains them all")
    parser.add_argument("--scenes", type=int, default=200, help="to ask the tiny checkpoint about (200)")
    args = parser.parse_args(argv)
    chosen = [bug for bug in BUGS if all(word in bug.name for word in args.words)]
    if not chosen:
        parser.error(f"no bug's name contains {' and '.join(args.words)}")
    survived = 0
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__"))
        print("| bug | shipped by | caught by | describe | boxes | count | video |")
        print("|---|---|---|---|---|---|---|")
        print(f"| none | | | {' | '.join(shares(copy, args.scenes))} |", flush=True)
        for bug in chosen:
            cells = row(bug, copy, args.scenes)
            survived += SURVIVED in cells
            print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{len(chosen) - survived} of {len(chosen)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
