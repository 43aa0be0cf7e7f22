"""tools/parallel.py: ranks answer as one process does. Through gloo, on the CPU; NCCL has not run."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import parallel
import pytest
import ranks as processes
import torch
from conftest import assert_close, assert_equal, flat, make_pair, prompts, small_config, write
from safetensors.torch import save_file
from test_int4 import AWQ, quantized_weights
from torch.multiprocessing import start_processes

from load_weights import load_config, load_model
from model import Qwen2_5_VL

ROOT = Path(__file__).parent.parent
BATCH = [[4, (8, 12), 3, (4, 10), 5], [6, (2, 8, 12, 1.0), 2], [7]]       # padded: pictures, a video, neither


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(function, ranks, *arguments): what every rank of a function in ranks.py has saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        # Processes are forked from one that has imported torch and computed nothing, to import it only once.
        multiprocessing.set_forkserver_preload(["ranks"])

        def started(function, ranks, *arguments):
            directory = tmp_path_factory.mktemp("ranks")
            start_processes(function, (ranks, directory, *arguments), ranks, start_method="forkserver")
            return [torch.load(directory / f"out{rank}") for rank in range(ranks)]

        yield started


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One model in shards, with its own head; the same with its embedding for a head; one in four bits."""
    untied = tmp_path_factory.mktemp("untied")
    pair = make_pair(num_key_value_heads=4)
    pair.hf.save_pretrained(untied, max_shard_size="6MB")
    assert len(list(untied.glob("*.safetensors"))) > 1

    tied = tmp_path_factory.mktemp("tied")
    weights = pair.ours.state_dict()
    del weights["lm_head.weight"]
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] / 14    # or words would echo
    save_file(weights, tied / "model.safetensors")
    write(tied, small_config(num_key_value_heads=4) | dict(tie_word_embeddings=True))

    four_bits = tmp_path_factory.mktemp("four_bits")
    save_file(quantized_weights(make_pair(intermediate_size=512).ours), four_bits / "model.safetensors")
    write(four_bits, small_config(intermediate_size=512) | dict(quantization_config=AWQ))
    return dict(untied=untied, tied=tied, four_bits=four_bits)


@pytest.mark.parametrize("ranks, names", [(2, ("untied", "tied", "four_bits")), (4, ("untied", "tied"))])
def test_ranks_answer_as_one_process_does(ranks, names, run, checkpoints):
    """A sum that is left out, slices in another order, words of the head joined in another order."""
    inputs = prompts(BATCH)
    paths = [checkpoints[name] for name in names]
    per_rank = run(processes.share_of_answers, ranks, paths, inputs)
    for n, path in enumerate(paths):
        logits, greedy, sampled = processes.answers(load_model(path, "cpu", "float32"), inputs)
        assert len(greedy.unique()) > 8 and len(sampled.unique()) > 8
        for answers in per_rank:
            shared, *tokens = answers[n]
            assert_close("logits of several ranks", shared, logits, inputs["attention_mask"])
            assert_equal("logits between ranks", shared, per_rank[0][n][0])
            assert_equal("greedy tokens of several ranks", tokens[0], greedy)
            assert_equal("sampled tokens of several ranks", tokens[1], sampled)


def test_a_rank_keeps_its_share_of_the_files_in_place(run, tmp_path):
    """Slices that are copied, or the whole model read into memory: a rank's own memory stays under a fifth of
    its share.
    """
    config = json.loads((ROOT / "tiny" / "config.json").read_text())
    write(tmp_path, config | dict(intermediate_size=50_000))
    with torch.device("meta"):
        model = Qwen2_5_VL(load_config(tmp_path))
    whole = {name: torch.zeros(p.shape, dtype=torch.bfloat16) for name, p in model.state_dict().items()}
    save_file(whole, tmp_path / "model.safetensors")

    size = (tmp_path / "model.safetensors").stat().st_size
    for kept, own in run(processes.share_of_memory, 2, tmp_path):
        assert 100e6 < kept < 0.55 * size
        assert own < 0.2 * kept


def test_ranks_sample_alike_without_a_seed(run):
    """Processes are seeded differently, and would part at the first sampled token."""
    arguments = ["--device", "cpu", "--temperature", "5", "--max-new-tokens", "24"]
    (status, tokens, said), *others = run(processes.program, 2, arguments, "")
    assert status == 0
    assert "tiny is asked about" in said
    assert others == [(0, tokens, "")]


def test_stdin_is_read_once(run):
    """By rank 0, for all."""
    arguments = ["--device", "cpu", "--image", str(ROOT / "assets/demo.png"), "--prompt", "-"]
    (status, tokens, said), *others = run(processes.program, 2, arguments, "How many objects are there?")
    assert said.splitlines()[0].endswith("4") or "\n4\n" in said
    assert others == [(0, tokens, "")]


@pytest.mark.parametrize("ranks, changes, message", [
    (8, {}, "num_attention_heads 28 is no multiple of 8 ranks; use fewer"),
    (7, {}, "num_key_value_heads 4 is no multiple of 7 ranks; use fewer"),
    (4, dict(intermediate_size=18946), "intermediate_size 18946 is no multiple of 4 ranks"),
    (4, dict(vocab_size=152066), "vocab_size 152066 is no multiple of 4 ranks"),
])
def test_ranks_that_do_not_divide_are_refused(ranks, changes, message, tmp_path):
    """Heads that are cut in the middle, or left out."""
    config = load_config(write(tmp_path, flat("7B") | changes))
    with pytest.raises(ValueError, match=message):
        parallel.Share(config, ranks)


@pytest.mark.parametrize("device, cards, message", [
    ("auto", 2, "4 ranks, but 2 cards; use a rank for each card, or --device cpu"),
    ("cuda", 0, "4 ranks, but 0 cards"),
    ("cuda:1", 4, "device cuda:1: every rank takes a card of its own; give cuda or cpu"),
])
def test_cards_that_are_shared_are_refused(device, cards, message, monkeypatch):
    """All ranks on one card, which runs out of memory; or no card for the last of them."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    with pytest.raises(ValueError, match=message):
        parallel.own_card(device)


def test_every_rank_takes_a_card_of_its_own(monkeypatch):
    """The first card for every rank."""
    taken = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert parallel.own_card("auto") == parallel.own_card("cuda") == "cuda:3"
    assert taken == ["cuda:3", "cuda:3"]
    assert parallel.own_card("cpu") == "cpu"


def test_torchrun_prints_what_one_process_prints():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "tools/parallel.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | dict(CUDA_VISIBLE_DEVICES=""))
    assert run.returncode == 0, run.stderr
    assert run.stdout == "a red star, a green circle, an orange triangle, a black square.\n"
    assert run.stderr.count("weights 0.004 GB, cache 0.000 GB, torch.bfloat16 on cpu") == 1
