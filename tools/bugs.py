"""Put a known bug into a copy of this project: which test turns red, and what does it cost a trained model?

    python tools/bugs.py                        # every bug, a row each
    python tools/bugs.py windows --scenes 50    # those whose name contains the word

Each entry of BUGS is a piece of the code as it is and the same piece with a bug that has been reported
somewhere, or could have been. It must be found exactly once, and the test must turn red. Then the tiny
checkpoint is asked about pictures and videos: exact descriptions, boxes with an IoU above 0.5, exact counts,
directions of movement. docs/bugs.md has the rows of all.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("describe", "locate", "count", "video")
SURVIVED = "SURVIVED"


class Bug(NamedTuple):
    name: str
    file: str
    right: str
    wrong: str
    test: str
    reported: str = "-"     # owner/name#thread, or owner/name@commit/file#lines; (in another model)


# Code that was read, at a commit.
TINY_QWEN = "Emericen/tiny-qwen@3c9d12b385002f99d0887cc182fe1bdd5db2d6e3"
FROM_SCRATCH = "huan-yin/Qwen2.5VL-from-scratch@5c45ba5ab11f53e76a6607f918c1b307c0d27514"
LLAMA = "ggml-org/llama.cpp@06e514f61476a45c38b36ac37ca5133114b90ab3"
MLX_VLM = "Blaizzy/mlx-vlm@9b13f522a7f1d214f426c67bb292c9e1065e9108"
OPENVINO = "openvinotoolkit/openvino.genai@da1db864d2bc1a265e9a036f5b57ef13f0e86c2c"
HF = "huggingface/transformers@v5.23.0"
ANY = "(any model)"         # the code is not one model's

BUGS = [
    # The vision tower.
    Bug("windows left out", "vision.py",
        right="full if i in config.fullatt_block_indexes else windowed",
        wrong="full",
        test="test_tower_equals_hugging_face",
        reported=f"{TINY_QWEN}/model/vision.py#L309-L312"),
    Bug("full blocks never found", "vision.py",
        right="if i in config.fullatt_block_indexes",
        wrong="if str(i) in config.fullatt_block_indexes",
        test="test_tower_equals_hugging_face",
        reported="nvidia-cosmos/cosmos-rl#171"),
    Bug("permutation not undone", "vision.py",
        right="self.merger(x)[inverse]",
        wrong="self.merger(x)",
        test="test_tower_equals_hugging_face"),
    Bug("permutation undone by itself", "vision.py",
        right="self.merger(x)[inverse]",
        wrong="self.merger(x)[order]",
        test="test_tower_equals_hugging_face",
        reported="lablup/mlxcel#1601"),
    Bug("positions left in raster order of windows", "vision.py",
        right="positions = reorder(vision_positions(grid_thw, merge), order, merge**2)",
        wrong="positions = vision_positions(grid_thw, merge)",
        test="test_tower_equals_hugging_face"),
    Bug("window size taken for patches", "vision.py",
        right="self.window_size // (self.patch_size * self.spatial_merge_size)",
        wrong="self.window_size // self.spatial_merge_size",
        test="test_tower_equals_hugging_face",
        reported="ByteDance-Seed/VeOmni#1024 (where it counts operations)"),
    Bug("h and w swapped in the tower", "vision.py",
        right="positions = reorder(vision_positions(grid_thw, merge),",
        wrong="positions = reorder(vision_positions(grid_thw, merge).flip(1),",
        test="test_tower_equals_hugging_face"),
    Bug("frames see each other", "vision.py",
        right="full = [Layout(t, [(1, h * w)])",
        wrong="full = [Layout(1, [(1, t * h * w)])",
        test="test_frames_do_not_see_each_other",
        reported="ml-explore/mlx-swift-lm#509"),
    Bug("items see each other", "vision.py",
        right="        items = qkv.split(",
        wrong="        if len(layouts) > 1 and all(len(layout.runs) == 1 for layout in layouts):\n"
              "            layouts = [Layout(1, [(1, len(x))])]\n"
              "        items = qkv.split(",
        test="test_items_do_not_see_each_other",
        reported="vllm-project/tpu-inference#769"),
    Bug("one temporal slice", "vision.py",
        right="return F.linear(x, self.proj.weight.flatten(1))",
        wrong="weight = self.proj.weight.clone()\n"
              "        weight[:, :, 1:] = 0\n"
              "        return F.linear(x, weight.flatten(1))",
        test="test_tower_equals_hugging_face",
        reported="mlx-node/mlx-node#80 (Qwen3.5-VL)"),
    Bug("tanh GELU", "vision.py",
        right="nn.GELU()",
        wrong='nn.GELU("tanh")',
        test="test_tower_equals_hugging_face",
        reported=f"{LLAMA}/tools/mtmd/models/qwen2vl.cpp#L178-L183; ggml-org/llama.cpp#13667 (Ultravox)"),
    Bug("bias dropped in the tower's MLP", "vision.py",
        right="config.intermediate_size, bias=True)",
        wrong="config.intermediate_size, bias=False)",
        test="test_names_shapes_and_bytes_are_as_published"),
    Bug("norm after the weight", "vision.py",
        right="return self.weight * F.rms_norm(x, self.weight.shape, None, self.eps)",
        wrong="y = F.rms_norm(x.float(), self.weight.shape, None, self.eps)\n"
              "        return (self.weight * y).to(x.dtype)",
        test="test_norm_casts_back_before_the_weight",
        reported="NVIDIA/TransformerEngine#1132 (Llama 3, Qwen2)"),
    Bug("wrong eps", "vision.py",
        right="NORM_EPS = 1e-6",
        wrong="NORM_EPS = 1e-5",
        test="test_norm_eps_equals_hugging_face",
        reported="paiml/aprender#1606 (Qwen2.5-Coder)"),
    Bug("angles in bfloat16", "vision.py",
        right="rotate(qkv[:, :2].float(), cos, sin).to(x.dtype)",
        wrong="rotate(qkv[:, :2], cos.to(x.dtype), sin.to(x.dtype))",
        test="test_angles_are_float32",
        reported=f"Dao-AILab/flash-attention#823 {ANY}"),
    Bug("tower waits for the device", "vision.py",
        right="        full = [Layout(",
        wrong="        pixel_values.sum().item()\n"
              "        full = [Layout(",
        test="test_tower_never_waits",
        reported="vllm-project/vllm#24741"),

    # Positions.
    Bug("rotary interleaved", "rope.py",
        right="    left, right = x.chunk(2, dim=-1)\n"
              "    return x * cos + torch.cat((-right, left), dim=-1) * sin",
        wrong="    left = x[..., ::2]\n"
              "    right = x[..., 1::2]\n"
              "    return x * cos + torch.stack((-right, left), dim=-1).flatten(-2) * sin",
        test="test_rotary_pairs_halves",
        reported="ikawrakow/ik_llama.cpp#2290 (Mellum2 and other text models)"),
    Bug("sections interleaved", "rope.py",
        right="    angles = torch.cat(angles, dim=-1)",
        wrong="    frequencies = torch.cat(frequencies)\n"
              "    angles = [position_ids[i % 3].float() * f for i, f in enumerate(frequencies)]\n"
              "    angles = torch.stack(angles, dim=-1)",
        test="test_sections_are_contiguous",
        reported="ml-explore/mlx-swift-lm#239"),
    Bug("sections doubled, not repeated", "rope.py",
        right="    for axis, part in zip(position_ids, frequencies, strict=True):\n"
              "        angles.append(axis[:, :, None].float() * part)\n"
              "    angles = torch.cat(angles, dim=-1).repeat(1, 1, 2)",
        wrong="    channels = torch.cat(frequencies).repeat(2).split([2 * n for n in section])\n"
              "    for axis, part in zip(position_ids, channels, strict=True):\n"
              "        angles.append(axis[:, :, None].float() * part)\n"
              "    angles = torch.cat(angles, dim=-1)",
        test="test_sections_are_contiguous",
        reported=f"{FROM_SCRATCH}/model.py#L340-L349"),
    Bug("raster patch order", "rope.py",
        right="groups = groups.transpose(1, 2)",
        wrong="groups = frame",
        test="test_patch_positions_follow_merge_groups",
        reported="vllm-project/vllm#52932 (Cosmos3-Edge)"),
    Bug("text resumes by token count", "rope.py",
        right="start = 1 + max(map(max, block))",
        wrong="start += len(block)",
        test="test_text_resumes_after_the_largest_position"),
    Bug("text resumes by the larger side", "rope.py",
        right="start = 1 + max(map(max, block))",
        wrong="start = 1 + max(max(row, column) for time, row, column in block)",
        test="test_video_times_go_by_the_seconds",
        reported=f"{HF}/src/transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py#L1034"),
    Bug("one position too far", "rope.py",
        right="next_position.append(following)",
        wrong="next_position.append(following + 1)",
        test="test_answer_follows_the_prompt",
        reported=f"{FROM_SCRATCH}/model.py#L368-L379"),
    Bug("seconds truncated before the product", "rope.py",
        right="(torch.arange(t) * interval * tokens_per_second).long()",
        wrong="torch.arange(t) * int(interval) * tokens_per_second",
        test="test_video_times_go_by_the_seconds",
        reported="huggingface/transformers#48669"),
    Bug("seconds ignored", "rope.py",
        right="(torch.arange(t) * interval * tokens_per_second).long()",
        wrong="torch.arange(t) * (interval > 0)",
        test="test_video_times_go_by_the_seconds",
        reported="sgl-project/sglang#3682; "
                 f"{MLX_VLM}/mlx_vlm/models/qwen2_5_vl/language.py#L302-L308"),
    Bug("rate of a video fixed", "rope.py",
        right="(torch.arange(t) * interval * tokens_per_second).long()",
        wrong="torch.arange(t) * (interval > 0) * tokens_per_second",
        test="test_video_times_go_by_the_seconds",
        reported=f"{OPENVINO}/src/cpp/src/visual_language/qwen2vl/classes.cpp#L1562"),

    # The decoder.
    Bug("batch rows take the last row's positions", "model.py",
        right="return self.logits(x, position_ids.to(x.device), attention_mask)",
        wrong="position_ids = position_ids[:, -1:].expand_as(position_ids)\n"
              "        return self.logits(x, position_ids.to(x.device), attention_mask)",
        test="test_batch_equals_single",
        reported=f"{TINY_QWEN}/model/qwen2_5_vl.py#L232-L234"),
    Bug("top-left causal mask on a chunk", "model.py",
        right="causal = attention_mask is None and T == S\n"
              "        if attention_mask is not None or 1 < T < S:",
        wrong="causal = attention_mask is None and T > 1\n"
              "        if attention_mask is not None:",
        test="test_chunks_equal_one_pass",
        reported=f"pytorch/executorch#21749 {ANY}"),
    Bug("mask by position", "model.py",
        right="causal = attention_mask is None and T == S\n",
        wrong="causal = False\n"
              "        if attention_mask is None and T == S:\n"
              "            time = position_ids[0, 0]\n"
              "            mask = torch.where(time <= time[:, None], 0.0, -1e30).to(x.dtype)[None, None]\n",
        test="test_token_sees_all_before_it_and_none_after",
        reported="ggml-org/llama.cpp#16745"),
    Bug("mask accepted and not used", "model.py",
        right="    if attention_mask is not None:\n"
              "        visible = ",
        wrong="    if False:\n"
              "        visible = ",
        test="test_batch_equals_single",
        reported="ml-explore/mlx-swift-lm#238"),
    Bug("pads are NaN", "model.py",
        right=" | (keys == queries)",
        wrong="",
        test="test_logits_equal_hugging_face",
        reported="unslothai/unsloth#9848 (Gemma 4)"),
    Bug("key heads in the wrong groups", "vision.py",
        right="x[:, :, None].expand(-1, -1, H // x.shape[1], -1, -1).flatten(1, 2)",
        wrong="x.repeat(1, H // x.shape[1], 1, 1)",
        test="test_logits_equal_hugging_face",
        reported=f"ekzhang/jax-js#180 {ANY}"),
    Bug("a mask tensor for every prompt", "model.py",
        right="causal = attention_mask is None and T == S\n"
              "        if attention_mask is not None or 1 < T < S:",
        wrong="causal = False\n"
              "        if attention_mask is not None or T > 1:",
        test="test_prefill_makes_no_mask",
        reported="mlx-node/mlx-node#34 (Qwen3.5)"),

    # Generation.
    Bug("decode at the cache length", "sampling.py",
        right="position_ids = position.expand(3, -1, -1)",
        wrong="position_ids = torch.full_like(position, cache.length).expand(3, -1, -1)",
        test="test_greedy_answer_equals_hugging_face",
        reported="Blaizzy/mlx-vlm#1619 (Qwen3-Omni)"),
    Bug("tower run for every token", "sampling.py",
        right="    logits = model.logits(model.embed(token)",
        wrong="    model.visual(torch.zeros(16, 1176), torch.tensor([[1, 4, 4]]))\n"
              "    logits = model.logits(model.embed(token)",
        test="test_tower_and_prompt_run_once",
        reported=f"{TINY_QWEN}/model/qwen2_5_vl.py#L282-L283"),
    Bug("penalty over the answer only", "sampling.py",
        right="row[ids[real]] = True",
        wrong="pass",
        test="test_greedy_answer_equals_hugging_face",
        reported=f"huggingface/transformers#45389 {ANY}"),
    Bug("penalty over pads", "sampling.py",
        right="row[ids[real]] = True",
        wrong="row[ids] = True",
        test="test_penalty_counts_prompt_and_answer_and_no_pads",
        reported=f"huggingface/text-generation-inference#1765 {ANY}"),
    Bug("top-p before temperature", "sampling.py",
        right="unlikely = ascending.softmax(dim=-1)",
        wrong="unlikely = (ascending * self.temperature).softmax(dim=-1)",
        test="test_sampled_answer_equals_hugging_face",
        reported=f"huggingface/transformers#8686 {ANY}"),
    Bug("end tokens cut to one", "sampling.py",
        right="else list(eos_token_id))",
        wrong="else list(eos_token_id)[:1])",
        test="test_every_end_token_ends_a_row",
        reported="Blaizzy/mlx-vlm#309 (Gemma 3)"),
    Bug("half a character shown", "generate.py",
        right='if not text.endswith("\\N{REPLACEMENT CHARACTER}"):',
        wrong="if True:",
        test="test_text_comes_in_whole_characters",
        reported=f"exo-explore/exo#1691 {ANY}"),

    # Pictures, videos and text.
    Bug("half-up rounding", "processing.py",
        right="    h = round(height / factor) * factor\n"
              "    w = round(width / factor) * factor",
        wrong="    h = int(height / factor + 0.5) * factor\n"
              "    w = int(width / factor + 0.5) * factor",
        test="test_sizes_equal_hugging_face",
        reported="bytedance/UI-TARS-desktop#1892 (UI-TARS 1.5)"),
    Bug("width and height swapped in the resize", "processing.py",
        right="frame.resize((width, height)",
        wrong="frame.resize((height, width)",
        test="test_pixels_equal_hugging_face",
        reported="EricLBuehler/mistral.rs#1950"),
    Bug("another resize filter", "processing.py",
        right="Image.Resampling.BICUBIC",
        wrong="Image.Resampling.BILINEAR",
        test="test_pixels_equal_hugging_face",
        reported="ggml-org/llama.cpp#24629"),
    Bug("times 1/255 in float32", "processing.py",
        right="x /= np.float32(255)",
        wrong="x *= np.float32(1 / 255)",
        test="test_normalization_equals_hugging_face"),
    Bug("patches stored in raster order", "processing.py",
        right="x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)",
        wrong="x.transpose(0, 2, 3, 5, 6, 8, 1, 4, 7)",
        test="test_patch_rows_follow_merge_groups",
        reported="warpfront/hipfire#325 (Qwen3.5-VL)"),
    Bug("alpha dropped", "processing.py",
        right='if "A" in image.getbands() or image.info.get("transparency") is not None:',
        wrong="if False:",
        test="test_modes_equal_hugging_face",
        reported="NousResearch/hermes-agent#64548 (Qwen3-VL)"),
    Bug("orientation ignored", "processing.py",
        right="yield ImageOps.exif_transpose(frame)",
        wrong="yield frame.copy()",
        test="test_orientation_of_a_file_is_applied",
        reported=f"sgl-project/sglang#33464 {ANY}"),
    Bug("typed control tokens steer", "load_weights.py",
        right="tokenizer.encode_special_tokens = True",
        wrong="tokenizer.encode_special_tokens = False",
        test="test_typed_token_does_not_steer",
        reported="huggingface/transformers#47853 (Qwen2.5); vllm-project/vllm#31735 (Qwen3)"),
    Bug("text tokenized piecewise", "processing.py",
        right='if joined and part.kind == joined[-1].kind == "text":',
        wrong="if False:",
        test="test_ids_equal_hugging_face",
        reported="radixark/miles#1377 (Zephyr)"),
    Bug("padded on the right", "processing.py",
        right="[[token_id(ENDOFTEXT)] * (T - len(row)) + row for row in rows])\n"
              "        attention_mask = torch.tensor("
              "[[0] * (T - len(row)) + [1] * len(row) for row in rows])",
        wrong="[row + [token_id(ENDOFTEXT)] * (T - len(row)) for row in rows])\n"
              "        attention_mask = torch.tensor("
              "[[1] * len(row) + [0] * (T - len(row)) for row in rows])",
        test="test_batch_is_padded_on_the_left",
        reported="EvolvingLMMs-Lab/lmms-eval#889"),
    Bug("frames in alphabetical order", "processing.py",
        right="[int(piece) if piece.isdecimal() else piece for piece",
        wrong="[piece for piece",
        test="test_frames_of_a_folder_go_by_number",
        reported="roboflow/trackers#558 (object trackers)"),
    Bug("boxes scaled the wrong way", "processing.py",
        right="    scale_y = original[0] / resized[0]\n"
              "    scale_x = original[1] / resized[1]",
        wrong="    scale_y = original[1] / resized[1]\n"
              "    scale_x = original[0] / resized[0]",
        test="test_boxes_scale_along_each_axis"),

    # A checkpoint's files.
    Bug("the 32B without windows", "load_weights.py",
        right="fullatt_block_indexes=(7, 15, 23, 31)",
        wrong="fullatt_block_indexes=tuple(range(32))",
        test="test_missing_keys_fall_back_on_the_published_values",
        reported="ggml-org/llama.cpp#12402"),
    Bug("a tensor never loaded", "load_weights.py",
        right="strict=True",
        wrong="strict=False",
        test="test_every_tensor_must_fit",
        reported="mlx-node/mlx-node#80 (Qwen3.5-VL)"),
    Bug("weights copied", "load_weights.py",
        right="tensors.get_tensor(name)",
        wrong="tensors.get_tensor(name).clone()",
        test="test_weights_stay_in_the_file",
        reported="Comfy-Org/ComfyUI#11286 (diffusion models)"),
    Bug("head of its own passed over", "load_weights.py",
        right="and not torch.equal(",
        wrong="and torch.equal(",
        test="test_tied_head_is_the_embedding",
        reported=f"huggingface/transformers#42612 {ANY}"),
]


def test_fails(copy: Path, test: str) -> bool:
    """Whether a test turns red. Raises ValueError if it doesn't run at all."""
    file = next(file for file in copy.glob("tests/test_*.py") if f"def {test}(" in file.read_text())
    command = [sys.executable, "-m", "pytest", "-x", "-q", f"{file}::{test}"]
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    if run.returncode not in (0, 1):        # 1 is a test that failed, anything else no test
        raise ValueError(run.stdout[-2000:])
    return run.returncode == 1


