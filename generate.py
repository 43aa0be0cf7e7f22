"""Logits become text: choosing tokens, the loop, the CUDA graph, and the command line.

Read from the top: how a token is chosen, one decoding step, the loop around it; then how ids become text as
they come, and `main`. The loop knows no tokenizer. Two counters run through it side by side: the slot in the
cache, which counts tokens, and the MRoPE position, which a picture moves on by less than its tokens.

Next: load_weights.py. Shapes: B batch, T prompt tokens.
"""

import argparse
import math
import os
import re
import resource
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from load_weights import ATTENTIONS, checkpoint, load_config, load_generation_config, load_model
from model import KVCache, Qwen2_5_VL
from processing import Processor, load_processor

GREEDY_BELOW = 1e-5     # a lower temperature is argmax: published checkpoints say 1e-6 and mean that


def sample(
    logits: Tensor, seen: Tensor, temperature: float, top_k: int, top_p: float, repetition_penalty: float,
    generator: torch.Generator | None,
) -> Tensor:
    """The next token (B,) from logits (B, vocab); seen (B, vocab) marks the ids that have occurred.

    In Hugging Face's order and arithmetic: float32, penalty, temperature, top-k, top-p.
    """
    logits = logits.float()
    if repetition_penalty != 1.0:
        penalised = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if temperature < GREEDY_BELOW:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ascending, order = logits.sort()
        unlikely = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        unlikely[:, -1] = False                                     # the likeliest token always stays
        unlikely = unlikely.scatter(1, order, unlikely)             # back from sorted order
        logits = logits.masked_fill(unlikely, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def decode_step(
    model: Qwen2_5_VL, token: Tensor, position: Tensor, mask: Tensor | None, cache: KVCache
) -> Tensor:
    """Logits (B, vocab) after one more token (B, 1) in every row; moves position (B, 1) on, in place.

    Everything stays on the device and no value is looked at, so that the step can be captured.
    """
    axes = position.expand(3, -1, -1)       # text moves all three alike
    logits = model.decode(model.embed(token), axes, mask, cache, last_only=True)
    position += 1
    return logits[:, -1]


def capture(step: Callable[[], Tensor], cache: KVCache) -> Callable[[], Tensor]:
    """`step` as a CUDA graph: the same kernels at the same addresses, launched all at once.

    One token of the 7B takes about a thousand kernels, and launching them from Python one by one takes the
    host longer than the card needs to run them. The cache must be empty, and is so again afterwards.
    """
    with torch.cuda.device(cache.k.device):
        # A stream of its own for the capture, and for a few runs before it, in which libraries allocate.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step()
                cache.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            logits = step()
        torch.cuda.current_stream().wait_stream(aside)
    cache.clear()

    def replay() -> Tensor:
        graph.replay()                      # writes `logits`, and moves cache.end and the position
        cache.length += 1                   # the host's own count is not in the graph
        return logits
    return replay


def generate(
    model: Qwen2_5_VL,
    inputs: dict[str, Tensor],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | Iterable[int] = (),
    pad_token_id: int = 0,
    graph: bool | None = None,
) -> Iterator[Tensor]:
    """The answer to a processor's inputs, a token of every row at a time: (B,) int64 on the CPU, eos too.

    A row that has met one of eos_token_id yields pad_token_id; the iterator ends when every row has, or after
    max_new_tokens. Temperature 0 is greedy; top_k 0 and top_p 1 leave every token in; repetition_penalty
    concerns the ids of prompt and answer, not pads. graph: replay a CUDA graph for each token (None: where
    there is CUDA). HF: GenerationMixin.generate.
    Raises ValueError for meaningless settings, and where prompt and answer exceed the context.
    """
    T, limit = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    for name, value, right, wanted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or above"),
        ("top_k", top_k, top_k >= 0, "0 (all) or above"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0"),
        ("seed", seed, seed is None or 0 <= seed < 2**64, "from 0 to 2**64 - 1"),
    ):
        if not right:
            raise ValueError(f"{name} {value}: must be {wanted}")
    if T + max_new_tokens > limit:
        raise ValueError(f"a prompt of {T} tokens and {max_new_tokens} new ones exceed the context of "
                         f"{limit}: use fewer new tokens, or fewer or smaller pictures")

    device = model.model.norm.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    choose = lambda logits, seen: sample(
        logits, seen, temperature, top_k, top_p, repetition_penalty, generator)
    eos = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id))
    if graph is None:
        graph = device.type == "cuda" and max_new_tokens > 1
    return token_loop(model, inputs, max_new_tokens, choose, eos, pad_token_id, graph)


