"""Time this implementation against Hugging Face's, in one process, in turns, on the same tensors.

    python tools/benchmark.py                                       # the CPU sizes: two minutes
    python tools/benchmark.py 7B 32B --device cuda --json out.json  # random weights need no download
    python tools/benchmark.py layer --plot assets/speed.png

"HF" is transformers with sdpa and without compilation; on CUDA its better time with and without cuDNN
attention, and for decoding a row more, with static cache and compilation. Only ratios count: machines differ,
and drift. Each is the median of ten pairs, with the smallest and the largest. A size whose outputs disagree
(with four layers) gets no ratios: in float32 logits must agree to 1e-5 of the largest and tokens be equal; in
bfloat16 neither may be further from the float32 result than 1.5 times the other.
"""

import copy
import json
import platform
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
import transformers
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from generate import generate
from load_weights import load_config, load_model, published_name
from model import Config, KVCache, Qwen2_5_VL
from vision import Attend, sdpa

ROOT = Path(__file__).resolve().parent.parent
PAIRS, TOLERANCE, BFLOAT16_FACTOR = 10, 1e-5, 1.5
COPY_BYTES = 2 * 2**30

VISION = dict(
    depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, in_channels=3, patch_size=14,
    window_size=112, spatial_merge_size=2, temporal_patch_size=2, fullatt_block_indexes=[7, 15, 23, 31],
    tokens_per_second=2)


