"""Put a known bug into a copy of this project, and see which test turns red.

    python tools/bugs.py            every bug, a row each
    python tools/bugs.py windows    those whose name contains the word

Each entry of BUGS is a line of the code as it is and the same line with a bug that somebody shipped, or could
have. The line must be found exactly once, the test must pass without the bug and fail with it.
"""

import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Bug(NamedTuple):
    name: str
    file: str
    right: str
    wrong: str
    test: str       # as pytest takes it, inside tests/


BUGS = [
    Bug("windows left out", "vision.py", "full if i in config.fullatt_block_indexes else windowed", "full",
        "test_vision.py::test_windows_left_out_or_not_put_back"),
    Bug("full blocks never found", "vision.py", "if i in config.fullatt_block_indexes",
        "if str(i) in config.fullatt_block_indexes", "test_vision.py::test_windows_left_out_or_not_put_back"),
    Bug("permutation not undone", "vision.py", "self.merger(x)[back]", "self.merger(x)",
        "test_vision.py::test_windows_left_out_or_not_put_back"),
    Bug("permutation undone by itself", "vision.py", "self.merger(x)[back]", "self.merger(x)[order]",
        "test_vision.py::test_windows_left_out_or_not_put_back"),
    Bug("positions left in raster order of windows", "vision.py",
        "vision_positions(grid_thw, merge).unflatten(0, in_groups)[order].flatten(0, 1)",
        "vision_positions(grid_thw, merge)",
        "test_vision.py::test_windows_left_out_or_not_put_back"),
    Bug("window size taken for patches", "vision.py", "config.window_size // (config.patch_size * merge)",
        "config.window_size // merge", "test_vision.py::test_windows_left_out_or_not_put_back"),
    Bug("h and w swapped in the tower", "vision.py", "positions = vision_positions(grid_thw, merge)",
        "positions = vision_positions(grid_thw, merge).flip(1)",
        "test_vision.py::test_windows_left_out_or_not_put_back"),
    Bug("frames see each other", "vision.py", "full = [Layout(t, [(1, h * w)])",
        "full = [Layout(1, [(1, t * h * w)])", "test_vision.py::test_frames_see_each_other"),
    Bug("items see each other", "vision.py", "sizes = [layout.patches for layout in layouts]",
        "sizes = [layout.patches for layout in layouts]\n"
        "        if all(len(one.runs) == 1 for one in layouts) and len(sizes) > 1:\n"
        "            sizes, layouts = [len(x)], [Layout(1, [(1, len(x))])]",
        "test_vision.py::test_items_see_each_other"),
    Bug("one temporal slice", "vision.py", "return F.linear(x, self.proj.weight.flatten(1))",
        "w = self.proj.weight\n"
        "        return F.linear(x, torch.cat((w[:, :, :1], 0 * w[:, :, 1:]), 2).flatten(1))",
        "test_vision.py::test_windows_left_out_or_not_put_back"),
    Bug("tanh GELU", "vision.py", "nn.GELU()", 'nn.GELU("tanh")',
        "test_vision.py::test_windows_left_out_or_not_put_back"),
    Bug("bias dropped in the tower's MLP", "vision.py", "intermediate_size, bias=True)",
        "intermediate_size, bias=False)", "test_load_weights.py::test_published_names_shapes_and_bytes"),
    Bug("norm after the weight", "vision.py",
        "self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)",
        "(self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps)).to(x.dtype)",
        "test_vision.py::test_norm_multiplies_by_the_weight_before_casting_back"),
    Bug("wrong eps", "vision.py", "NORM_EPS = 1e-6", "NORM_EPS = 1e-5", "test_vision.py::test_wrong_eps"),
    Bug("angles in bfloat16", "vision.py", "rotate(qk.float(), cos, sin).to(x.dtype)",
        "rotate(qk, cos.to(x.dtype), sin.to(x.dtype))",
        "test_vision.py::test_angles_in_bfloat16"),
    Bug("tower waits for the device", "vision.py", "full = [Layout(",
        "pixel_values.sum().item()\n        full = [Layout(",
        "test_vision.py::test_tower_waits_for_the_device"),
    Bug("rotary interleaved", "rope.py",
        "    left, right = x.chunk(2, dim=-1)\n"
        "    return x * cos + torch.cat((-right, left), dim=-1) * sin",
        "    left, right = x[..., ::2], x[..., 1::2]\n"
        "    return x * cos + torch.stack((-right, left), dim=-1).flatten(-2) * sin",
        "test_rope.py::test_rotary_of_neighbours_instead_of_halves"),
    Bug("sections interleaved", "rope.py",
        "angles = torch.cat([axis[..., None].float() * part "
        "for axis, part in zip(position_ids, parts)], dim=-1)",
        "s = inv_freq(head_dim, theta, position_ids.device)\n"
        "    angles = torch.stack([position_ids[i % 3].float() * s[i] for i in range(len(s))], dim=-1)",
        "test_rope.py::test_sections_interleaved"),
    Bug("raster patch order", "rope.py",
        "groups = frame.unflatten(1, (-1, merge_size)).unflatten(0, (-1, merge_size)).transpose(1, 2)",
        "groups = frame", "test_rope.py::test_patches_in_raster_order"),
    Bug("text resumes by token count", "rope.py", "start = 1 + max(map(max, block))", "start += len(block)",
        "test_rope.py::test_text_after_a_picture_counts_its_tokens"),
    Bug("text resumes by the larger side", "rope.py", "start = 1 + max(map(max, block))",
        "start = 1 + max(max(row[1:]) for row in block)",
        "test_rope.py::test_video_time_axis_and_what_follows"),
    Bug("one position too far", "rope.py", "next_position.append(start)", "next_position.append(start + 1)",
        "test_rope.py::test_first_answer_token_one_position_too_far"),
    Bug("seconds truncated before the product", "rope.py",
        "(torch.arange(t) * interval * tokens_per_second).long()",
        "torch.arange(t) * int(interval) * tokens_per_second",
        "test_rope.py::test_video_time_axis_and_what_follows"),
    Bug("seconds ignored", "rope.py", "(torch.arange(t) * interval * tokens_per_second).long()",
        "torch.arange(t) * (interval > 0)", "test_rope.py::test_video_time_axis_and_what_follows"),
    Bug("batch rows take the last row's positions", "model.py",
        "return self.decode(x, position_ids.to(x.device), attention_mask)",
        "return self.decode(x, position_ids[:, -1:].to(x.device).expand_as(position_ids), attention_mask)",
        "test_model.py::test_batch_differs_from_single"),
    Bug("top-left causal mask on a chunk", "model.py",
        "mask = None if T == 1 else causal_mask(slots, S, None, x.dtype)",
        "mask = None if T == 1 else causal_mask(torch.arange(T), S, None, x.dtype)",
        "test_model.py::test_prefill_and_decode_disagree"),
    Bug("mask by position", "model.py", "            mask = CAUSAL\n",
        "            p = position_ids[0, 0]\n"
        "            mask = torch.where(p[None] <= p[:, None], 0.0, -1e30)[None, None].to(x.dtype)\n",
        "test_model.py::test_mask_goes_by_position"),
    Bug("mask accepted and not used", "model.py", "    if attention_mask is not None:\n        visible",
        "    if attention_mask is None:\n        visible", "test_model.py::test_batch_differs_from_single"),
    Bug("pads are NaN", "model.py", " | (keys == queries)", "", "test_model.py::test_logits_differ"),
    Bug("key heads in the wrong groups", "vision.py",
        "x[:, :, None].expand(-1, -1, H // x.shape[1], -1, -1).flatten(1, 2)",
        "x.repeat(1, H // x.shape[1], 1, 1)", "test_model.py::test_logits_differ"),
    Bug("a mask tensor for every prompt", "model.py", "            mask = CAUSAL\n",
        "            mask = causal_mask(slots, S, None, x.dtype)\n",
        "test_model.py::test_prefill_makes_a_mask"),
    Bug("decode at the cache length", "generate.py",
        "axes = position.expand(3, -1, -1)       # text moves all three alike",
        "axes = torch.full_like(position, cache.length).expand(3, -1, -1)",
        "test_generate.py::test_decoding_at_the_cache_length"),
    Bug("tower run for every token", "generate.py",
        "    logits = model.decode(model.embed(token), axes, mask, cache, last_only=True)",
        "    g = torch.tensor([[1, 4, 4]])\n    model.visual(torch.zeros(16, 1176), g)\n"
        "    logits = model.decode(model.embed(token), axes, mask, cache, last_only=True)",
        "test_generate.py::test_tower_or_prompt_run_again"),
    Bug("penalty over the answer only", "generate.py",
        "seen = seen.scatter_add(1, input_ids, mask[:, :T]) > 0", "seen = seen > 0",
        "test_generate.py::test_decoding_at_the_cache_length"),
    Bug("penalty over pads", "generate.py", "seen.scatter_add(1, input_ids, mask[:, :T])",
        "seen.scatter_add(1, input_ids, torch.ones_like(input_ids))",
        "test_generate.py::test_penalty_for_pads_or_answer_only"),
    Bug("top-p before temperature", "generate.py", "    logits = logits / temperature\n", "",
        "test_generate.py::test_filters_in_another_order"),
    Bug("end tokens cut to one", "generate.py", "else list(eos_token_id))", "else list(eos_token_id)[:1])",
        "test_generate.py::test_end_tokens_cut_to_one"),
    Bug("half a character shown", "generate.py",
        'if not text.endswith("\\N{REPLACEMENT CHARACTER}"):', "if True:",
        "test_generate.py::test_half_a_character_is_shown"),
    Bug("half-up rounding", "processing.py",
        "h, w = round(height / factor) * factor, round(width / factor) * factor",
        "h, w = int(height / factor + 0.5) * factor, int(width / factor + 0.5) * factor",
        "test_processing.py::test_sizes_rounded_half_up"),
    Bug("width and height swapped in the resize", "processing.py", "frame.resize((width, height)",
        "frame.resize((height, width)", "test_processing.py::test_wrong_filter_or_sides_swapped"),
    Bug("another resize filter", "processing.py", "Image.Resampling.BICUBIC", "Image.Resampling.BILINEAR",
        "test_processing.py::test_wrong_filter_or_sides_swapped"),
    Bug("times 1/255 in float32", "processing.py", "/ np.float32(255)", "* np.float32(1 / 255)",
        "test_processing.py::test_every_value_normalised_in_float32"),
    Bug("patches stored in raster order", "processing.py", "x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)",
        "x.transpose(0, 2, 3, 5, 6, 8, 1, 4, 7)", "test_processing.py::test_patches_in_the_wrong_order"),
    Bug("alpha dropped", "processing.py",
        'if "A" in image.getbands() or image.info.get("transparency") is not None:', "if False:",
        "test_processing.py::test_alpha_dropped_or_mode_misread"),
    Bug("orientation ignored", "processing.py", "rgb(ImageOps.exif_transpose(frame))", "rgb(frame)",
        "test_processing.py::test_orientation_ignored"),
    Bug("typed control tokens steer", "processing.py", "tokenizer.encode_special_tokens = True",
        "tokenizer.encode_special_tokens = False", "test_processing.py::test_typed_token_steers"),
    Bug("text tokenized piecewise", "processing.py",
        'if kind == "text" and parts and parts[-1].kind == "text":', "if False:",
        "test_processing.py::test_text_tokenized_piecewise"),
    Bug("padded on the right", "processing.py", "[pad] * (T - len(row)) + [(*pair, 1) for pair in row]",
        "[(*pair, 1) for pair in row] + [pad] * (T - len(row))",
        "test_processing.py::test_batch_padded_on_the_right"),
    Bug("frames in alphabetical order", "processing.py", "[int(s) if s.isdecimal() else s for", "[s for",
        "test_processing.py::test_folder_in_alphabetical_order"),
    Bug("boxes scaled the wrong way", "processing.py", "original[0] / resized[0], original[1] / resized[1]",
        "original[1] / resized[1], original[0] / resized[0]",
        "test_processing.py::test_boxes_in_the_wrong_pixels"),
    Bug("the 32B without windows", "load_weights.py", "fullatt_block_indexes=[7, 15, 23, 31]",
        "fullatt_block_indexes=list(range(32))",
        "test_load_weights.py::test_sparse_config_read_as_having_no_windows"),
    Bug("a tensor never loaded", "load_weights.py", "    expected = model.state_dict()\n",
        "    expected = model.state_dict()\n    weights = expected | weights\n",
        "test_load_weights.py::test_tensor_never_loaded"),
    Bug("weights copied", "load_weights.py", "tensors.get_tensor(name)", "tensors.get_tensor(name).clone()",
        "test_load_weights.py::test_weights_copied_into_memory"),
    Bug("tied head silently untied", "load_weights.py", "and not torch.equal(", "and torch.equal(",
        "test_load_weights.py::test_tied_head_silently_untied"),
]


