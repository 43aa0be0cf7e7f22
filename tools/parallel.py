"""Optional: one model on several cards, of which none has to hold it. It stands outside the evening's reading
order. Start it with torch's launcher, one process (a rank) per card, with generate.py's arguments:

    torchrun --nproc-per-node 4 tools/parallel.py --model Qwen/Qwen2.5-VL-72B-Instruct --image photo.jpg

A share of a layer is a narrower layer. Each rank has some of the heads and some of the MLP's channels: the
columns of q, k, v, gate and up that make them, and the rows of o and down that read them. What o and down
give is then one part of a sum, and all_reduce adds the parts up on every rank, twice in a layer. The head is
divided by words, whose logits one all_gather joins; a head that is the embedding is whole on every rank, as
are the embedding itself, norms and vision tower. docs/cards.md has the picture and the bytes.

Rank 0 prints as generate.py does, with the bytes of its own card. After an error torchrun adds a report of
its own, which names the rank where it began, and exits with 1. Ranks can share a CPU, too, with --device cpu:
they then talk through gloo. On CUDA, through NCCL, this has not run yet.

Read from the top: the narrower model, its weights, and what the ranks must agree on.
"""

import io
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import generate
from int4 import as_published
from load_weights import available, checkpoint, load_config, read_model, ready
from model import Config, Qwen2_5_VL
from vision import Attend, sdpa


class Share(Qwen2_5_VL):
    """What one rank has of the model. To be called like the whole, on every rank, with the same inputs.

    Raises ValueError if the ranks don't divide heads, key heads, MLP or words.
    """

    def __init__(self, config: Config, ranks: int, attend: Attend = sdpa):
        parts = {}
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
            whole = getattr(config, name)
            if whole % ranks:
                raise ValueError(f"{name} {whole} is no multiple of {ranks} ranks; use fewer")
            parts[name] = whole // ranks

        # Narrower layers, and of the head a part of its words. The embedding stays whole.
        words = parts.pop("vocab_size")
        super().__init__(replace(config, **parts), attend)
        self.ranks = ranks
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, words, bias=False)

        # o and down have no bias, which would be added once for each rank.
        for layer in self.model.layers:
            layer.self_attn.register_forward_hook(add_up)
            layer.mlp.register_forward_hook(add_up)

    def logits(self, *args, **kwargs) -> Tensor:
        """Those of the whole model, the same bits on every rank."""
        mine = super().logits(*args, **kwargs)
        if self.config.tie_word_embeddings:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(parts, mine)
        return torch.cat(parts, dim=-1)


def add_up(module: nn.Module, args: tuple, y: Tensor) -> None:
    """After a module's forward: the sum over all ranks in place of this one's part."""
    dist.all_reduce(y)


# ---------------------------------------------------------------------------- the weights

def cut(tensor: Tensor, shape: torch.Size, rank: int) -> Tensor:
    """A rank's part of a tensor, a view: along each axis that is shorter in `shape`, its own stretch."""
    for axis, length in enumerate(shape):
        if length < tensor.shape[axis]:
            tensor = tensor.narrow(axis, rank * length, length)
    return tensor


def load_share(
    path: str | Path, device: str = "auto", dtype: str | torch.dtype = "auto", attention: str = "sdpa"
) -> Share:
    """`load_weights.load_model` for this rank, which reads no more of the files than it keeps."""
    rank = dist.get_rank()
    path = checkpoint(path)
    config = load_config(path)
    device, dtype, attend = available(path, own_card(device), dtype, attention)
    with torch.device("meta"):
        share = Share(config, dist.get_world_size(), attend)

    # The whole model takes no memory: its tensors are views of the mapped files.
    whole = read_model(path, config, "cpu", attend).state_dict()
    as_published(share, whole)
    parts = {name: cut(whole[name], tensor.shape, rank) for name, tensor in share.state_dict().items()}
    share.load_state_dict(parts, strict=True, assign=True)
    return ready(share.to(device), dtype)


def own_card(device: str) -> str:
    """The device of this rank. ValueError for one card for all, and if there are fewer cards than ranks."""
    cards = torch.cuda.device_count()
    if device == "cpu" or device == "auto" and not cards:
        return "cpu"
    if device not in ("auto", "cuda"):
        raise ValueError(f"device {device}: every rank takes a card of its own; give cuda or cpu")

    ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    if ranks > cards:
        raise ValueError(f"{ranks} ranks, but {cards} cards; use a rank for each card, or --device cpu")
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)       # or each rank would keep some memory on the first card
    return device


# ---------------------------------------------------------------------------- the program

class SharedInput:
    """stdin for all ranks, though there is only one: rank 0 reads it and tells the others."""

    def __init__(self, stdin: TextIO | None):
        self.stdin = stdin

    def read(self) -> str:
        heard = [self.stdin.read() if self.stdin and dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(heard)
        return heard[0]


@record         # so that torchrun's report can say what a rank died of
def main() -> int:
    dist.init_process_group()           # gloo for tensors on the CPU, NCCL for those on CUDA
    rank = dist.get_rank()

    # What chance and the user say, all must hear alike.
    seed = [random.getrandbits(63)]
    dist.broadcast_object_list(seed)
    torch.manual_seed(seed[0])
    sys.stdin = SharedInput(sys.stdin)

    # Rank 0 speaks for all, as long as nothing goes wrong elsewhere.
    said = io.StringIO()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
        sys.stderr = said
    status = generate.main(load=load_share)
    if rank > 0 and status:
        raise RuntimeError(said.getvalue().strip())

    dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
