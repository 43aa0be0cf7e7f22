"""Logits become text: the generation loop, sampling, the CUDA graph, and the command line.

Read from the top: choosing a token from logits, one decoding step, the loop around it; then how ids are shown as text
while they come, and `main`. The loop knows no tokenizer. Two numbers run through it side by side: the slot in the cache,
which counts tokens and belongs to KVCache, and the MRoPE position, which a picture advances by less than its tokens.

Next: load_weights.py. Shapes: B batch, T prompt tokens.
"""

import argparse
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from load_weights import ATTENTIONS, checkpoint, load_generation_config, load_model
from model import KVCache, Qwen2_5_VL
from processing import Processor, load_processor

HERE = Path(__file__).parent
DEMO_MODEL, DEMO_IMAGE, DEMO_PROMPT = HERE / "tiny", HERE / "assets" / "demo.png", "Describe the image."
GREEDY_BELOW = 1e-5     # a temperature under it means argmax: the published 1e-6 divides float32 logits to nothing else


def choose(
    logits: Tensor, seen: Tensor, temperature: float, top_k: int, top_p: float, repetition_penalty: float,
    generator: torch.Generator | None,
) -> Tensor:
    """The next token (B,) from logits (B, vocab); seen (B, vocab) marks ids that have occurred.

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
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1.0:
        ascending, order = logits.sort()
        unlikely = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        unlikely[:, -1] = False                                         # the likeliest always stays
        logits = logits.masked_fill(unlikely.scatter(1, order, unlikely), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def decode_step(model: Qwen2_5_VL, token: Tensor, position: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
    """Logits (B, vocab) after one more token (B, 1) of every row; moves position (B, 1) on, in place.

    Text moves all three axes together. Everything is on the device and no value is looked at: it can be captured.
    """
    logits = model.decode(model.embed(token), position.expand(3, -1, -1), mask, cache, last_only=True)
    position += 1
    return logits[:, -1]


def capture(step: Callable[[], Tensor], cache: KVCache) -> Callable[[], Tensor]:
    """`step` as a CUDA graph: the same kernels on the same addresses, without the thousand launches from Python.

    Those take the host longer than the card needs for the work, so that a small model's decoding is bound by them. The
    cache must be empty, and is so afterwards.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):      # a few runs first: libraries allocate and choose kernels when first called
        for _ in range(3):
            cache.clear()
            step()
    torch.cuda.current_stream().wait_stream(aside)
    cache.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    cache.clear()

    def replay() -> Tensor:
        graph.replay()                  # writes into `logits`, and moves cache.end and the position on the device
        cache.length += 1               # the host's count is not part of the graph
        return logits
    return replay


