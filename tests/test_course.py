"""The README's exercises in breaking: each line that it says to change does what its folded answer says."""

import importlib
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from boxes import read_boxes

from generate import DEMO_IMAGE, DEMO_MODEL

ROOT = Path(__file__).parent.parent
SECTION = "## Break it yourself\n"
MODULES = ("processing", "rope", "vision", "model", "sampling", "load_weights", "generate", "int4")


class Change(NamedTuple):
    """A row of the table."""
    file: str
    right: str
    wrong: str
    answer: str


def changes(page):
    """The rows of the section's table: | file | `right` | `wrong` | <details>...ANSWER</details> |"""
    _, _, after = page.partition(SECTION)
    section = after.partition("\n## ")[0]
    folded = r"<details><summary>answer</summary>(.*)</details>"
    row = rf"^\| `?(\w+\.py)`? \| `([^`]+)` \| `([^`]+)` \| {folded} \|$"
    return [Change(*cells) for cells in re.findall(row, section, re.MULTILINE)]


README = (ROOT / "README.md").read_text(encoding="utf-8")
CHANGES = changes(README)


def printed(change, directory, monkeypatch, capsys):
    """What the program prints about the red star after a change."""
    for name in MODULES:
        shutil.copy(ROOT / f"{name}.py", directory)
    file = directory / change.file
    source = file.read_text()
    assert source.count(change.right) == 1, change
    file.write_text(source.replace(change.right, change.wrong))

    # In this process, because torch is imported already. The right modules come back afterwards.
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(directory)
    program = importlib.import_module("generate")
    assert Path(program.__file__).parent == directory
    question = ["--image", str(DEMO_IMAGE), "--prompt", "Locate the red star."]
    assert program.main(["--model", str(DEMO_MODEL), *question]) == 0
    return capsys.readouterr().out


def in_words(answer):
    """What a folded answer must say about a printed one: sides of boxes, and names that are wrong."""
    words = []
    for box, label in read_boxes(answer):
        words.append(", ".join(map(str, box)))
        if label != "red star":
            words.append(label)
    if words:
        return words
    return ["Three backticks"] if answer.strip() == "```" else [answer.strip()]


def test_table_is_read_whole():
    """Bug: a row in another form, which nobody checks."""
    assert len(CHANGES) == (5 if SECTION in README else 0)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.wrong)
def test_change_does_what_the_page_says(change, tmp_path, monkeypatch, capsys):
    """Bug: a line that has another form now, or an answer from another version of the program."""
    for words in in_words(printed(change, tmp_path, monkeypatch, capsys)):
        assert words in change.answer
