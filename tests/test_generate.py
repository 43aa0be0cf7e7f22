"""The command line, as a user meets it."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from PIL import Image

import generate as module
from generate import main, stream_text
from load_weights import load_processor
from vision import eager

ROOT = Path(__file__).parent.parent


def without_progress(err):
    """What a run says on stderr, without the lines that depend on how long it takes."""
    return re.sub(r"^(loading|reading) \.\.\.\n", "", err, flags=re.MULTILINE)


@pytest.fixture
def say(capsys):
    """Runs the command line. Gives exit status, stdout and stderr."""
    def say(*argv):
        status = main(list(argv))
        out, err = capsys.readouterr()
        return status, out, without_progress(err)
    return say


def start(*argv, stdout=subprocess.PIPE, **options):
    """The command line in a process of its own."""
    command = [sys.executable, ROOT / "generate.py", *argv]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, **options)


# ---------------------------------------------------------------------------- the answer

def test_stdout_holds_the_answer_alone(say):
    """Bug: a note goes to stdout. What stands on stderr test_readme.py looks at."""
    status, out, err = say()
    assert status == 0
    assert out.endswith(".\n") and out.count("\n") == 1
    assert len(err.splitlines()) == 3


def test_answer_is_the_same_from_stdin_and_elsewhere(tmp_path, say):
    """Bugs: files are looked for where the user is, and not beside the program; stdin is not read."""
    process = start("--prompt", "-", cwd=tmp_path, stdin=subprocess.PIPE)
    out, err = process.communicate("Describe the image.")
    assert process.returncode == 0, err
    assert say()[1] == out


def test_flags_take_effect(say, monkeypatch, tmp_path):
    """Bugs: a flag is accepted and forgotten, or the checkpoint's own settings override it."""
    for i in range(4):
        Image.new("RGB", (224, 168), (255, 250 - i, 250)).save(tmp_path / f"{i}.png")
    picture = str(ROOT / "assets" / "demo.png")
    asked = {}

    def generate(model, inputs, **settings):
        asked.update(model=model, inputs=inputs, settings=settings)
        return iter([torch.tensor([5])])

    monkeypatch.setattr(module, "generate", generate)
    status, _, err = say(
        "--image", picture, "--image", picture, "--video", str(tmp_path), "--fps", "4",
        "--prompt", "What is this?", "--system", "Be brief.", "--max-pixels", "20000",
        "--max-new-tokens", "2", "--temperature", "0.8", "--top-p", "0.9", "--seed", "3", "--no-graph",
        "--device", "cpu", "--dtype", "float32", "--attention", "eager")
    assert status == 0

    # What is asked: two pictures, a video, the question.
    inputs = asked["inputs"]
    ids = inputs["input_ids"][0].tolist()
    prompt = load_processor(TINY).tokenizer.decode(ids, skip_special_tokens=False)
    assert "system\nBe brief." in prompt and "What is this?" in prompt
    assert inputs["mm_token_type_ids"][0].unique_consecutive().tolist() == [0, 1, 0, 1, 0, 2, 0]
    assert inputs["second_per_grid_ts"].tolist() == [0.5]
    for grid in (inputs["image_grid_thw"], inputs["video_grid_thw"]):
        assert (grid[:, 1:].prod(dim=1) * 14**2 <= 20_000).all()
    assert "in 2 steps; " in err

    # How, and whom.
    expected = dict(max_new_tokens=2, temperature=0.8, top_p=0.9, seed=3, graph=False)
    assert expected.items() <= asked["settings"].items()
    model = asked["model"]
    assert model.device.type == "cpu" and model.dtype == torch.float32
    assert model.model.layers[0].self_attn.attend is eager


