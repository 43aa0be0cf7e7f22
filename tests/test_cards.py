"""docs/cards.md: table and exercises are computed again, figures show what the modules compute."""

import re
from dataclasses import replace
from pathlib import Path

import figures_cards
import pytest
import torch
from conftest import FAMILY, SPARSE_VISION, flat, write
from parallel import Share
from test_int4 import AWQ

import int4
from load_weights import load_config
from model import KVCache
from sampling import slots_needed

DOCS = (Path(__file__).parent.parent / "docs" / "cards.md").read_text()
RANKS = (1, 2, 4, 8)
CARDS = (8, 12, 16, 24, 32, 48, 80, 96, 141)        # GB
TOKENS = slots_needed(1000, 280)                    # a picture; question, template and answer


def four_bits(size, **changes):
    """config.json in the form of the published AWQ checkpoints, which leave out most of the vision config."""
    config = flat(size)
    tower = {key: value for key, value in config["vision_config"].items() if key in SPARSE_VISION}
    if size == "3B":
        del tower["intermediate_size"]
    return config | dict(quantization_config=AWQ, vision_config=tower) | changes


# The MLP of the dense 72B can't be divided into groups for several cards; a wider one can.
AWQ_CONFIGS = {
    "3B-AWQ": four_bits("3B"),
    "7B-AWQ": four_bits("7B"),
    "32B-AWQ": four_bits("32B"),
    "72B-AWQ, MLP 29568": four_bits("72B"),
    "72B-AWQ, MLP 29696": four_bits("72B", intermediate_size=29696),
}


class EveryName:
    """The names in files that have a .qweight for each layer."""

    def __contains__(self, name):
        return True


def bytes_of_a_rank(config, ranks, quantized):
    """Weights and cache, in bfloat16; computed on the meta device."""
    with torch.device("meta"):
        share = Share(replace(config, num_hidden_layers=1), ranks)
        if quantized:
            int4.as_published(share, EveryName())
        share.to(torch.bfloat16)
        int4.pack(share)

    # One layer stands for all.
    layers = config.num_hidden_layers
    cache = KVCache(share.config, 1, TOKENS, "meta", torch.bfloat16)
    return nbytes(share) + (layers - 1) * nbytes(share.model.layers) + layers * cache.nbytes


def nbytes(module):
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def row(name, config, quantized):
    """A row of the table: GB per card for each number of ranks, and the smallest cards that hold it."""
    sizes = []
    cards = []
    for ranks in RANKS:
        try:
            needed = bytes_of_a_rank(config, ranks, quantized) / 1e9
        except ValueError:      # ranks that don't divide heads, or groups
            sizes.append("-")
            continue
        sizes.append(f"{needed:.1f}")
        cards += [f"{ranks} x {card}" for card in CARDS if needed <= 0.9 * card][:1]
    weights = "4 bits" if quantized else "bfloat16"
    return f"| {name} | {weights} | {' | '.join(sizes)} | {', '.join(cards)} |"


@pytest.mark.parametrize("size", FAMILY)
def test_table_of_cards_in_bfloat16(size, tmp_path):
    """Bytes that somebody guessed, and cards that hold less than is said."""
    assert row(size, load_config(write(tmp_path, flat(size))), quantized=False) in DOCS


@pytest.mark.parametrize("name", AWQ_CONFIGS)
def test_table_of_cards_in_four_bits(name, tmp_path, monkeypatch):
    """The same of the published AWQ configs, their weights packed for CUDA's kernel."""
    monkeypatch.setattr(int4, "has_kernel", lambda linear: True)
    assert row(name, load_config(write(tmp_path, AWQ_CONFIGS[name])), quantized=True) in DOCS


def test_exercises_are_answered_rightly(tmp_path):
    """By the shares of the 72B, and the tensors of a layer in four bits."""
    config = load_config(write(tmp_path, flat("72B")))
    with torch.device("meta"):
        share = Share(config, 4).config
        weight = torch.nn.Linear(29568, 8, bias=False)
        layer = int4.Int4Linear(weight).half()
    bits = 8 * nbytes(layer) / weight.weight.numel()
    for said in (
        f"{share.num_attention_heads} of {config.num_attention_heads} query heads, "
        f"{share.num_key_value_heads} of {config.num_key_value_heads} key heads, "
        f"{share.intermediate_size} of {config.intermediate_size} MLP channels",
        f"for its scale and zero: {bits:.2f}.",
        f"{config.intermediate_size} / 128 = {len(layer.scales)} groups",
    ):
        assert said in " ".join(DOCS.split()), said


def test_figure_of_shares_shows_what_ranks_keep(tmp_path):
    """Rows where there should be columns, or two ranks with the same."""
    found = figures_cards.draw_shares(tmp_path)
    for name, shared in found.items():
        across = name not in ("o", "down")
        stretches = [columns if across else rows for columns, rows in shared]
        assert stretches[0].start == 0
        assert all(a.stop == b.start for a, b in zip(stretches, stretches[1:]))
        assert len({rows if across else columns for columns, rows in shared}) == 1
    assert len(found["down"][0][1]) == 7392


def test_figure_of_a_word_shows_its_weights(tmp_path):
    """Numbers in the order of the bits, or a zero of another channel."""
    shown = figures_cards.draw_four_bits(tmp_path)
    assert shown["numbers"] == [0xE, 0x7, 0x0, 0x4, 0x2, 0xB, 0xD, 0x9]
    assert shown["weights"] == pytest.approx([(q - 7) / 100 for q in shown["numbers"]])


def test_pictures_of_the_chapter_exist():
    for name in re.findall(r"\]\(\.\./(\S+)\)", DOCS):
        assert (Path(__file__).parent.parent / name).exists(), name
