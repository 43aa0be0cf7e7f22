"""The README can't rot: its commands and examples run, its names exist, its numbers are computed again.
So do the examples of docs/play.md, which go on where those of the README ended.
"""

import importlib
import re
import subprocess
import sys
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILY, flat, write

from load_weights import load_config
from model import KVCache
from processing import patchify, smart_resize
from rope import inv_freq, mrope_positions, vision_positions
from sampling import Sampler
from vision import window_order

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = " ".join(README.split())        # wherever its lines are broken
COMMANDS = re.findall(r"^\$ (?:pip .* && )?(python (?!.*Qwen/).*)\n((?:(?![$`]).*\n)*)", README, re.MULTILINE)
PLAY = (ROOT / "docs/play.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README + PLAY, re.DOTALL)
FILES = re.search(r"## The files, in reading order\n\n```\n(.*?)```", README, re.DOTALL)[1]


# ---------------------------------------------------------------------------- what runs

def steady(text):
    """Without what differs from run to run and from machine to machine: times, speeds, memory, device."""
    text = re.sub(r"^(loading|reading) \.\.\.\n", "", text, flags=re.MULTILINE)     # said after two seconds
    return re.sub(r"after [\d.]+ s|then \d+ a second|memory [\d.]+ GB|on (cpu|cuda:0)", "...", text)


@pytest.mark.parametrize("command, output", COMMANDS)
def test_commands_print_what_is_shown(command, output):
    """Bug: a command does not run, or its output is another one's."""
    command = command.replace("python", sys.executable, 1)
    run = subprocess.run(
        command, shell=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout
    assert steady(run.stdout) == steady(output)


def test_examples_print_what_they_say():
    """Bug: an example does not run, or says something else. Each goes on where the one before it ended."""
    code = "\n".join(PYTHON)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == re.findall(r"# prints: (.*)", code)


# ---------------------------------------------------------------------------- what it names

def test_named_files_exist():
    """Bug: a file that has gone, or a module that the list leaves out."""
    listed = re.findall(r"^(\S+)", FILES, re.MULTILINE)
    assert {name for name in listed if name.endswith(".py")} == {file.name for file in ROOT.glob("*.py")}
    for name in listed + re.findall(r"`((?:tests|tools|assets)/[\w.]+\w)`", README):
        assert (ROOT / name).exists(), name


def test_named_functions_exist():
    """Bug: a function that has moved or has another name now."""
    modules = "|".join(file.stem for file in ROOT.glob("*.py"))
    names = re.findall(rf"`({modules})\.([\w.]+)`", README)
    assert len(names) > 20
    for module, path in names:
        if path != "py":
            reduce(getattr, path.split("."), importlib.import_module(module))


def anchors(page):
    """What can be linked to in a page: its headings, as GitHub spells them."""
    titles = re.findall(r"^#+ (.*)", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Bug: a file or a section that has gone, or was never written."""
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)
    for target in links + re.findall(r'<img src="([^"]+)"', text):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


# ---------------------------------------------------------------------------- what it computes

def test_table_of_published_checkpoints_is_computed(tmp_path):
    """Bug: a stale number of weights, of cache per 1,000 tokens, or of tokens of a megapixel."""
    height, width = smart_resize(1000, 1000)
    assert f"1000 x 1000 pixels has {height * width // 28**2:,} tokens" in README

    for size, published in FAMILY.items():
        config = load_config(write(tmp_path, flat(size)))
        per_token = KVCache(config, 1, 1, "meta", torch.bfloat16).nbytes
        weights = f"{published.nbytes / 1e9:.1f} GB"
        cache = f"{per_token / 1e3:.0f} MB"
        assert re.search(rf"\| \S*{size}\S* \| {re.escape(f'{weights} | {cache}')} \|", README), size
        if size == "7B":
            assert f"2 bytes = {per_token}." in README


def test_table_of_sizes_is_computed(tmp_path):
    """Bug: a size of another checkpoint, or a stale one."""
    configs = {"tiny": load_config(ROOT / "tiny")}
    for size in FAMILY:
        configs[size] = load_config(write(tmp_path, flat(size)))

    for size, config in configs.items():
        tower = config.vision
        heads = f"{config.num_attention_heads} / {config.num_key_value_heads}"
        head = "tied" if config.tie_word_embeddings else "own"
        blocks = f"{tower.depth} ({len(tower.fullatt_block_indexes)})"
        row = (size, config.num_hidden_layers, config.hidden_size, heads, config.intermediate_size,
               head, blocks, tower.hidden_size, tower.num_heads, tower.intermediate_size)
        assert f"| {' | '.join(map(str, row))} |" in README, size


def test_patches_are_counted_rightly():
    """Bug: the exercise of step 1 has another answer."""
    height, width = smart_resize(1080, 1920)
    rows = height // 14
    columns = width // 14
    patches = rows * columns
    assert (f"{width} x {height} pixels: {columns} x {rows} = {patches} patches, four to a token: "
            f"{patches // 4} tokens") in WORDS


def test_windows_are_counted_rightly():
    """Bug: the exercise of step 2 has another answer."""
    _, (layout,) = window_order(torch.tensor([[1, 20, 30]]), merge_size=2, window=4)
    whole, right, bottom, corner = layout.runs
    pairs = sum(windows * patches**2 for windows, patches in layout.runs)
    patches = sum(layout.lengths)
    assert (f"{whole[0]} windows of {whole[1]} patches, {right[0]} of {right[1]} at the right edge, "
            f"{bottom[0]} of {bottom[1]} at the bottom, one of {corner[1]} in the corner. A windowed block "
            f"compares {pairs} pairs of patches, a full one {patches**2}.") in WORDS


def test_patch_is_found_rightly():
    """Bug: step 3 or its exercise has another answer."""
    row, column = vision_positions(torch.tensor([[1, 6, 4]]), merge_size=2)[13].tolist()
    slowest = inv_freq(40, 1e4, torch.device("cpu"))[-1]
    assert f"so row {row}, column {column}." in WORDS
    assert f"one radian per patch down to 1/{1 / slowest:.0f}" in WORDS


def test_pixels_of_a_token_are_found_rightly():
    """Bug: the exercise of step 4 has another answer."""
    y, x = np.mgrid[:84, :140]
    frame = np.stack([x, y, y], axis=-1)[None]      # every pixel says where it is
    rows, _ = patchify(frame, patch=14, temporal_patch=2, merge=2)
    group = rows.reshape(15, 4, 3, 2, 14, 14)[7]    # group | patch, channel, frame, y, x
    x = group[:, 0]
    y = group[:, 1]
    assert f"x from {x.min()} to {x.max() + 1}, y from {y.min()} to {y.max() + 1}." in WORDS


def test_first_answer_token_is_placed_rightly():
    """Bug: the exercise of step 5 has another answer."""
    ids = torch.tensor([[1] * 5 + [9] * 24 + [1] * 3])
    _, position = mrope_positions(
        ids,
        image_token_id=9,
        video_token_id=8,
        merge_size=2,
        tokens_per_second=2,
        image_grid_thw=torch.tensor([[1, 8, 12]]),
    )
    assert f"position {position.item()}. Slot 5 + 24 + 3 = {ids.shape[1]}." in WORDS


def test_next_token_is_chosen_rightly():
    """Bug: the exercise of step 7 has another answer."""
    logits = torch.tensor([[2.0, 1.98]])
    seen = torch.tensor([[True, False]])
    assert Sampler(repetition_penalty=1.05)(logits, seen).item() == 1
    assert f"2.0 / 1.05 = {2.0 / 1.05:.3f}, so the second" in WORDS