def config_dict(
    hidden: int, layers: int, heads: int, kv: int, mlp: int, vocabulary: int, tied: bool, **tower
) -> dict:
    """A config.json as transformers 5 writes it; the last four ids are those of pictures and videos."""
    width, last = hidden // heads, vocabulary - 4
    text = dict(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=mlp, vocab_size=vocabulary, rms_norm_eps=1e-6, max_position_embeddings=128000,
        rope_parameters=dict(rope_type="default", rope_theta=1e6,
                             mrope_section=[width // 8, 3 * width // 16, 3 * width // 16]))
    return dict(
        model_type="qwen2_5_vl", text_config=text, tie_word_embeddings=tied,
        vision_config=VISION | dict(out_hidden_size=hidden) | tower, image_token_id=last,
        video_token_id=last + 1, vision_start_token_id=last + 2, vision_end_token_id=last + 3)


SMALL_TOWER = dict(depth=2, fullatt_block_indexes=[1])
SIZES = {
    "host": config_dict(64, 28, 4, 2, 128, 512, True, **SMALL_TOWER,
                        hidden_size=64, intermediate_size=128, num_heads=4),
    "layer": config_dict(2048, 1, 16, 2, 11008, 151936, True, **SMALL_TOWER),
    "3B": config_dict(2048, 36, 16, 2, 11008, 151936, True),
    "7B": config_dict(3584, 28, 28, 4, 18944, 152064, False),
    "32B": config_dict(5120, 64, 40, 8, 27648, 152064, False, intermediate_size=3456),
}
CPU_SIZES = ("tiny", "host", "layer")


@dataclass
class Row:
    """One thing timed: seconds of each of the pairs."""
    size: str
    what: str
    ours: list[float] = field(default_factory=list)
    hf: list[float] = field(default_factory=list)
    remark: str = ""

    def text(self) -> str:
        ratios = sorted(hf / ours for ours, hf in zip(self.ours, self.hf))
        seconds = [f"{1e3 * median(times):.3g} ms" for times in (self.ours, self.hf)]
        return (f"| {self.size} | {self.what} | {seconds[0]} | {seconds[1]} | **{median(ratios):.2f}** | "
                f"{ratios[0]:.2f} .. {ratios[-1]:.2f} | {self.remark} |")


HEADER = "| size | what | ours | HF | HF / ours | least .. most | |\n|---|---|---|---|---|---|---|"


def make_pair(
    size: str, device: str, dtype: torch.dtype, most: float = float("inf")
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VL]:
    """Hugging Face's model and ours with the very same tensors: those of tiny/, or random ones for at most so
    many layers of each tower.
    """
    if size == "tiny":
        hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(ROOT / "tiny", dtype=dtype).to(device)
        return hf, ours_of(hf)
    config = copy.deepcopy(SIZES[size])
    text, tower = config["text_config"], config["vision_config"]
    text["num_hidden_layers"] = min(most, text["num_hidden_layers"])
    if most < tower["depth"]:
        tower |= dict(depth=most, fullatt_block_indexes=[most - 1])
    with torch.device(device):
        hf = Qwen2_5_VLForConditionalGeneration._from_config(
            Qwen2_5_VLConfig(**config), dtype=dtype, attn_implementation="sdpa").eval()
    torch.manual_seed(0)
    for p in hf.parameters():
        p.normal_(0, 0.7 / p[0].numel() ** 0.5) if p.ndim > 1 else p.normal_(1, 0.1)
    return hf, ours_of(hf)


def ours_of(hf: Qwen2_5_VLForConditionalGeneration, attend: Attend = sdpa) -> Qwen2_5_VL:
    """Our model of the same config, with the very tensors of Hugging Face's."""
    with tempfile.TemporaryDirectory() as directory, torch.device("meta"):
        hf.config.save_pretrained(directory)
        ours = Qwen2_5_VL(load_config(directory), attend)
    state = {published_name(name): p for name, p in hf.state_dict().items()}
    if ours.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    ours.load_state_dict(state, strict=True, assign=True)
    return ours.eval().requires_grad_(False)


def picture(side: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    patches = side // 14
    pixels = torch.randn(patches**2, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    return pixels.to(device, dtype), torch.tensor([[1, patches, patches]])


def prompt(config: Config, side: int, text: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """A picture and some text, as a processor gives them."""
    pixels, grid = picture(side, dtype, device)
    words = torch.randint(0, 256, (text,), generator=torch.Generator().manual_seed(1)).tolist()
    image = [config.image_token_id] * (len(pixels) // 4)
    ids = torch.tensor([[*words[:8], *image, *words[8:]]], device=device)
    types = (ids == config.image_token_id).int()
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types,
                pixel_values=pixels, image_grid_thw=grid)


def ours_tokens(model: Qwen2_5_VL, inputs: dict, count: int, graph: bool | None = None) -> list[int]:
    return [ids.item() for ids in generate(model, inputs, count, graph=graph)]


def hf_tokens(model: Qwen2_5_VLForConditionalGeneration, inputs: dict, count: int, **settings) -> list[int]:
    model.model.rope_deltas = None
    inputs = {name: x.to(model.device) for name, x in inputs.items()}      # it wants the grids there, too
    out = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0,
                         **settings)
    return out[0, inputs["input_ids"].shape[1]:].tolist()


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return ((a - b).abs().max() / b.abs().max()).item()


def check(size: str, device: str, dtype: torch.dtype) -> None:
    """Raises ValueError where the two disagree about a picture and what follows it."""
    hf, ours = make_pair(size, device, dtype, most=4)
    inputs = prompt(ours.config, 280, 24, dtype, device)
    hf.model.rope_deltas = None
    there = {name: x.to(device) for name, x in inputs.items()}
    a, b, reason = ours(**inputs).float(), hf(**there, use_cache=False).logits.float(), None
    if dtype == torch.float32:
        if distance(a, b) > TOLERANCE:
            reason = f"logits differ by {distance(a, b):.1e}"
        elif ours_tokens(ours, inputs, 8) != hf_tokens(hf, inputs, 8):
            reason = "tokens differ"
    else:
        exact = ours.float()(**inputs)
        ours_off, hf_off = distance(a, exact), distance(b, exact)
        if max(ours_off, hf_off) > BFLOAT16_FACTOR * min(ours_off, hf_off):
            reason = f"from the float32 logits ours are {ours_off:.1e} away, HF's {hf_off:.1e}"
    if reason:
        raise ValueError(f"{size}: {reason}; no ratio for what does not agree")


def seconds(run: Callable[[], object], device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def compare(
    device: str, size: str, what: str, ours: Callable, hf: Callable,
    clock: Callable[[Callable, str], float] = seconds,
) -> Row:
    """Both timed in turns; on CUDA HF runs with and without cuDNN attention, and the better time counts."""
    row = Row(size, what)
    for pair in range(-1, PAIRS):       # the first is not counted
        mine, theirs = clock(ours, device), []
        for cudnn in (False, True) if device == "cuda" else (False,):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            theirs.append(clock(hf, device))
        torch.backends.cuda.enable_cudnn_sdp(False)
        if pair >= 0:
            row.ours.append(mine)
            row.hf.append(min(theirs))
    return row


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy on the device."""
    a = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * COPY_BYTES / median(seconds(lambda: b.copy_(a), device) for _ in range(10))


def bytes_per_token(model: Qwen2_5_VL) -> int:
    """What decoding a token has to read: every decoder layer and the head."""
    head = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    return head.weight.nbytes + sum(p.nbytes for p in model.model.layers.parameters())


def rows_of(size: str, device: str, dtype: torch.dtype, bandwidth: float) -> list[Row]:
    check(size, device, dtype)
    hf, ours = make_pair(size, device, dtype)
    cuda, threads, rows, timed = device == "cuda", torch.get_num_threads(), [], partial(compare, device, size)
    if size == "host":      # where the host is the limit and not the arithmetic
        torch.set_num_threads(1)
    if size not in ("3B", "7B", "32B"):
        with tempfile.TemporaryDirectory() as directory:
            hf.save_pretrained(directory)
            theirs = lambda: type(hf).from_pretrained(directory, dtype="auto").to(device)
            rows.append(timed("loading, file in memory", lambda: load_model(directory, device), theirs))
    for side in (896, 1792) if cuda else (224, 448):
        pixels, grid = picture(side, dtype, device)
        theirs = lambda: hf.model.visual(pixels, grid_thw=grid.to(device))
        rows.append(timed(f"vision, {side} x {side}", lambda: ours.visual(pixels, grid), theirs))
    inputs = prompt(ours.config, 896 if cuda else 224, 64, dtype, device)
    mine, theirs = lambda n: ours_tokens(ours, inputs, n), lambda n: hf_tokens(hf, inputs, n)
    rows.append(timed(f"first token of {inputs['input_ids'].shape[1]}", lambda: mine(1), lambda: theirs(1)))

    count = 64 if cuda else 8 if size == "layer" else 32
    per_token = lambda tokens, device: (        # an answer of count + 1 tokens less one of a single token
        seconds(lambda: tokens(count + 1), device) - seconds(lambda: tokens(1), device)) / count
    decode = timed("decode, per token", mine, theirs, per_token)
    decode.remark = f"{100 * bytes_per_token(ours) / bandwidth / median(decode.ours):.0f} % of copy bandwidth"
    rows.append(decode)
    if cuda:
        plain = lambda n: ours_tokens(ours, inputs, n, graph=False)
        static = lambda n: hf_tokens(hf, inputs, n, cache_implementation="static")
        if mine(count) != plain(count):
            raise ValueError(f"{size}: the graph and the plain loop give other tokens")
        slower = median(per_token(plain, device) for _ in range(PAIRS))
        decode.remark += f"; without graph {1e3 * slower:.3g} ms"
        for name, tokens in (("ours", mine), ("HF", theirs)):
            torch.cuda.reset_peak_memory_stats()
            tokens(8)
            decode.remark += f"; {name} {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        rows.append(timed("decode, HF static and compiled", mine, static, per_token))
    torch.set_num_threads(threads)
    return rows


def plot(path: Path, device: str, dtype: torch.dtype, bandwidth: float) -> None:
    """Cost against picture size and against context, for the widths of the 3B: ours, HF, and the limit."""
    from matplotlib import pyplot as plt
    hf, ours = make_pair("layer", device, dtype)
    sides, contexts, times, steps = (112, 224, 336, 448, 560, 672), (256, 1024, 2048, 4096), [], []
    for side in sides:
        pixels, grid = picture(side, dtype, device)
        theirs = lambda: hf.model.visual(pixels, grid_thw=grid.to(device))
        times.append(compare(device, "", "", lambda: ours.visual(pixels, grid), theirs))
    for context in contexts:
        x = torch.zeros(1, 1, 2048, dtype=dtype, device=device)
        position = torch.full((3, 1, 1), context, device=device)
        cache = KVCache(ours.config, 1, context + 2 * PAIRS + 8, device, dtype)
        cache.reserve(context)
        past = transformers.DynamicCache(config=hf.config.text_config)
        filled = torch.zeros(1, 2, context, 128, dtype=dtype, device=device)
        past.update(filled, filled, 0)
        theirs = lambda: hf.lm_head(hf.model.language_model(
            inputs_embeds=x, position_ids=position, past_key_values=past).last_hidden_state)
        steps.append(compare(device, "", "", lambda: ours.decode(x, position, None, cache), theirs))

    matrix = torch.randn(2048, 2048, dtype=dtype, device=device)
    flops = 2 * 2048**3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(10))
    count = lambda module: sum(p.numel() for p in module.parameters())
    tower = ours.visual         # the merger works on four patches at a time
    weights = count(tower.patch_embed) + count(tower.blocks) + count(tower.merger) / 4
    limits = [2 * weights * (side // 14) ** 2 / flops for side in sides]
    reads = [(bytes_per_token(ours) + 2 * 2 * 128 * context * x.itemsize) / bandwidth for context in contexts]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), facecolor="white")
    for axis, at, rows, limit, label, title in (
        (axes[0], sides, times, limits, "side of the picture, pixels", "What does a larger picture cost?"),
        (axes[1], contexts, steps, reads, "tokens in the cache", "What does a longer context cost?"),
    ):
        for values, style, color, name in (
            ([median(row.hf) for row in rows], "s--", "#D55E00", "Hugging Face"),
            ([median(row.ours) for row in rows], "o-", "#0072B2", "this implementation"),
            (limit, ":", "black", "limit of this machine"),
        ):
            axis.plot(at, [1e3 * value for value in values], style, color=color, label=name)
        axis.margins(y=0.1)
        axis.set(xlabel=label, ylabel="milliseconds", title=title)
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.suptitle(f"two vision blocks and one decoder layer of the 3B, {str(dtype)[6:]}, "
                    f"{device_name(device)}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"of tiny, {', '.join(SIZES)} "
                        f"(default: {', '.join(CPU_SIZES)})")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        help="(default: float32, on CUDA bfloat16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every timing there")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw cost against size and context instead")
    args = parser.parse_args()
    for size in args.sizes:
        if size not in SIZES and size != "tiny":
            parser.error(f"no size {size}; there are tiny, {', '.join(SIZES)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch finds no CUDA here")
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    bandwidth = copy_bandwidth(args.device)
    if args.plot:
        plot(args.plot, args.device, dtype, bandwidth)
        return 0
    about = dict(device=device_name(args.device), dtype=str(dtype), python=platform.python_version(),
                 torch=torch.__version__, transformers=transformers.__version__, copy_bandwidth=bandwidth)
    print("; ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in about.items()))
    print(HEADER, flush=True)
    rows, failed = [], 0
    for size in args.sizes or CPU_SIZES:
        try:
            rows += (new := rows_of(size, args.device, dtype, bandwidth))
            print("\n".join(row.text() for row in new), flush=True)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 1
    if args.json:
        args.json.write_text(json.dumps(about | dict(rows=[asdict(row) for row in rows]), indent=2) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