def caught(bug: Bug, copy: Path) -> bool:
    """Whether the test turns red in a copy of the project with the bug. Raises ValueError for a stale entry.
    """
    source = (ROOT / bug.file).read_text()
    found = source.count(bug.right)
    if found != 1:
        raise ValueError(f"{bug.name}: the line is found {found} times in {bug.file}, not once")
    (copy / bug.file).write_text(source.replace(bug.right, bug.wrong))
    try:
        return pytest_fails(copy, bug.test)
    finally:
        (copy / bug.file).write_text(source)


def pytest_fails(copy: Path, test: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", f"tests/{test}"]
    run = subprocess.run(command, cwd=copy, capture_output=True)
    if run.returncode not in (0, 1):        # 1 is a test that failed; anything else no test at all
        raise ValueError(run.stdout.decode()[-2000:])
    return run.returncode == 1


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only bugs whose name contains them all")
    words = parser.parse_args(argv).words
    chosen = [bug for bug in BUGS if all(word in bug.name for word in words)]
    if not chosen:
        parser.error(f"no bug's name contains {' and '.join(words)}")
    survived = 0
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__"))
        for bug in chosen:
            red = caught(bug, copy)
            survived += not red
            print(f"{'caught  ' if red else 'SURVIVED'}  {bug.name:44} {bug.test}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