def test_text_comes_in_whole_characters(published):
    """Bug: half a character is shown, as a replacement character, before its other half is there."""
    directory, _ = published
    processor = load_processor(directory)
    words = "né 漢字 👩‍👩‍👧 \N{REPLACEMENT CHARACTER} 🇩🇪!"
    pieces = list(stream_text(processor.tokenizer.encode(words).ids, processor))
    assert "".join(pieces) == words
    assert len(pieces) > 8
    assert sum("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces) == 1       # its own

    # An answer may end in the middle of one.
    cut = processor.tokenizer.encode("𓀀").ids[:-1]
    assert "".join(stream_text(cut, processor)).endswith("\N{REPLACEMENT CHARACTER}")


def test_terminal_never_obeys_the_answer(say, monkeypatch):
    """Bug: colors, cursor movements and changes of direction in an answer reach the terminal."""
    def stream_text(tokens, processor):
        assert len(list(tokens)) > 0
        return ["red ", "\x1b[2J\u202eb\tc\r\n"]

    monkeypatch.setattr(module, "stream_text", stream_text)
    assert say()[1] == "red [2Jb\tc\n\n"


# ---------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("argv, message", [
    (["--unknown"], "unrecognized arguments: --unknown; see python generate.py --help"),
    (["--model", "tiny"], "nothing to answer; give --prompt, --image or --video"),
    (["--fps", "2"], "--fps without --video; give --video, or leave --fps out"),
    (["--prompt", ""], "the prompt is empty; ask something"),
    (["--video", ""], ": no such file; check the path"),
    (["--image", "a\nb.png"], "a b.png: no such file; check the path"),
    (["--model", "", "--prompt", "Hi"], ": no such directory; give a checkpoint's directory or a hub id"),
    (["--dtype", "float16"], "dtype float16: use bfloat16 or float32; float16 overflows in the vision tower"),
    (["--max-new-tokens", "32700"], "73 tokens and 32700 new ones exceed the context of 32768: use fewer"),
])
def test_mistake_is_one_line(argv, message, say, monkeypatch):
    """Bug: it ends in a traceback, in several lines, on stdout, or without a remedy."""
    monkeypatch.chdir(ROOT)
    status, out, err = say(*argv)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("stdin", [None, io.StringIO(" \n")], ids=["closed", "empty"])
def test_empty_stdin_is_one_line(stdin, say, monkeypatch):
    """Bug: it ends in a traceback."""
    monkeypatch.setattr("sys.stdin", stdin)
    assert say("--prompt", "-") == (2, "", "error: the prompt is empty; ask something\n")


@pytest.mark.parametrize("name, content, message", [
    ("config.json", '{"model_type": "llava"}', "config.json: model_type 'llava' is not supported; use a pub"),
    ("adapter_config.json", "{}", "a LoRA adapter only; merge it into its base model and save that"),
])
def test_another_model_is_refused_by_name(name, content, message, say, tmp_path):
    """Bug: it is called incomplete, for files that it hasn't, before anybody looks at what it is."""
    (tmp_path / name).write_text(content)
    status, _, err = say("--model", str(tmp_path), "--prompt", "Hi")
    assert status == 2
    assert message in err


# ---------------------------------------------------------------------------- manners

def test_long_work_is_announced(capsys, monkeypatch):
    """Bug: silence while a checkpoint is downloaded, or a line about work that is already done."""
    timers = []

    class Timer:
        """Waits to be fired by hand."""
        def __init__(self, seconds, function, args):
            assert seconds == 2
            self.function = function
            self.args = args
            self.running = False
            timers.append(self)

        def fire(self):
            self.function(*self.args)

        def start(self):
            self.running = True

        def cancel(self):
            self.running = False

    monkeypatch.setattr("threading.Timer", Timer)
    with module.progress("loading"):
        assert timers[0].running
        timers[0].fire()
        assert capsys.readouterr() == ("", "loading ...\n")
    assert not timers[0].running


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_large_picture_is_read_quietly(say, monkeypatch):
    """Bug: Pillow warns of a picture that it reads all the same."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)      # the demo has more, but not twice as many
    status, _, err = say("--max-new-tokens", "1")
    assert status == 0
    assert len(err.splitlines()) == 3


def test_closed_stderr_leaves_the_answer_alone(say, monkeypatch):
    """Bug: notes move to stdout."""
    monkeypatch.setattr("sys.stderr", None)
    assert say("--image", "nowhere.png") == (2, "", "")


def test_closed_pipe_ends_it_silently():
    """Bug: a traceback, because the reader has seen enough."""
    read, write = os.pipe()
    os.close(read)
    process = start(stdout=write)
    os.close(write)
    _, err = process.communicate()
    assert process.returncode == 0
    assert "Traceback" not in err and "error" not in err


@pytest.mark.parametrize("owner, name", [
    (module, "load_model"),
    (module.Qwen2_5_VL, "embed"),
    (module.Processor, "decode"),
], ids=["loading", "reading", "answering"])
def test_interruption_ends_with_130(owner, name, say, monkeypatch):
    """Bug: Ctrl-C leaves a traceback."""
    def interrupt(*args, **settings):
        raise KeyboardInterrupt     # as Python makes it of the signal, where nobody ignores that

    monkeypatch.setattr(owner, name, interrupt)
    status, out, err = say()
    assert status == 130
    assert out == ""
    assert err.endswith("\n\n") or err == "\n"      # the shell's prompt begins a line of its own
