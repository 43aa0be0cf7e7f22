"""Time this implementation against Hugging Face's, in one process, in turns, on the same tensors.

    python tools/benchmark.py                                       # CPU sizes, both dtypes: some minutes
    python tools/benchmark.py 7B 32B --device cuda --json out.json  # random weights need no download
    python tools/benchmark.py layer --plot assets/speed.png

"HF" is transformers with sdpa and without compilation; on CUDA its better time with and without cuDNN
attention, and for decoding a row more, with static cache and compilation. Only ratios count: machines differ,
and drift. Each is the median of twenty pairs, with the smallest and the largest. A size whose outputs
disagree (with four layers) gets no ratios: in float32 logits must agree to 1e-5 of the largest and tokens be
equal; in bfloat16 neither may be further from the float32 result than 1.5 times the other. On CUDA a step
that is replayed as a graph must give the very logits of the step itself.

Times per token are what twice as many tokens take more, so that neither the prompt nor a capture is in them.
The share of the copy bandwidth is that of the weights which a token has to read; the cache is not counted.
"""

import copy
import json
import platform
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hugging_face import config_dict, distance, hf_logits, ours_of

from load_weights import load_model
from model import Config, KVCache, Qwen2_5_VL
from sampling import capture, decode_step, generate, slots_needed

PAIRS = 20                  # of timings, in turns
TOLERANCE = 1e-5            # of logits in float32, of the largest
BFLOAT16_FACTOR = 1.5       # how much further off than the other's
COPY_BYTES = 2 * 2**30
CONTEXTS = (1024, 8192)     # tokens of a prompt, on CUDA

SMALL_TOWER = dict(depth=2, fullatt_block_indexes=[1])
NARROW_TOWER = SMALL_TOWER | dict(hidden_size=64, intermediate_size=128, num_heads=4)
SIZES = {
    "host": config_dict(64, 28, 4, 2, 128, 512, True, **NARROW_TOWER),
    "layer": config_dict(2048, 1, 16, 2, 11008, 151936, True, **SMALL_TOWER),
    "3B": config_dict(2048, 36, 16, 2, 11008, 151936, True),
    "7B": config_dict(3584, 28, 28, 4, 18944, 152064, False),
    "32B": config_dict(5120, 64, 40, 8, 27648, 152064, False, intermediate_size=3456),
}
CPU_SIZES = ("tiny", "host", "layer")
LARGE_SIZES = ("3B", "7B", "32B")


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
        ours = f"{1e3 * median(self.ours):.3g} ms"
        hf = f"{1e3 * median(self.hf):.3g} ms"
        return (f"| {self.size} | {self.what} | {ours} | {hf} | **{median(ratios):.2f}** | "
                f"{ratios[0]:.2f} .. {ratios[-1]:.2f} | {self.remark} |")


HEADER = "| size | what | ours | HF | HF / ours | least .. most | |\n|---|---|---|---|---|---|---|"


# ---------------------------------------------------------------------------- the two models

class Pair(NamedTuple):
    """Hugging Face's model and ours with the very same tensors."""
    size: str
    device: str
    dtype: torch.dtype
    hf: Qwen2_5_VLForConditionalGeneration
    ours: Qwen2_5_VL

    @property
    def name(self) -> str:
        return f"{self.size}, {str(self.dtype).removeprefix('torch.')}"


def make_pair(size: str, device: str, dtype: torch.dtype, most: float = float("inf")) -> Pair:
    """Both with the tensors of tiny/, or with random ones for at most so many layers of each tower."""
    if size == "tiny":
        hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(ROOT / "tiny", dtype=dtype).to(device)
        return Pair(size, device, dtype, hf, ours_of(hf))

    config = copy.deepcopy(SIZES[size])
    text = config["text_config"]
    text["num_hidden_layers"] = min(most, text["num_hidden_layers"])
    tower = config["vision_config"]
    if most < tower["depth"]:
        tower |= dict(depth=most, fullatt_block_indexes=[most - 1])

    # Random weights that keep activations at their size.
    with torch.device(device):
        hf = Qwen2_5_VLForConditionalGeneration._from_config(
            Qwen2_5_VLConfig(**config), dtype=dtype, attn_implementation="sdpa").eval()
    torch.manual_seed(0)
    for p in hf.parameters():
        if p.ndim > 1:
            p.normal_(0, 0.7 / p[0].numel() ** 0.5)
        else:
            p.normal_(1, 0.1)
    return Pair(size, device, dtype, hf, ours_of(hf))


