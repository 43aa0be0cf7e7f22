"""Logits become tokens: how one is chosen, one step, the CUDA graph, the loop.

Read from the top. The loop uses no tokenizer. Two counters run through it side by side: the slot in the
cache, which counts tokens, and the MRoPE position, which a picture advances only by its longer side, in merge
groups.

Next: load_weights.py, or straight to generate.py. Shapes: B batch, T prompt tokens, S slots of the cache.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from model import Config, KVCache, Qwen2_5_VL

GREEDY_BELOW = 1e-5     # a lower temperature is argmax: published checkpoints say 1e-6 for greedy
SLOT_MULTIPLE = 64      # of a cache's length: kernels want masks whose rows are aligned


# ---------------------------------------------------------------------------- choosing a token

@dataclass(frozen=True)
class Sampler:
    """How a token is chosen. The defaults are greedy."""
    temperature: float = 0.0            # 0 is greedy
    top_k: int = 0                      # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0                  # keep the likeliest that together reach this probability; 1 is all
    repetition_penalty: float = 1.0     # on ids of the prompt and the answer, not on padding
    seed: int | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature}: must be 0 (greedy) or above")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: must be 0 (all) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must be above 0 and at most 1")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty {self.repetition_penalty}: must be above 0")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed {self.seed}: must be from 0 to 2**64 - 1")

    def __call__(self, logits: Tensor, seen: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The next token (B,) from logits (B, vocab); seen (B, vocab) marks the ids that have occurred.

        In Hugging Face's order and arithmetic: float32, penalty, temperature, top-k, top-p.
        """
        # Repetition penalty: positive logits are divided, negative ones multiplied.
        logits = logits.float()
        if self.repetition_penalty != 1.0:
            penalty = self.repetition_penalty
            penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(seen, penalized, logits)

        if self.temperature < GREEDY_BELOW:
            return logits.argmax(dim=-1)
        logits = logits / self.temperature

        # Top-k: drop whatever is less likely than the k-th.
        if self.top_k > 0:
            kth = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)

        # Top-p: drop the least likely tokens whose total probability is at most 1 - p. The likeliest stays.
        if self.top_p < 1.0:
            ascending, order = logits.sort()
            unlikely = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.top_p
            unlikely[:, -1] = False
            unlikely = unlikely.scatter(1, order, unlikely)     # back from sorted order
            logits = logits.masked_fill(unlikely, -torch.inf)

        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


# ---------------------------------------------------------------------------- one step

def decode_step(
    model: Qwen2_5_VL, token: Tensor, position: Tensor, mask: Tensor | None, cache: KVCache
) -> Tensor:
    """Logits (B, vocab) after one more token (B, 1) in every row; advances position (B, 1) in place.

    Everything stays on the device and no value is looked at, so that the step can be captured.
    """
    position_ids = position.expand(3, -1, -1)       # text moves all three axes alike
    logits = model.logits(model.embed(token), position_ids, mask, cache, last_only=True)
    position += 1
    return logits[:, -1]


@lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One per device, kept: libraries set aside workspace for every stream that they meet."""
    return torch.cuda.Stream(device)


def capture(step: Callable[[], Tensor], cache: KVCache) -> Callable[[], Tensor]:
    """`step` as a CUDA graph: its kernels in a list, with their addresses, launched all at once.

    A token of the 7B takes some 800 kernels, and most are done before Python has launched the next one. The
    graph changes nothing else: the same kernels run in the same order, and none are fused. So a step must
    find all it reads at the same addresses each time, look at no value, and keep no changing state in Python,
    since a replay runs no Python. The step must have run once before: libraries set themselves up at their
    first call, which a capture forbids.
    """
    device = cache.k.device
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=capture_stream(device), capture_error_mode="thread_local"):
            logits = step()     # capturing is not running: kernels are noted, and the card does nothing
    cache.length -= 1           # but Python did run, and advanced the host's own count

    def replay() -> Tensor:
        graph.replay()          # writes `logits`, and advances cache.end and the position
        cache.length += 1
        return logits
    return replay


# ---------------------------------------------------------------------------- the loop

def slots_needed(prompt: int, new: int) -> int:
    """How many slots a cache needs for this many tokens of prompt and answer."""
    return math.ceil((prompt + new) / SLOT_MULTIPLE) * SLOT_MULTIPLE


def check_length(prompt: int, new: int, config: Config) -> None:
    """ValueError if no token is asked for, or if prompt and answer exceed the context."""
    limit = config.max_position_embeddings
    if new < 1:
        raise ValueError(f"max_new_tokens {new}: must be at least 1")
    if prompt + new > limit:
        raise ValueError(f"a prompt of {prompt} tokens and {new} new ones exceed the context of {limit}: "
                         "use fewer new tokens, or fewer or smaller pictures")


def generate(
    model: Qwen2_5_VL,
    inputs: dict[str, Tensor],
    max_new_tokens: int = 256,
    eos_token_id: int | Iterable[int] = (),
    pad_token_id: int = 0,
    graph: bool | None = None,
    **sampling,
) -> Iterator[Tensor]:
    """The answer to a processor's inputs, one token per row at a time: (B,) int64 on the CPU, eos included.

    A row that has met one of eos_token_id yields pad_token_id; the iterator ends when every row has, or after
    max_new_tokens. sampling: the fields of `Sampler`; greedy if nothing is given. graph: replay a CUDA graph
    for each token (None: if the model is on CUDA). HF: GenerationMixin.generate.
    Raises ValueError for meaningless settings, and if prompt and answer exceed the context.
    """
    T = inputs["input_ids"].shape[1]
    mask = inputs.get("attention_mask", torch.ones(1, 1))
    if (mask[:, 1:] < mask[:, :-1]).any() or not mask[:, -1].all():
        raise ValueError("attention_mask: pads must come first in a row and nowhere else, or the answer does "
                         "not follow its prompt; pad on the left (padding_side='left')")
    check_length(T, max_new_tokens, model.config)
    if graph and model.device.type != "cuda":
        raise ValueError(f"graph: the model is on {model.device}, and only CUDA has graphs; leave it out")
    if graph is None:
        graph = model.device.type == "cuda"

    eos = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id))
    return token_loop(model, inputs, max_new_tokens, eos, pad_token_id, graph, Sampler(**sampling))


@torch.inference_mode()
def token_loop(
    model: Qwen2_5_VL,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
    eos: Tensor,
    pad_token_id: int,
    graph: bool,
    sampler: Sampler,
) -> Iterator[Tensor]:
    """Split from `generate`, so that bad arguments raise at the call and not at the first token."""
    device = model.device
    generator = None
    if sampler.seed is not None:
        generator = torch.Generator(device).manual_seed(sampler.seed)

    # The prompt. Grids stay on the CPU: the vision tower cuts its windows by them and never waits for a GPU.
    input_ids = inputs["input_ids"].cpu()
    B, T = input_ids.shape
    attention_mask = inputs.get("attention_mask", torch.ones_like(input_ids)).cpu().long()
    grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    pixels = {name: inputs.get(name) for name in ("pixel_values", "pixel_values_videos")}
    position_ids, next_position = model.positions(
        input_ids,
        attention_mask=attention_mask,
        second_per_grid_ts=inputs.get("second_per_grid_ts"),
        **grids,
    )

    # The ids that have occurred, for the penalty. Pads do not count.
    seen = torch.zeros(B, model.config.vocab_size, dtype=torch.bool)
    for row, ids, real in zip(seen, input_ids, attention_mask.bool()):
        row[ids[real]] = True
    seen = seen.to(device)

    # What every step reads and writes, in place. These addresses and the weights' are all that a CUDA graph
    # knows: it reads token and mask, advances position and cache.end, fills the cache, and overwrites its
    # logits.
    S = slots_needed(T, max_new_tokens)
    unpadded = bool(attention_mask.all())
    mask = torch.cat((attention_mask, attention_mask.new_ones(B, S - T)), dim=1).to(device)
    cache = KVCache(model.config, B, S, device, model.dtype)
    token = torch.zeros(B, 1, dtype=torch.int64, device=device)
    position = next_position[:, None].to(device)

    def step() -> Tensor:
        if graph:       # its mask cannot grow: pass all of it; `causal_mask` hides the slots ahead
            return decode_step(model, token, position, mask, cache)
        visible = None if unpadded else mask[:, :cache.length + 1]
        return decode_step(model, token, position, visible, cache)

    # Read the prompt.
    x = model.embed(input_ids, **pixels, **grids)
    visible = None if unpadded else mask[:, :T]
    logits = model.logits(x, position_ids.to(device), visible, cache, last_only=True)[:, -1]
    del x

    # One token at a time. The first comes from the prompt's logits, the second from a step not captured,
    # which is also the trial run that a capture needs; from the third on the graph is replayed.
    finished = torch.zeros(B, dtype=torch.bool)
    for n in range(max_new_tokens):
        if n == 2 and graph:
            step = capture(step, cache)
        if n > 0:
            logits = step()

        token.copy_(sampler(logits, seen, generator)[:, None])
        seen.scatter_(1, token, True)
        ids = token[:, 0].cpu().masked_fill(finished, pad_token_id)     # the one wait for the device
        yield ids

        finished = finished | torch.isin(ids, eos)
        if finished.all():
            return