@torch.inference_mode()
def token_loop(
    model: Qwen2_5_VL, inputs: dict[str, Tensor], max_new_tokens: int,
    choose: Callable[[Tensor, Tensor], Tensor], eos: Tensor, pad_token_id: int, graph: bool,
) -> Iterator[Tensor]:
    """The loop of `generate`; choose(logits, seen) says the next tokens."""
    # Grids stay on the CPU: the vision tower cuts its windows by them and so never waits for the device.
    input_ids, weight = inputs["input_ids"], model.model.norm.weight
    grids = {name: grid for name, grid in inputs.items() if name.endswith("grid_thw")}
    pixels = {name: x.to(weight.device) for name, x in inputs.items() if name.startswith("pixel_values")}
    attention_mask = inputs.get("attention_mask", torch.ones_like(input_ids)).long()
    position_ids, next_position = model.positions(
        input_ids, attention_mask, **grids, second_per_grid_ts=inputs.get("second_per_grid_ts"))

    B, T = input_ids.shape
    unpadded = bool(attention_mask.all())
    mask = torch.cat((attention_mask, attention_mask.new_ones(B, max_new_tokens)), dim=1)
    input_ids, position_ids, mask = (x.to(weight.device) for x in (input_ids, position_ids, mask))
    cache = KVCache(model.config, B, T + max_new_tokens, weight.device, weight.dtype)
    token, position = input_ids.new_zeros(2, B, 1)      # buffers that every step reads
    seen = torch.zeros(B, model.config.vocab_size, dtype=torch.int64, device=weight.device)
    seen = seen.scatter_add(1, input_ids, mask[:, :T]) > 0          # pads have not been said

    if graph:       # before the prompt, because its trial runs write into the cache and move the position
        step = capture(lambda: decode_step(model, token, position, mask, cache), cache)
    else:
        step = lambda: decode_step(
            model, token, position, None if unpadded else mask[:, :cache.length + 1], cache)

    position.copy_(next_position[:, None])
    x = model.embed(input_ids, **pixels, **grids)
    logits = model.decode(x, position_ids, None if unpadded else mask[:, :T], cache, last_only=True)[:, -1]
    del x, pixels
    finished = torch.zeros(B, dtype=torch.bool)
    for n in range(max_new_tokens):
        if n > 0:
            logits = step()
        token.copy_(choose(logits, seen)[:, None])
        seen.scatter_(1, token, True)
        ids = token[:, 0].cpu().masked_fill(finished, pad_token_id)     # the one wait for the device
        yield ids
        finished = finished | torch.isin(ids, eos)
        if finished.all():
            return


# ---------------------------------------------------------------------------- text, as it comes