def picture(config: Config, side: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Noise in the shape of a square picture's patches, and its grid."""
    tower = config.vision
    patches = side // tower.patch_size
    channels = tower.in_chans * tower.temporal_patch_size * tower.patch_size**2
    pixels = torch.randn(patches**2, channels, generator=torch.Generator().manual_seed(0))
    return pixels.to(device, dtype), torch.tensor([[1, patches, patches]])


def prompt(config: Config, side: int, text: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """A picture and some text, as a processor gives them."""
    pixels, grid = picture(config, side, dtype, device)
    image = [config.image_token_id] * (len(pixels) // config.vision.spatial_merge_size**2)
    words = torch.randint(0, 256, (text,), generator=torch.Generator().manual_seed(1)).tolist()

    ids = torch.tensor([[*words[:8], *image, *words[8:]]], device=device)
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == config.image_token_id).int(),
        pixel_values=pixels,
        image_grid_thw=grid,
    )


def text_prompt(config: Config, count: int, device: str) -> dict[str, Tensor]:
    """A prompt of random words, as a processor gives it."""
    ids = torch.randint(0, 256, (1, count), generator=torch.Generator().manual_seed(1)).to(device)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=torch.zeros_like(ids))


def on_device(inputs: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Hugging Face's model wants the grids there, too."""
    return {name: x.to(device) for name, x in inputs.items()}


def ours_tokens(pair: Pair, inputs: dict[str, Tensor], count: int, graph: bool | None = None) -> list[int]:
    return [ids.item() for ids in generate(pair.ours, inputs, count, graph=graph)]


def hf_tokens(pair: Pair, inputs: dict[str, Tensor], count: int, **settings) -> list[int]:
    pair.hf.model.rope_deltas = None        # left over from an earlier call
    out = pair.hf.generate(
        **on_device(inputs, pair.device),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )
    return out[0, inputs["input_ids"].shape[1]:].tolist()


# ---------------------------------------------------------------------------- do they agree?

def check(size: str, device: str, dtype: torch.dtype) -> None:
    """Raises ValueError where the two disagree about a picture and what follows it."""
    pair = make_pair(size, device, dtype, most=4)
    inputs = prompt(pair.ours.config, 280, 24, dtype, device)
    ours = pair.ours(**inputs).float()
    hf = hf_logits(pair.hf, on_device(inputs, device)).float()

    reason = None
    if dtype == torch.float32:
        if distance(ours, hf) > TOLERANCE:
            reason = f"logits differ by {distance(ours, hf):.1e}"
        elif ours_tokens(pair, inputs, 8) != hf_tokens(pair, inputs, 8):
            reason = "tokens differ"
    else:       # both round, and neither is right: how far is each from the float32 result?
        exact = pair.ours.float()(**inputs)
        ours_off = distance(ours, exact)
        hf_off = distance(hf, exact)
        if max(ours_off, hf_off) > BFLOAT16_FACTOR * min(ours_off, hf_off):
            reason = f"from the float32 logits ours are {ours_off:.1e} away, HF's {hf_off:.1e}"
    if reason:
        raise ValueError(f"{size}: {reason}; no ratio for what does not agree")


def check_graph(pair: Pair, context: int = 1000, steps: int = 4) -> None:
    """Raises ValueError if the graph of a step gives other logits than the same step run plainly."""
    # A cache with something in it.
    S = slots_needed(context, steps)
    cache = KVCache(pair.ours.config, 1, S, pair.device, pair.dtype)
    cache.k.normal_(generator=torch.Generator(pair.device).manual_seed(0))
    cache.v.normal_(generator=torch.Generator(pair.device).manual_seed(1))
    cache.reserve(context)

    # What the step reads and writes, as in `sampling.token_loop`.
    token = torch.zeros(1, 1, dtype=torch.int64, device=pair.device)
    position = torch.full_like(token, context)
    mask = torch.ones(1, S, dtype=torch.int64, device=pair.device)

    def step() -> Tensor:
        return decode_step(pair.ours, token, position, mask, cache)

    def run(step: Callable[[], Tensor]) -> list[Tensor]:
        """Logits of the steps from here on, each after another token; then back to where they began."""
        logits = []
        for n in range(steps):
            token.fill_(n)
            logits.append(step().clone())
        cache.length -= steps
        cache.end -= steps
        position.sub_(steps)
        return logits

    plain = run(step)
    replayed = run(capture(step, cache))        # the plain steps were the trial run that it needs
    for n in range(steps):
        if not torch.equal(replayed[n], plain[n]):
            off = distance(replayed[n].float(), plain[n].float())
            raise ValueError(f"{pair.size}: in step {n} the logits of the graph and of the plain step differ "
                             f"by {off:.1e}; no ratio for what does not agree")


# ---------------------------------------------------------------------------- the clock

def seconds(run: Callable[[], object], device: str) -> float:
    """How long `run` takes, until the device has done with it."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def seconds_per_token(answer: Callable[[int], object], device: str, count: int) -> float:
    """What an answer of twice as many tokens takes more, per token.

    The prompt and the capture of a graph are in both, and cancel out.
    """
    short = seconds(partial(answer, count), device)
    long = seconds(partial(answer, 2 * count), device)
    return (long - short) / count


def compare(
    pair: Pair, what: str, ours: Callable, hf: Callable, clock: Callable[[Callable, str], float] = seconds
) -> Row:
    """Both timed in turns; on CUDA HF runs with and without cuDNN attention, and the better time counts."""
    row = Row(pair.name, what)
    for number in range(-1, PAIRS):     # the first is not counted
        mine = clock(ours, pair.device)

        theirs = []
        for cudnn in (False, True) if pair.device == "cuda" else (False,):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            theirs.append(clock(hf, pair.device))
        torch.backends.cuda.enable_cudnn_sdp(False)

        if number >= 0:
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


# ---------------------------------------------------------------------------- the rows

def rows_of(size: str, device: str, dtype: torch.dtype, bandwidth: float) -> list[Row]:
    """Everything timed for a size. Raises ValueError where outputs disagree."""
    check(size, device, dtype)
    pair = make_pair(size, device, dtype)
    if device == "cuda":
        check_graph(pair)

    threads = torch.get_num_threads()
    if size == "host":      # where the host is the limit and not the arithmetic
        torch.set_num_threads(1)

    rows = [] if size in LARGE_SIZES else [loading_row(pair)]
    for side in (896, 1792) if device == "cuda" else (224, 448):
        rows.append(vision_row(pair, side))
    rows.append(first_row(pair))
    if device == "cuda":
        for context in CONTEXTS:
            rows += context_rows(pair, context, bandwidth)
    else:
        rows.append(decode_row(pair, bandwidth))
    torch.set_num_threads(threads)
    return rows


def loading_row(pair: Pair) -> Row:
    with tempfile.TemporaryDirectory() as directory:
        pair.hf.save_pretrained(directory)

        def ours() -> nn.Module:
            return load_model(directory, pair.device)

        def hf() -> nn.Module:
            return type(pair.hf).from_pretrained(directory, dtype="auto").to(pair.device)

        return compare(pair, "loading, file in memory", ours, hf)


def vision_row(pair: Pair, side: int) -> Row:
    pixels, grid = picture(pair.ours.config, side, pair.dtype, pair.device)

    def ours() -> Tensor:
        return pair.ours.visual(pixels, grid)

    def hf() -> object:
        return pair.hf.model.visual(pixels, grid_thw=grid.to(pair.device))

    return compare(pair, f"vision, {side} x {side}", ours, hf)


def question(pair: Pair) -> dict[str, Tensor]:
    return prompt(pair.ours.config, 896 if pair.device == "cuda" else 224, 64, pair.dtype, pair.device)


def first_row(pair: Pair) -> Row:
    """The first token of an answer about a picture."""
    inputs = question(pair)
    ours = partial(ours_tokens, pair, inputs, 1)
    hf = partial(hf_tokens, pair, inputs, 1)
    return compare(pair, f"first token of {inputs['input_ids'].shape[1]}", ours, hf)


def decode_row(pair: Pair, bandwidth: float) -> Row:
    """The tokens after it."""
    inputs = question(pair)
    clock = partial(seconds_per_token, count=32)
    ours = partial(ours_tokens, pair, inputs)
    hf = partial(hf_tokens, pair, inputs)
    row = compare(pair, "decode, per token", ours, hf, clock)
    row.remark = share(row, pair, bandwidth)
    return row


def context_rows(pair: Pair, context: int, bandwidth: float) -> list[Row]:
    """A prompt of so many words and the tokens after it, ours also without the graph, HF's also compiled."""
    inputs = text_prompt(pair.ours.config, context, pair.device)
    ours = partial(ours_tokens, pair, inputs)
    hf = partial(hf_tokens, pair, inputs)
    plain = partial(ours, graph=False)
    static = partial(hf, cache_implementation="static")
    clock = partial(seconds_per_token, count=32)

    prefill = compare(pair, f"prefill of {context}", partial(ours, 1), partial(hf, 1))
    prefill.remark = f"peak memory {peak_memory(ours)}, HF {peak_memory(hf)}"
    decode = [
        compare(pair, f"decode at {context}, graph", ours, hf, clock),
        compare(pair, f"decode at {context}, no graph", plain, hf, clock),
        compare(pair, f"decode at {context}, graph; HF static and compiled", ours, static, clock),
    ]
    for row in decode:
        row.remark = share(row, pair, bandwidth)
    return [prefill, *decode]


def share(row: Row, pair: Pair, bandwidth: float) -> str:
    """How near decoding comes to reading its weights as fast as a copy does."""
    return f"{100 * bytes_per_token(pair.ours) / bandwidth / median(row.ours):.0f} % of copy bandwidth"


def peak_memory(answer: Callable[[int], object]) -> str:
    """Of the card, weights included, for a few tokens."""
    torch.cuda.reset_peak_memory_stats()
    answer(8)
    return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"


# ---------------------------------------------------------------------------- the figure

def context_row(pair: Pair, context: int) -> Row:
    """One step of decoding after so many tokens, without choosing from its logits."""
    config = pair.ours.config
    x = torch.zeros(1, 1, config.hidden_size, dtype=pair.dtype, device=pair.device)
    position = torch.full((3, 1, 1), context, device=pair.device)

    cache = KVCache(config, 1, context + 2 * PAIRS + 8, pair.device, pair.dtype)
    cache.reserve(context)
    stored = cache.k[0, :, :, :context]
    past = transformers.DynamicCache(config=pair.hf.config.text_config)
    past.update(stored, stored, 0)

    def ours() -> Tensor:
        return pair.ours.logits(x, position, None, cache)

    def hf() -> Tensor:
        out = pair.hf.model.language_model(inputs_embeds=x, position_ids=position, past_key_values=past)
        return pair.hf.lm_head(out.last_hidden_state)

    return compare(pair, f"context of {context}", ours, hf)


def matrix_flops(device: str, dtype: torch.dtype, side: int = 2048) -> float:
    """Operations per second of a matrix product on the device."""
    matrix = torch.randn(side, side, dtype=dtype, device=device)
    return 2 * side**3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(10))