@torch.no_grad()
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
    """The answer to a processor's inputs, a token of every row at a time: (B,) int64 on the CPU, eos included.

    A row that has met one of eos_token_id yields pad_token_id; the iterator ends when every row has, or after
    max_new_tokens. temperature 0 is greedy, top_k 0 and top_p 1 leave all tokens in; the penalty is for ids of prompt and
    answer. graph: replay a CUDA graph for each token (None: where there is CUDA). Raises ValueError for settings without
    sense and where prompt and answer are longer than the model's context.
    """
    config, device, dtype = model.config, model.model.norm.weight.device, model.model.norm.weight.dtype
    input_ids = inputs["input_ids"]
    attention_mask = inputs.get("attention_mask", torch.ones_like(input_ids))
    B, T = input_ids.shape
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens}: must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature {temperature}: must be 0 (greedy) or above")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: must be above 0 and at most 1")
    if T + max_new_tokens > config.max_position_embeddings:
        raise ValueError(f"a prompt of {T} tokens and {max_new_tokens} new ones exceed the context of "
                         f"{config.max_position_embeddings}; use fewer new tokens, fewer or smaller pictures")
    media = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if name in inputs}
    position_ids, next_position = model.positions(input_ids, attention_mask, **media)

    # Grids stay on the CPU: the tower cuts windows by them and never waits for the device.
    grids = {name: grid for name, grid in media.items() if name.endswith("grid_thw")}
    pixels = {name: inputs[name].to(device) for name in ("pixel_values", "pixel_values_videos") if name in inputs}
    input_ids, position_ids, mask = input_ids.to(device), position_ids.to(device), attention_mask.to(device)
    cache = KVCache(config, B, T + max_new_tokens, device, dtype)
    token, position = input_ids[:, -1:].clone(), next_position[:, None].to(device)
    whole_mask = torch.cat((mask, mask.new_ones(B, max_new_tokens)), dim=1)
    seen = torch.zeros(B, config.vocab_size, dtype=torch.int64, device=device)
    seen = seen.scatter_add(1, input_ids, mask.long()).bool()                   # pads have not been said
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    replay = None
    if graph or (graph is None and device.type == "cuda"):
        start = position.clone()
        replay = capture(lambda: decode_step(model, token, position, whole_mask, cache), cache)
        position.copy_(start)
    x = model.embed(input_ids, **pixels, **grids)
    unpadded = attention_mask.all()
    logits = model.decode(x, position_ids, None if unpadded else mask, cache, last_only=True)[:, -1]
    del x, pixels

    ends = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id))
    over = torch.zeros(B, dtype=torch.bool)
    for n in range(max_new_tokens):
        if n > 0:
            logits = replay() if replay else decode_step(
                model, token, position, whole_mask[:, :cache.length + 1], cache)
        chosen = choose(logits, seen, temperature, top_k, top_p, repetition_penalty, generator)
        token.copy_(chosen[:, None])
        seen.scatter_(1, token, True)
        ids = chosen.cpu().masked_fill(over, pad_token_id)                      # the one wait for the device
        yield ids
        over |= torch.isin(ids, ends)
        if over.all():
            return


# ---------------------------------------------------------------------------- the command line

