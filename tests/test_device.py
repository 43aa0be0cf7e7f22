"""The comparison with Hugging Face on a card, where there is one."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROWS, TOLERANCE, VISIBLE

TESTS = Path(__file__).parent


def test_logits_equal_hugging_face_on_this_machines_device():
    """Bugs that only a card shows: something left behind on the CPU, TF32, a kernel of another opinion."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (TESTS, TESTS.parent / "tools", TESTS.parent)))
    run = subprocess.run(
        [sys.executable, TESTS / "device.py"], env=environment | VISIBLE, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

    lines = [line.split("\t") for line in run.stdout.splitlines()]
    assert [name for _, name, _ in lines] == list(ROWS)
    for device, name, apart in lines:
        assert float(apart) <= TOLERANCE, (device, name)