def vision_limit(model: Qwen2_5_VL, side: int, flops: float) -> float:
    """Seconds that the tower's matrix products alone take for a picture, attention left out."""
    tower = model.visual
    patches = (side // model.config.vision.patch_size) ** 2
    merged = patches // model.config.vision.spatial_merge_size**2
    products = 0
    for module, rows in ((tower.patch_embed, patches), (tower.blocks, patches), (tower.merger, merged)):
        products += rows * sum(p.numel() for p in module.parameters())
    return 2 * products / flops


def context_limit(model: Qwen2_5_VL, context: int, bandwidth: float) -> float:
    """Seconds that reading the weights and the cache alone takes for a token."""
    cache = KVCache(model.config, 1, context, "meta", model.dtype)
    return (bytes_per_token(model) + cache.nbytes) / bandwidth


def plot(path: Path, device: str, dtype: torch.dtype, bandwidth: float) -> None:
    """Cost against picture size and against context, for the widths of the 3B: ours, HF, and the limit."""
    from matplotlib import pyplot as plt
    pair = make_pair("layer", device, dtype)
    flops = matrix_flops(device, dtype)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), facecolor="white")

    sides = (112, 224, 336, 448, 560, 672)
    rows = [vision_row(pair, side) for side in sides]
    draw(left, sides, rows, [vision_limit(pair.ours, side, flops) for side in sides])
    left.set(xlabel="side of the picture, pixels", title="What does a larger picture cost?")

    contexts = (256, 1024, 2048, 4096)
    rows = [context_row(pair, context) for context in contexts]
    draw(right, contexts, rows, [context_limit(pair.ours, context, bandwidth) for context in contexts])
    right.set(xlabel="tokens in the cache", title="What does a longer context cost?")

    kind = str(dtype).removeprefix("torch.")
    figure.suptitle(f"two vision blocks and one decoder layer of the 3B, {kind}, {device_name(device)}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw(axis: Any, at: tuple[int, ...], rows: list[Row], limits: list[float]) -> None:
    """The medians of rows and the limits, in milliseconds over `at`."""
    hf = [1e3 * median(row.hf) for row in rows]
    ours = [1e3 * median(row.ours) for row in rows]
    axis.plot(at, hf, "s--", color="#D55E00", label="Hugging Face")
    axis.plot(at, ours, "o-", color="#0072B2", label="this implementation")
    axis.plot(at, [1e3 * limit for limit in limits], ":", color="black", label="limit of this machine")
    axis.margins(y=0.1)
    axis.set_ylabel("milliseconds")
    axis.set_ylim(bottom=0)
    axis.legend()


# ---------------------------------------------------------------------------- the program

def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    known = ("tiny", *SIZES)
    add("sizes", nargs="*", metavar="SIZE",
        help=f"of {', '.join(known)} (default: {', '.join(CPU_SIZES)})")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--dtype", choices=["float32", "bfloat16"], help="(default: both, on CUDA bfloat16)")
    add("--json", type=Path, metavar="FILE", help="write every timing there")
    add("--plot", type=Path, metavar="PNG", help="draw cost against size and context instead")
    args = parser.parse_args()

    for size in args.sizes:
        if size not in known:
            parser.error(f"no size {size}; there are {', '.join(known)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch finds no CUDA here")
    return args


def main() -> int:
    args = parse()
    names = ["bfloat16"] if args.device == "cuda" else ["float32", "bfloat16"]
    dtypes = [getattr(torch, name) for name in ([args.dtype] if args.dtype else names)]
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    bandwidth = copy_bandwidth(args.device)
    if args.plot:
        plot(args.plot, args.device, dtypes[0], bandwidth)
        return 0

    # The machine.
    about = dict(
        device=device_name(args.device),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    print("; ".join(f"{name} {value}" for name, value in about.items()), end="; ")
    print(f"copy bandwidth {bandwidth / 1e9:.3g} GB/s")
    print(HEADER, flush=True)

    # The table. A size that disagrees is left out of it, and the others go on.
    rows = []
    failed = 0
    for size, dtype in product(args.sizes or CPU_SIZES, dtypes):
        try:
            its_rows = rows_of(size, args.device, dtype, bandwidth)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 1
            continue
        print("\n".join(row.text() for row in its_rows), flush=True)
        rows += its_rows

    if args.json:
        about |= dict(copy_bandwidth=bandwidth, rows=[asdict(row) for row in rows])
        args.json.write_text(json.dumps(about, indent=2) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