# What a terminal would obey instead of show: control characters but tab and newline, and overrides of direction.
UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def text_of(tokens: Iterable[int], processor: Processor) -> Iterator[str]:
    """Text as it comes: a character made of several tokens appears when it is whole."""
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
    """Says on stderr, from the second second on, what is being waited for."""
    done = threading.Event()

    def tick() -> None:
        started, shown = time.perf_counter(), False
        while not done.wait(2 if not shown else 1):
            if sys.stderr.isatty():
                print(f"\r{what} ... {time.perf_counter() - started:.0f} s", end="", file=sys.stderr, flush=True)
            elif not shown:
                print(f"{what} ...", file=sys.stderr, flush=True)
            shown = True
        if shown and sys.stderr.isatty():
            print(file=sys.stderr)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(f"{message}; see python generate.py --help")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="generate.py", allow_abbrev=False, description="Ask Qwen2.5-VL about pictures. Without "
                    "arguments the tiny checkpoint describes the demo picture. The answer goes to stdout.")
    add = parser.add_argument
    add("--model", help="a checkpoint's directory or hub id, e.g. Qwen/Qwen2.5-VL-7B-Instruct (default: tiny/)")
    add("--image", action="append", default=[], metavar="PATH", help="a picture; repeatable, in order")
    add("--video", metavar="PATH", help="a folder of frames (give --fps) or an animated GIF, WebP or PNG")
    add("--fps", type=float, help="frames per second: of a folder as taken, of an animation to sample (default: 2)")
    add("--prompt", help=f"the question; - reads it from stdin (default: {DEMO_PROMPT!r})")
    add("--system", help="the system prompt (default: the template's)")
    add("--max-new-tokens", type=int, default=256, metavar="N")
    add("--temperature", type=float, help="0 is greedy (default: the checkpoint's)")
    add("--top-p", type=float, help="(default: the checkpoint's)")
    add("--seed", type=int, help="makes sampling repeatable")
    add("--max-pixels", type=int, metavar="N", help="shrink larger pictures; a token takes 784 pixels")
    add("--device", default="auto", help="cuda, cpu (default: cuda where there is one)")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float32", "float16"], help="(default: the checkpoint's)")
    add("--attention", default="sdpa", choices=list(ATTENTIONS), help="fused kernels, or written out")
    add("--no-graph", action="store_true", help="launch every kernel from Python instead of replaying a CUDA graph")
    return parser.parse_args(argv)


def messages_of(args: argparse.Namespace) -> list[dict]:
    """The conversation that the arguments ask for: pictures first, in order, then the prompt, in one user turn."""
    images = args.image
    if args.model is None and not images and not args.video:
        images = [DEMO_IMAGE]
    content = [{"type": "image", "image": image} for image in images]
    if args.video:
        content.append({"type": "video", "video": args.video} | ({"fps": args.fps} if args.fps is not None else {}))
    if not content and args.prompt is None:
        raise ValueError("nothing to answer; give --prompt, --image or --video")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    content.append({"type": "text", "text": DEMO_PROMPT if prompt is None else prompt})
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": content}]


def run(args: argparse.Namespace) -> None:
    messages = messages_of(args)
    note = lambda text: print(text, file=sys.stderr, flush=True)
    *pictures, question = [item.get("image") or item.get("video") or item["text"] for item in messages[-1]["content"]]
    if args.model is None:
        shown = [os.path.relpath(path) for path in (DEMO_MODEL, *pictures)]
        note(f"{shown[0]} is asked about {', '.join(shown[1:])}: {question}")
    with progress("loading"):
        path = checkpoint(args.model or DEMO_MODEL)
        processor = load_processor(path, max_pixels=args.max_pixels)
        inputs = processor(messages)
        dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
        model = load_model(path, args.device, dtype, args.attention)
    settings = load_generation_config(path)
    settings |= {name: value for name in ("temperature", "top_p", "seed") if (value := getattr(args, name)) is not None}

    device, T = model.model.norm.weight.device, inputs["input_ids"].shape[1]
    weights = sum(p.nbytes for p in model.parameters())
    cache = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim \
        * (T + args.max_new_tokens) * model.model.norm.weight.itemsize
    sizes = [f"{w * processor.patch_size}x{h * processor.patch_size}" + (f"x{t * 2} frames" if t > 1 else "")
             for name in ("image_grid_thw", "video_grid_thw") for t, h, w in inputs.get(name, torch.empty(0, 3)).tolist()]
    note(f"resized to {', '.join(sizes) or 'nothing'}; {T} tokens; weights {weights / 1e9:.3f} GB, "
         f"cache {cache / 1e9:.3f} GB, {model.model.norm.weight.dtype} on {device}")

    started, times = time.perf_counter(), []

    def tokens() -> Iterator[int]:
        steps = generate(model, inputs, args.max_new_tokens, **settings, graph=False if args.no_graph else None)
        with progress("reading the prompt"):
            first = next(steps)
        for ids in (i for part in ([first], steps) for i in part):
            times.append(time.perf_counter())
            yield ids.item()

    for text in text_of(tokens(), processor):
        sys.stdout.write(UNSHOWN.sub("", text))
        sys.stdout.flush()
    print(flush=True)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
    speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0
    note(f"first token after {times[0] - started:.2f} s, {len(times)} tokens, then {speed:.1f} a second; "
         f"peak memory {peak / 1e9:.2f} GB")


def peak_memory() -> int:
    """Bytes of this process at most so far; ru_maxrss counts kilobytes, on macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    torch.backends.cuda.enable_cudnn_sdp(False)     # it plans anew, for 0.4 s, whenever the number of tokens changes
    try:
        run(parse(argv))
        return 0
    except torch.OutOfMemoryError:
        print("error: out of memory; use --max-pixels for smaller pictures or --dtype bfloat16", file=sys.stderr)
        return 2
    except BrokenPipeError:                         # the reader has seen enough, as in `generate.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {UNSHOWN.sub('', str(error)).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