# In a process of its own, because this one has imported nothing that has the bug.
ASK = """
import sys
from pathlib import Path
sys.path.insert(0, "tools")
from evaluate_tiny import answers, share
scenes = int(sys.argv[1])
for kind in sys.argv[2:]:
    print(f"{share(list(answers(Path('tiny'), 0, scenes, (kind,)))):.0%}")
"""


def shares(copy: Path, scenes: int) -> list[str]:
    """Of each of KINDS, how many of the tiny checkpoint's answers are right."""
    command = [sys.executable, "-c", ASK, str(scenes), *KINDS]
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    return run.stdout.split() if run.returncode == 0 else ["fails"] * len(KINDS)


def put_in(bug: Bug, copy: Path) -> None:
    """Raises ValueError for an entry that is stale."""
    source = (ROOT / bug.file).read_text()
    found = source.count(bug.right)
    if found != 1:
        raise ValueError(f"{bug.name}: the line is found {found} times in {bug.file}, not once")
    (copy / bug.file).write_text(source.replace(bug.right, bug.wrong))


def take_out(bug: Bug, copy: Path) -> None:
    shutil.copy(ROOT / bug.file, copy / bug.file)


def linked(reported: str) -> str:
    """In Markdown: threads by their number, code that was read by commit and lines."""
    code = r"([\w.-]+/[\w.-]+)@([\w.]+)/(\S+#L\d+(?:-L\d+)?)"
    reported = re.sub(code, r"[\1](https://github.com/\1/blob/\2/\3), in its code", reported)
    return re.sub(r"([\w.-]+/[\w.-]+)#(\d+)", r"[\g<0>](https://github.com/\1/issues/\2)", reported)


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


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
        print_row("bug", "reported in", "caught by", "describe", "boxes", "count", "video")
        print("|---|---|---|---|---|---|---|")
        print_row("none", "", "", *shares(copy, args.scenes))

        for bug in chosen:
            put_in(bug, copy)
            caught = bug.test
            if not test_fails(copy, bug.test):
                caught = SURVIVED
                survived += 1
            print_row(bug.name, linked(bug.reported), f"`{caught}`", *shares(copy, args.scenes))
            take_out(bug, copy)

    print(f"\n{len(chosen) - survived} of {len(chosen)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
