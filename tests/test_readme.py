"""The README can't rot: its commands run, its example runs, its numbers are computed again."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_load_weights import FAMILY, flat, write

from load_weights import load_config
from model import KVCache
from processing import smart_resize

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONSOLE = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def steady(text):
    """Without what differs from run to run: times, speeds, memory."""
    return re.sub(r"after [\d.]+ s|then \d+ a second|memory [\d.]+ GB", "...", text)


def quick(block):
    pairs = re.findall(r"^\$ (python .*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    return [(command, output) for command, output in pairs if "Qwen/" not in command]


@pytest.mark.parametrize("command, output", [pair for block in CONSOLE for pair in quick(block)])
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


def test_table_of_published_checkpoints(tmp_path):
    """Weights, cache per 1,000 tokens and for a picture of one megapixel, as the README's rows say them."""
    height, width = smart_resize(1000, 1000)
    tokens = height * width // 28**2
    assert f"{tokens:,} tokens" in README
    for size, (*_, weights, _) in FAMILY.items():
        config = load_config(write(tmp_path, flat(size)))
        per_token = KVCache(config, 1, 1, "meta", torch.bfloat16).k.nbytes * 2
        row = f"| {weights / 1e9:.1f} GB | {per_token / 1e3:.0f} MB | {per_token * tokens / 1e6:.0f} MB |"
        assert re.search(rf"\| \S*{size}\S* {re.escape(row)}", README), (size, row)


def test_files_that_do_not_exist():
    for name in re.findall(r"`((?:tests|tools|assets)/[\w.]+\w)`", README):
        assert (ROOT / name).exists(), name
