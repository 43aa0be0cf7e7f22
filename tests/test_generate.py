"""The command line, as a user meets it."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, flat, write
from PIL import Image

import generate as module
from generate import main, stream_text
from load_weights import load_config, load_processor
from model import Qwen2_5_VL

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
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert prompt.endswith("What is this?<|im_end|>\n<|im_start|>assistant\n")
    assert "helpful" not in prompt
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


def test_settings_are_the_checkpoints_unless_a_flag_says_otherwise(say, monkeypatch):
    """Bugs: a default of another length, dtype or chance; a flag of 0, or an empty one, counts as none."""
    asked = {}

    def generate(model, inputs, **settings):
        asked.update(model=model, inputs=inputs, settings=settings)
        return iter([torch.tensor([5])])

    monkeypatch.setattr(module, "generate", generate)
    saved = dict(temperature=0.7, top_p=0.8, seed=5, repetition_penalty=1.2)
    monkeypatch.setattr(module, "load_generation_config", lambda path: dict(saved))
    assert say()[0] == 0
    assert asked["settings"] == saved | dict(max_new_tokens=256, graph=None)
    assert asked["model"].dtype == torch.bfloat16
    assert asked["inputs"]["image_grid_thw"].tolist() == [[1, 12, 16]]

    assert say("--temperature", "0", "--seed", "0", "--top-p", "1", "--system", "")[0] == 0
    zeros = dict(temperature=0.0, top_p=1.0, seed=0)
    assert asked["settings"] == saved | zeros | dict(max_new_tokens=256, graph=None)
    prompt = load_processor(TINY).tokenizer.decode(asked["inputs"]["input_ids"][0].tolist(), False)
    assert prompt.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")

    # A video takes the place of the demo picture.
    assert say("--video", str(ROOT / "assets" / "demo.webp"))[0] == 0
    assert asked["inputs"]["mm_token_type_ids"].unique().tolist() == [0, 2]


def test_the_attention_that_is_asked_for_runs(say, monkeypatch):
    """Bug: --attention is accepted, and the other one runs: in the tower, in the decoder, or in a step."""
    counts = []
    fused = F.scaled_dot_product_attention

    def counting(*args, **settings):
        counts[-1] += 1
        return fused(*args, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    for flags in ([], ["--attention", "sdpa"], ["--attention", "eager"]):
        counts.append(0)
        assert say("--max-new-tokens", "3", *flags)[0] == 0

    # The picture has two kinds of windows, in two blocks of four; then five layers, three times.
    assert counts == [2 * 2 + 2 + 3 * 5, 2 * 2 + 2 + 3 * 5, 0]


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
        return ["red ", "\x1b[2J\u202eb\tc\r\n", *obeyed, "~\xa0é\u2028"]

    # C0 but tab and newline, delete, C1 (of which \x9b is an escape sequence's start), marks of direction.
    obeyed = [chr(code) for code in range(0xa0) if not 0x20 <= code <= 0x7e and chr(code) not in "\t\n"]
    obeyed += "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    monkeypatch.setattr(module, "stream_text", stream_text)
    assert say()[1] == "red [2Jb\tc\n~\xa0é\u2028\n"


def test_answer_is_shown_as_it_comes(say, monkeypatch):
    """Bug: it stays in a buffer, and whoever reads a pipe gets it all at once."""
    class Pipe(io.StringIO):
        """Notes what has arrived at every flush."""
        def flush(self):
            arrived.append(self.getvalue())

    arrived = []
    monkeypatch.setattr("sys.stdout", Pipe())
    assert say()[0] == 0
    assert len(set(arrived)) > 10


def test_line_before_counts_the_bytes_of_the_32b(tmp_path):
    """Bugs: bytes of another dtype, a cache without its keys or its spare slots, sides swapped."""
    config = load_config(write(tmp_path, flat("32B")))
    with torch.device("meta"):
        model = Qwen2_5_VL(config).bfloat16()
    inputs = dict(
        input_ids=torch.zeros(1, 1000), image_grid_thw=[[1, 20, 30]], video_grid_thw=[[3, 4, 6]])

    # Keys and values of 64 layers, 8 heads, 128 channels, two bytes each; 1,000 + 30 tokens in steps of 64.
    cache = 2 * 64 * 8 * 128 * 2 * 1088
    assert module.line_before(model, inputs, 30) == (
        f"420x280, 84x56 in 3 steps; 1000 tokens; weights 66.905 GB, cache {cache / 1e9:.3f} GB, "
        "torch.bfloat16 on meta")


def test_line_after_says_what_it_took(monkeypatch):
    """Bugs: the first token counts into the rate, kilobytes taken for a thousand bytes."""
    used = SimpleNamespace(ru_maxrss=2_000_000)
    monkeypatch.setattr(module.resource, "getrusage", lambda who: used)
    times = [2.0, 2.5, 3.0]
    for platform, peak in (("linux", "2.05"), ("darwin", "0.00")):
        monkeypatch.setattr("sys.platform", platform)
        assert module.line_after(0.5, times, torch.device("cpu")) == (
            f"first token after 1.50 s, then 2 a second; 3 tokens; peak memory {peak} GB")

    # One token has no rate, and Windows tells no memory.
    monkeypatch.setattr(module, "resource", None)
    assert module.line_after(0.5, times[:1], torch.device("cpu")) == "first token after 1.50 s; 1 tokens"


# ---------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("argv, message", [
    (["--unknown"], "unrecognized arguments: --unknown; see python generate.py --help"),
    (["--temp", "1"], "unrecognized arguments: --temp 1; see python generate.py --help"),
    (["--model", "tiny"], "nothing to answer; give --prompt, --image or --video"),
    (["--fps", "2"], "--fps without --video; give --video, or leave --fps out"),
    (["--prompt", ""], "the prompt is empty; ask something"),
    (["--video", ""], ": no such file; check the path"),
    (["--image", "a\nb.png"], "a b.png: no such file; check the path"),
    (["--image", "a\x1b[2J\x9b1mb.png"], "error: a[2J1mb.png: no such file; check the path"),
    (["--model", "", "--prompt", "Hi"], ": no such directory; give a checkpoint's directory or a hub id"),
    (["--dtype", "float16"], "dtype float16: use bfloat16 or float32; float16 overflows in the vision tower"),
])
def test_mistake_is_one_line(argv, message, say, monkeypatch):
    """Bug: it ends in a traceback, in several lines, on stdout, or without a remedy."""
    monkeypatch.chdir(ROOT)
    status, out, err = say(*argv)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv, message", [
    (["--temperature", "-1"], "temperature -1.0: must be 0 (greedy) or above"),
    (["--temperature", "nan"], "temperature nan: must be 0 (greedy) or above"),
    (["--top-p", "2"], "top_p 2.0: must be above 0 and at most 1"),
    (["--seed", "-1"], "seed -1: must be from 0 to 2**64 - 1"),
    (["--max-new-tokens", "0"], "max_new_tokens 0: must be at least 1"),
    (["--max-new-tokens", "32700"], "73 tokens and 32700 new ones exceed the context of 32768: use fewer"),
    (["--max-pixels", "-1"], "max_pixels -1: must be above 0"),
    (["--video", str(ROOT / "assets" / "demo.webp"), "--fps", "0"], "fps 0.0: must be a number above 0"),
])
def test_meaningless_number_costs_no_loading(argv, message, capsys):
    """Bug: it is said after the weights have been read, which takes minutes for the 72B."""
    def load(*args):
        raise AssertionError("loaded")

    assert main(argv, load) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("typed, asked", [
    ("Hi\n", "Hi"), ("Hi\r\n", "Hi"), ("Hi\n\n", "Hi\n"), ("\n Hi ", "\n Hi ")])
def test_stdin_loses_its_last_line_end_alone(typed, asked, monkeypatch):
    """Bug: what echo adds is asked, too, or what somebody typed is not."""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed, newline=""))
    assert module.question("-") == asked


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

        def join(self):
            timers.append("joined")

    monkeypatch.setattr("threading.Timer", Timer)
    with module.progress("loading"):
        assert timers[0].running
        timers[0].fire()
        assert capsys.readouterr() == ("", "loading ...\n")
    assert not timers[0].running and timers[1] == "joined"


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
