"""The README can't rot: its commands run, its example runs, its numbers are computed again."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_load_weights import FAMILY, flat, write

from generate import sample
from load_weights import load_config
from model import KVCache
from processing import patchify, smart_resize
from rope import inv_freq, mrope_positions, vision_positions
from vision import window_order

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\$ (?:pip .* && )?(python (?!.*Qwen/).*)\n((?:(?![$`]).*\n)*)", README, re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def steady(text):
    """Without what differs from run to run and from machine to machine: times, speeds, memory, device."""
    return re.sub(r"after [\d.]+ s|then \d+ a second|memory [\d.]+ GB|on (cpu|cuda:0)", "...", text)


@pytest.mark.parametrize("command, output", COMMANDS)
def test_command_prints_something_else(command, output):
    command = command.replace("python", sys.executable, 1)
    run = subprocess.run(command, shell=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         text=True, timeout=100)
    assert run.returncode == 0, run.stdout
    assert steady(run.stdout) == steady(output)


@pytest.mark.parametrize("code", PYTHON)
def test_example_does_not_run(code):
    expected = re.findall(r"# prints: (.*)", code)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == expected


def test_table_of_published_checkpoints_is_stale(tmp_path):
    """Weights, cache per 1,000 tokens and for a picture of one megapixel, as the README's rows say them."""
    height, width = smart_resize(1000, 1000)
    tokens = height * width // 28**2
    assert f"{tokens:,} tokens" in README
    for size, (*_, weights, _) in FAMILY.items():
        config = load_config(write(tmp_path, flat(size)))
        per_token = KVCache(config, 1, 1, "meta", torch.bfloat16).k.nbytes * 2
        row = f"| {weights / 1e9:.1f} GB | {per_token / 1e3:.0f} MB | {per_token * tokens / 1e6:.0f} MB |"
        assert re.search(rf"\| \S*{size}\S* {re.escape(row)}", README), (size, row)
        assert size != "7B" or f"2 bytes = {per_token}." in README


def test_files_that_do_not_exist():
    for name in re.findall(r"`((?:tests|tools|assets)/[\w.]+\w)`", README):
        assert (ROOT / name).exists(), name


def test_exercise_answered_wrongly():
    """The folded answers, computed by the functions that the steps name."""
    height, width = smart_resize(1080, 1920)
    rows, columns = height // 14, width // 14
    _, (layout,) = window_order(torch.tensor([[1, 20, 30]]), merge_size=2, window=4)
    (a, b, c, d), pairs = layout.runs, sum(n * patches**2 for n, patches in layout.runs)
    row, column = vision_positions(torch.tensor([[1, 6, 4]]), merge_size=2)[13].tolist()
    y, x = np.mgrid[:84, :140]
    frame = np.stack([x, y, y], axis=-1)[None]
    group = patchify(frame, 14, 2, 2)[0].reshape(15, 4, 3, 2, 14, 14)[7]
    ids = torch.tensor([[1] * 5 + [9] * 24 + [1] * 3])
    _, position = mrope_positions(ids, image_token_id=9, video_token_id=8, merge_size=2, tokens_per_second=2,
                                  image_grid_thw=torch.tensor([[1, 8, 12]]))
    logits, seen = torch.tensor([[2.0, 1.98]]), torch.tensor([[True, False]])
    assert sample(logits, seen, 0.0, 0, 1.0, repetition_penalty=1.05, generator=None).item() == 1
    for said in (
        f"{width} x {height} pixels: {columns} x {rows} = {rows * columns} patches, four to a token: "
        f"{rows * columns // 4} tokens",
        f"{a[0]} windows of {a[1]} patches, {b[0]} of {b[1]} at the right edge, {c[0]} of {c[1]} at the "
        f"bottom, one of {d[1]} in the corner. A windowed block compares {pairs} pairs of patches, "
        f"a full one {layout.patches**2}.",
        f"so row {row}, column {column}.",
        f"x from {group[:, 0].min()} to {group[:, 0].max() + 1}, y from {group[:, 1].min()} to "
        f"{group[:, 1].max() + 1}.",
        f"position {position.item()}. Slot 5 + 24 + 3 = {ids.shape[1]}.",
        f"one radian per patch down to 1/{1 / inv_freq(40, 1e4, torch.device('cpu'))[-1]:.0f}",
        f"2.0 / 1.05 = {2.0 / 1.05:.3f}, so the second",
    ):
        assert said in " ".join(README.split()), said
