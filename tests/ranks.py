"""What the processes of test_parallel.py run. It stands alone because each process imports it: neither pytest
nor transformers.
"""

import io
import os
import sys
from functools import partial

import parallel
import torch
import torch.distributed as dist
from torch.distributed import init_process_group

import generate

GREEDY = dict(max_new_tokens=8, repetition_penalty=1.05)
SAMPLED = dict(max_new_tokens=8, temperature=3.0, seed=7)


def answers(model, inputs):
    """Logits, greedy tokens and sampled tokens of a batch."""
    with torch.inference_mode():
        logits = model(**inputs)
    return logits, *(torch.stack(list(generate.generate(model, inputs, **how))) for how in (GREEDY, SAMPLED))


def meet(rank, ranks, directory):
    """A process group without ports, which could clash."""
    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=ranks)


def share_of_answers(rank, ranks, directory, checkpoints, inputs):
    """Every rank's answers for every checkpoint, into out0, out1, ..."""
    meet(rank, ranks, directory)
    found = [answers(parallel.load_share(path, "cpu", "float32"), inputs) for path in checkpoints]
    torch.save(found, directory / f"out{rank}")
    dist.destroy_process_group()


def share_of_memory(rank, ranks, directory, checkpoint):
    """How many bytes a rank keeps of the checkpoint, and how many of them are memory of its own."""
    meet(rank, ranks, directory)
    before = anonymous_bytes()
    model = parallel.load_share(checkpoint, "cpu")
    kept = sum(tensor.nbytes for tensor in model.state_dict().values())
    torch.save((kept, anonymous_bytes() - before), directory / f"out{rank}")
    dist.destroy_process_group()


def anonymous_bytes():
    with open(f"/proc/{os.getpid()}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def program(rank, ranks, directory, arguments, stdin):
    """The command line; every rank's exit status, tokens and what it says, into out0, out1, ..."""
    torch.manual_seed(rank)             # processes of their own begin with seeds of their own
    dist.init_process_group = partial(meet, rank, ranks, directory)
    sys.argv = ["parallel.py", *arguments]
    sys.stdin = io.StringIO(stdin) if rank == 0 else None
    sys.stdout = sys.stderr = said = open(directory / f"said{rank}", "w+")

    tokens = []
    steps = generate.generate

    def recorded(*args, **settings):
        for ids in steps(*args, **settings):
            tokens.append(ids.item())
            yield ids

    generate.generate = recorded
    status = parallel.main()
    said.seek(0)
    torch.save((status, tokens, said.read()), directory / f"out{rank}")
