"""The program: a picture and a question on the command line, the answer on stdout. It shows how the parts are
used together: `run` is the core, the rest is user interface.

    python generate.py --model Qwen/Qwen2.5-VL-7B-Instruct --image photo.jpg --prompt "What is on the table?"

Read from the top: the arguments, the conversation they stand for, what is said before and after an answer,
text as it comes, `run`, and `main`, which turns errors into one line. The last file.
"""

import argparse
import os
import re
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

from load_weights import (
    ATTENTIONS,
    checkpoint,
    load_config,
    load_generation_config,
    load_model,
    load_processor,
)
from model import KVCache, Qwen2_5_VL
from processing import Processor
from sampling import Sampler, check_length, generate, slots_needed

try:
    import resource
except ImportError:         # on Windows
    resource = None

HERE = Path(__file__).parent
DEMO_MODEL = HERE / "tiny"
DEMO_IMAGE = HERE / "assets" / "demo.png"
DEMO_PROMPT = "Describe the image."

# What a terminal acts on instead of showing: control characters except tab and newline, direction marks.
UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


# ---------------------------------------------------------------------------- the arguments

class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see python generate.py --help")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="generate.py", allow_abbrev=False, description="Ask Qwen2.5-VL about pictures and "
                    "videos; without arguments the tiny checkpoint describes the demo picture.")
    add = parser.add_argument

    # What to ask.
    add("--image", action="append", default=[], metavar="PATH", help="a picture; repeatable, in order")
    add("--video", metavar="PATH", help="a folder of frames (with --fps) or an animated GIF, WebP or PNG")
    add("--fps", type=float, help="frames per second: of a folder, as taken; of an animation, as sampled")
    add("--max-pixels", type=int, metavar="N", help="shrink larger pictures; 784 pixels become a token")
    add("--prompt", help=f"the question; - reads stdin (default: {DEMO_PROMPT!r})")
    add("--system", help="the system prompt (default: the template's)")

    # How to answer.
    add("--max-new-tokens", type=int, default=256, metavar="N")
    add("--temperature", type=float, help="0 is greedy (default: the checkpoint's)")
    add("--top-p", type=float, help="(default: the checkpoint's)")
    add("--seed", type=int, help="makes sampling repeatable")

    # Which model to ask.
    add("--model", help="a directory or hub id, such as Qwen/Qwen2.5-VL-3B-Instruct (default: tiny)")
    add("--device", default="auto", metavar="NAME",
        help="cuda, cuda:1, cpu; mps, xpu and others untested (default: cuda if there is one, else cpu)")
    add("--dtype", default="auto", help="bfloat16 or float32 (default: the checkpoint's)")
    add("--attention", default="sdpa", choices=list(ATTENTIONS), help="fused kernels, or written out")
    add("--no-graph", action="store_true", help="launch kernels one by one instead of replaying a CUDA graph")
    return parser.parse_args(argv)


def media_items(args: argparse.Namespace) -> list[dict]:
    """The pictures and the video that the arguments ask for, as items of a message."""
    if args.fps is not None and args.video is None:
        raise ValueError("--fps without --video; give --video, or leave --fps out")
    demo = args.model is None and not args.image and args.video is None
    items = [{"type": "image", "image": path} for path in ([DEMO_IMAGE] if demo else args.image)]
    if args.video is not None:
        items.append({"type": "video", "video": args.video, "fps": args.fps, "max_pixels": args.max_pixels})
    if not items and args.prompt is None:
        raise ValueError("nothing to answer; give --prompt, --image or --video")
    return items


def question(prompt: str | None) -> str:
    """The question that --prompt stands for."""
    if prompt is None:
        return DEMO_PROMPT
    if prompt == "-":
        prompt = sys.stdin.read() if sys.stdin else ""      # None if it is closed
        prompt = re.sub(r"\r?\n\Z", "", prompt)             # echo adds one
    if not prompt.strip():
        raise ValueError("the prompt is empty; ask something")
    return prompt


# ---------------------------------------------------------------------------- what is said on stderr