# What a terminal obeys instead of showing: control characters except tab and newline, text direction marks.
UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def stream_text(tokens: Iterable[int], processor: Processor) -> Iterator[str]:
    """The text of token ids in pieces, each of whole characters: some take several tokens."""
    ids = []
    for token in tokens:
        ids.append(token)
        text = processor.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text
            ids = []
    yield processor.decode(ids)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Says on stderr what is being done, once it has taken two seconds."""
    timer = threading.Timer(2, print, [f"{what} ..."], dict(file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---------------------------------------------------------------------------- the command line

HERE = Path(__file__).parent
DEMO_MODEL, DEMO_IMAGE, DEMO_PROMPT = HERE / "tiny", HERE / "assets" / "demo.png", "Describe the image."


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see python generate.py --help")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="generate.py", allow_abbrev=False, description="Ask Qwen2.5-VL about pictures and "
                    "videos; without arguments the tiny checkpoint describes the demo picture.")
    add = parser.add_argument
    add("--model", help="a checkpoint's directory or hub id, as Qwen/Qwen2.5-VL-7B-Instruct (default: tiny/)")
    add("--image", action="append", default=[], metavar="PATH", help="a picture; repeatable, in order")
    add("--video", metavar="PATH", help="a folder of frames (with --fps) or an animated GIF, WebP or PNG")
    add("--fps", type=float, help="frames per second: of a folder, as taken; of an animation, as sampled")
    add("--prompt", help=f"the question; - reads stdin (default: {DEMO_PROMPT!r})")
    add("--system", help="the system prompt (default: the template's)")
    add("--max-new-tokens", type=int, default=256, metavar="N")
    add("--temperature", type=float, help="0 is greedy (default: the checkpoint's)")
    add("--top-p", type=float, help="(default: the checkpoint's)")
    add("--seed", type=int, help="makes sampling repeatable")
    add("--max-pixels", type=int, metavar="N", help="shrink larger pictures; 784 pixels become a token")
    add("--device", default="auto", help="cuda or cpu (default: cuda where there is one)")
    add("--dtype", default="auto", help="bfloat16 or float32 (default: the checkpoint's)")
    add("--attention", default="sdpa", choices=list(ATTENTIONS), help="fused kernels, or written out")
    add("--no-graph", action="store_true", help="launch kernels one by one instead of replaying a CUDA graph")
    return parser.parse_args(argv)


def build_messages(args: argparse.Namespace) -> list[dict]:
    """The conversation that the arguments ask for: pictures in order, then the prompt, in one user turn."""
    demo = args.model is None and not args.image and args.video is None
    content = [{"type": "image", "image": path} for path in ([DEMO_IMAGE] if demo else args.image)]
    if args.video is not None:
        content.append({"type": "video", "video": args.video, "fps": args.fps, "max_pixels": args.max_pixels})
    if not content and args.prompt is None:
        raise ValueError("nothing to answer; give --prompt, --image or --video")
    if args.fps is not None and args.video is None:
        raise ValueError("--fps without --video; give --video, or leave --fps out")
    prompt = DEMO_PROMPT if args.prompt is None else args.prompt
    if prompt == "-":
        prompt = sys.stdin.read() if sys.stdin else ""      # None where it is closed
    if not prompt.strip():
        raise ValueError("the prompt is empty; ask something")
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]


def line_before(model: Qwen2_5_VL, inputs: dict[str, Tensor], patch_size: int, max_new_tokens: int) -> str:
    """The line before an answer: sizes of pictures and videos in pixels, tokens, bytes."""
    weight, T = model.model.norm.weight, inputs["input_ids"].shape[1]
    grids = [grid for name in ("image_grid_thw", "video_grid_thw") for grid in inputs.get(name, [])]
    sizes = ", ".join(f"{w * patch_size}x{h * patch_size}" + (f" in {t} steps" if t > 1 else "")
                      for t, h, w in grids)
    weights = sum(p.nbytes for p in model.parameters())
    cache = 2 * KVCache(model.config, 1, T + max_new_tokens, "meta", weight.dtype).k.nbytes
    return (f"{sizes or 'no picture'}; {T} tokens; weights {weights / 1e9:.3f} GB, "
            f"cache {cache / 1e9:.3f} GB, {weight.dtype} on {weight.device}")


def line_after(times: list[float], device: torch.device) -> str:
    """The line after an answer, from the times of its start and of every token."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:       # in kilobytes, on macOS in bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    start, first, last, count = times[0], times[1], times[-1], len(times) - 1
    speed = f", then {(count - 1) / (last - first):.0f} a second" if count > 1 else ""
    return f"first token after {first - start:.2f} s{speed}; {count} tokens; peak memory {peak / 1e9:.2f} GB"


def run(args: argparse.Namespace) -> None:
    messages, note = build_messages(args), lambda text: print(text, file=sys.stderr, flush=True)
    with progress("loading"):
        path = checkpoint(DEMO_MODEL if args.model is None else args.model)
        tower = load_config(path).vision    # first: another model is refused as such, not for its tokenizer
        processor = load_processor(path, max_pixels=args.max_pixels)
        if (processor.patch_size, processor.temporal_patch_size, processor.merge_size) != (
                tower.patch_size, tower.temporal_patch_size, tower.spatial_merge_size):
            raise ValueError(f"{path}: its preprocessor and config.json differ in patches; get both again")
        inputs = processor(messages)
        model = load_model(path, args.device, args.dtype, args.attention)
    given = dict(temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    settings = load_generation_config(path) | {name: x for name, x in given.items() if x is not None}
    steps = generate(model, inputs, args.max_new_tokens, **settings, graph=False if args.no_graph else None)
    if args.model is None:
        *media, question = messages[-1]["content"]
        names = [os.path.relpath(item.get("image") or item["video"]) for item in media]
        note(f"{os.path.relpath(path)} is asked about {', '.join(names)}: {question['text']}")
    note(line_before(model, inputs, processor.patch_size, args.max_new_tokens))

    times = [time.perf_counter()]

    def tokens() -> Iterator[int]:
        with progress("reading"):
            first = next(steps)
        for ids in chain([first], steps):
            times.append(time.perf_counter())
            yield ids.item()

    for text in stream_text(tokens(), processor):
        print(UNSHOWN.sub("", text), end="", flush=True)
    print(flush=True)
    note(line_after(times, model.model.norm.weight.device))


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    sys.stderr = sys.stderr or open(os.devnull, "w")        # closed: print would fall back on stdout
    warnings.filterwarnings("ignore", module="PIL")         # about files that it can still read
    torch.backends.cuda.enable_cudnn_sdp(False)             # it plans for 0.4 s at each new length
    try:
        run(parse(argv))
        return 0
    except RuntimeError as error:
        if not re.search("out of memory|allocate memory", str(error)):      # CUDA's, the CPU's
            raise
        print("error: out of memory; use a smaller --max-pixels or --dtype bfloat16", file=sys.stderr)
        return 2
    except BrokenPipeError:                         # the reader has seen enough, as in `generate.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {UNSHOWN.sub('', str(error)).replace(chr(10), ' ')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