def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def note_warning(message: Warning, *where: object) -> None:
    note(f"warning: {message}")


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Says on stderr what is being done, once it has taken two seconds."""
    timer = threading.Timer(2, note, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()        # it may be printing right now


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Turns running out of memory into a user error that says what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # As Python says it, or in the words of CUDA or the CPU.
        known = isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error))
        if not known:
            raise
        raise ValueError(f"out of memory; {remedy}") from None


def line_before(model: Qwen2_5_VL, inputs: dict[str, Tensor], max_new_tokens: int) -> str:
    """The line before an answer: sizes of pictures and videos in pixels, tokens, bytes."""
    patch = model.config.vision.patch_size
    sizes = []
    for name in ("image_grid_thw", "video_grid_thw"):
        for t, h, w in inputs.get(name, []):
            sizes.append(f"{w * patch}x{h * patch}" + (f" in {t} steps" if t > 1 else ""))

    T = inputs["input_ids"].shape[1]
    cache = KVCache(model.config, 1, slots_needed(T, max_new_tokens), "meta", model.dtype)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    return (f"{', '.join(sizes) or 'no picture'}; {T} tokens; weights {weights / 1e9:.3f} GB, "
            f"cache {cache.nbytes / 1e9:.3f} GB, {model.dtype} on {model.device}")


def line_after(start: float, times: list[float], device: torch.device) -> str:
    """The line after an answer that began at `start`, from the time of every token."""
    line = f"first token after {times[0] - start:.2f} s"
    if len(times) > 1:
        line += f", then {(len(times) - 1) / (times[-1] - times[0]):.0f} a second"
    line += f"; {len(times)} tokens"

    # Peak memory of the device, or else of the process.
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    elif resource is not None:      # in kilobytes, on macOS in bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        return line
    return f"{line}; peak memory {peak / 1e9:.2f} GB"


# ---------------------------------------------------------------------------- text, as it comes

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


# ---------------------------------------------------------------------------- the program

def run(args: argparse.Namespace, load: Callable[..., Qwen2_5_VL]) -> None:
    # What to ask.
    media = media_items(args)
    prompt = question(args.prompt)
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": prompt}]}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})

    # Which model to ask.
    with progress("loading"):
        path = checkpoint(DEMO_MODEL if args.model is None else args.model)
        processor = load_processor(path, max_pixels=args.max_pixels)

        # How to answer: what the checkpoint says, unless a flag says otherwise.
        settings = load_generation_config(path)
        for name in ("temperature", "top_p", "seed"):
            if getattr(args, name) is not None:
                settings[name] = getattr(args, name)

        # Numbers that make no sense are refused now: reading the weights may take minutes.
        Sampler(**{name: value for name, value in settings.items() if not name.endswith("token_id")})
        inputs = processor(messages)
        check_length(inputs["input_ids"].shape[1], args.max_new_tokens, load_config(path))
        with enough_memory("use --dtype bfloat16, a smaller checkpoint or a larger card"):
            model = load(path, args.device, args.dtype, args.attention)

    graph = False if args.no_graph else None
    steps = generate(model, inputs, max_new_tokens=args.max_new_tokens, graph=graph, **settings)

    if args.model is None:
        names = ", ".join(os.path.relpath(item.get("image") or item["video"]) for item in media)
        note(f"{os.path.relpath(path)} is asked about {names}: {prompt}")
    note(line_before(model, inputs, args.max_new_tokens))

    # The answer, as it comes.
    start = time.perf_counter()
    times = []

    def tokens() -> Iterator[int]:
        with progress("reading"):
            first = next(steps)
        for ids in chain([first], steps):
            times.append(time.perf_counter())
            yield ids.item()

    for text in stream_text(tokens(), processor):
        print(UNSHOWN.sub("", text), end="", flush=True)
    print(flush=True)
    note(line_after(start, times, model.device))


def main(argv: list[str] | None = None, load: Callable[..., Qwen2_5_VL] | None = None) -> int:
    """The command line. Returns the exit status: 0, 2 for a user's mistake, 130 after Ctrl-C.

    load: what loads the model, if not `load_model` (tools/parallel.py passes its own).
    """
    sys.stderr = sys.stderr or open(os.devnull, "w")        # None if closed: print would use stdout
    warnings.filterwarnings("ignore", module="PIL")         # about files that it can still read
    warnings.showwarning = note_warning
    try:
        with enough_memory("use a smaller --max-pixels or --dtype bfloat16"):
            run(parse(argv), load or load_model)
        return 0

    except BrokenPipeError:     # the reader has seen enough, as in `generate.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0

    except (ValueError, OSError) as error:
        note(f"error: {UNSHOWN.sub('', str(error)).replace(chr(10), ' ')}")
        return 2

    except KeyboardInterrupt:
        note("")
        return 130


if __name__ == "__main__":
    sys.exit(main())
