"""Generation against Hugging Face's, token by token, and the command line as a user meets it."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import START, TOLERANCE, assert_close, assert_equal, prompts
from PIL import Image
from test_model import MIXED_ROWS, ROWS, VIDEO_ROWS

import generate as module
from generate import generate, main, sample, stream_text

ROOT = Path(__file__).parent.parent


def ours(model, inputs, monkeypatch=None, **settings):
    """Tokens (B, n) and the logits they were chosen from."""
    logits, original = [], module.sample
    if monkeypatch:
        monkeypatch.setattr(module, "sample", lambda x, *args: logits.append(x.clone()) or original(x, *args))
    return torch.stack(list(generate(model, inputs, **settings)), dim=1), logits


def theirs(hf, inputs, seed=None, **settings):
    hf.model.rope_deltas = None
    if seed is not None:
        torch.manual_seed(seed)
    out = hf.generate(**inputs, max_new_tokens=32, do_sample=seed is not None, pad_token_id=0,
                      return_dict_in_generate=True, output_logits=True, **settings)
    return out.sequences[:, inputs["input_ids"].shape[1]:], out.logits


@pytest.mark.parametrize("penalty", [1.0, 1.05])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_decoding_at_the_cache_length(pair, rows, penalty, monkeypatch):
    """A decode at the cache's length, one position too far, or with another row's positions: all show here.
    """
    inputs = prompts(rows)
    expected, their_logits = theirs(pair.hf, inputs, repetition_penalty=penalty)
    tokens, logits = ours(pair.ours, inputs, monkeypatch, max_new_tokens=32, repetition_penalty=penalty)
    for a, b in zip(logits, their_logits):
        assert_close("logits of 32 greedy steps", a, b)
        first, second = b.topk(2).values.T
        gap = ((first - second) / b.abs().max()).min()
        assert penalty > 1 or gap > 100 * TOLERANCE     # no ties that hide or fake
    assert len(logits) == 32 and all(len(row.unique()) >= 12 for row in expected)
    assert_equal("32 greedy tokens", tokens, expected)


@pytest.mark.parametrize("settings", [
    dict(temperature=0.9), dict(temperature=0.7, top_k=5), dict(temperature=1.0, top_p=0.6),
    dict(temperature=1.3, top_k=40, top_p=0.8, repetition_penalty=1.1),
], ids=str)
@pytest.mark.parametrize("rows", [ROWS["one picture"], ROWS["padded batch"]], ids=["one", "padded"])
def test_filters_in_another_order(pairs, rows, settings):
    pair, inputs = pairs("sdpa"), prompts(rows)
    if "repetition_penalty" in settings:    # Hugging Face penalises pads too: let pad be one the prompt has
        inputs["input_ids"][inputs["attention_mask"] == 0] = START
    expected, _ = theirs(pair.hf, inputs, seed=7, **dict(top_k=0, top_p=1.0) | settings)
    tokens, _ = ours(pair.ours, inputs, max_new_tokens=32, seed=7, **settings)
    assert_equal("32 sampled tokens", tokens, expected)
    assert not torch.equal(tokens, ours(pair.ours, inputs, max_new_tokens=32, seed=8, **settings)[0])


def test_decoding_drifts_from_one_pass(pair, monkeypatch):
    """Every step's logits are those of one pass over all; transformers 5.23.0 fails after a video."""
    inputs = prompts(MIXED_ROWS)
    tokens, logits = ours(pair.ours, inputs, monkeypatch, max_new_tokens=8)
    ids = torch.cat((inputs["input_ids"], tokens), 1)
    whole = pair.ours(**inputs | dict(input_ids=ids, attention_mask=None))
    assert_close("itself: chunked and cached = one pass", torch.stack(logits, 1), whole[:, -9:-1])


def test_penalty_for_pads_or_answer_only(pairs):
    """It counts prompt and answer, and not what fills a row up: a padded row answers as it does alone."""
    model, settings = pairs("sdpa").ours, dict(max_new_tokens=24, repetition_penalty=1.3)
    inputs = prompts([[30], [9]])
    alone = dict(input_ids=inputs["input_ids"][1:, 21:])
    answer = ours(model, alone, **settings)[0][0]
    for pad in answer.unique()[::3]:        # the most telling of pads: those that the answer wants to say
        inputs["input_ids"][1, :21] = pad
        assert torch.equal(ours(model, inputs, **settings)[0][1], answer)
    logits, seen = torch.tensor([[2.0, 1.9, -0.1]]), torch.tensor([[True, False, True]])
    assert sample(logits, seen, 0.0, 0, 1.0, 1.1, None).tolist() == [1]
    assert sample(-logits, ~seen, 0.0, 0, 1.0, 30.0, None).tolist() == [2]      # negative ones move down, too


def test_end_tokens_cut_to_one(pairs):
    model, inputs = pairs("sdpa").ours, prompts([[20], [30]])
    tokens, _ = ours(model, inputs, max_new_tokens=20)
    a, b = tokens[0, 4].item(), tokens[1, 9].item()
    stops = [next(i for i, t in enumerate(row) if t in (a, b)) for row in tokens.tolist()]
    stopped, _ = ours(model, inputs, max_new_tokens=20, eos_token_id=[a, b], pad_token_id=3)
    assert stopped.shape[1] == max(stops) + 1 < 20
    for row, full, stop in zip(stopped.tolist(), tokens.tolist(), stops):
        assert row[:stop + 1] == full[:stop + 1] and set(row[stop + 1:]) <= {3}
    assert ours(model, prompts([[20]]), max_new_tokens=20, eos_token_id=a)[0].shape[1] <= 5


def test_tower_or_prompt_run_again(pairs, monkeypatch):
    """The tower once, the prompt once, then one token a step."""
    model, shapes, towers = pairs("sdpa").ours, [], []
    decode = model.decode
    monkeypatch.setattr(
        model, "decode", lambda x, *args, **kwargs: shapes.append(x.shape[1]) or decode(x, *args, **kwargs))
    handle = model.visual.register_forward_hook(lambda *args: towers.append(1))
    inputs = prompts(ROWS["three pictures"])
    ours(model, inputs, max_new_tokens=6)
    handle.remove()
    assert shapes == [inputs["input_ids"].shape[1]] + [1] * 5 and len(towers) == 1


def test_captured_step_differs_from_the_plain_loop(pairs, monkeypatch):
    """The function that CUDA captures, run as it is: static buffers, whole mask, the device's counters."""
    def not_captured(step, cache):
        for _ in range(3):
            cache.clear()
            step()
        cache.clear()
        return step
    monkeypatch.setattr(module, "capture", not_captured)
    model = pairs("sdpa").ours
    for rows in (ROWS["one picture"], ROWS["padded batch"], VIDEO_ROWS):
        plain, captured = (ours(model, prompts(rows), max_new_tokens=20, graph=graph)[0]
                           for graph in (False, True))
        assert torch.equal(plain, captured)


def test_half_a_character_is_shown(published):
    from processing import load_processor
    processor = load_processor(published[0])
    words = "né 漢字 👩‍👩‍👧 \N{REPLACEMENT CHARACTER} 🇩🇪!"
    pieces = list(stream_text(processor.tokenizer.encode(words).ids, processor))
    assert "".join(pieces) == words and len(pieces) > 8
    assert sum("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces) == 1
    cut = processor.tokenizer.encode("𓀀").ids[:-1]
    assert "".join(stream_text(cut, processor)).endswith("\N{REPLACEMENT CHARACTER}")


def test_first_command_says_more_than_the_answer(capsys):
    """The answer on stdout and nothing else; what stands on stderr test_readme.py looks at."""
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.endswith(".\n") and out.count("\n") == 1 and len(err.splitlines()) == 3


def test_flags_without_effect(capsys, tmp_path):
    picture = ROOT / "assets" / "demo.png"
    frames = tmp_path / "frames"
    frames.mkdir()
    for i in range(4):
        Image.new("RGB", (112, 112), (255, 250 - i, 250)).save(frames / f"{i}.png")
    two = ["--image", str(picture), "--image", str(picture), "--video", str(frames), "--fps", "2"]
    assert main([*two, "--prompt", "Describe the image.", "--system", "Be brief.", "--max-new-tokens", "2",
                 "--temperature", "0.8", "--top-p", "0.9", "--seed", "3", "--max-pixels", "20000",
                 "--device", "cpu", "--dtype", "float32", "--attention", "eager", "--no-graph"]) == 0
    out, err = capsys.readouterr()
    assert "112x112 in 2 steps; " in err and "torch.float32 on cpu" in err and "; 2 tokens; " in err


def test_sampling_flag_overridden_by_the_checkpoint(capsys):
    answers = set()
    for seed in range(4):
        assert main(["--temperature", "3", "--seed", str(seed), "--max-new-tokens", "8"]) == 0
        answers.add(capsys.readouterr().out)
    assert len(answers) > 1


@pytest.mark.parametrize("argv, message", [
    (["--model", "tiny"], "nothing to answer; give --prompt, --image or --video"),
    (["--video", "tests"], "a video needs frames and fps, the rate at which they were taken; give both"),
    (["--image", ""], ": no such file; check the path"),
    (["--image", "a\nb.png"], "a b.png: no such file; check the path"),
    (["--video", ""], ": no such file; check the path"),
    (["--video", "tests", "--fps", "nan"], "fps nan: must be above 0"),
    (["--model", "", "--prompt", "Hi"], ": no such directory; give a checkpoint's directory or a hub id"),
    (["--max-pixels", "1"], "max_pixels 1: must be above 0 and at least min_pixels, 12544"),
    (["--top-p", "1.5"], "top_p 1.5: must be above 0 and at most 1"),
    (["--dtype", "int8"], "dtype int8: use bfloat16 or float32"),
    (["--fps", "2"], "--fps without --video; give --video, or leave --fps out"),
    (["--prompt", ""], "the prompt is empty; ask something"),
    (["--unknown"], "unrecognized arguments: --unknown; see python generate.py --help"),
    (["--max-new-tokens", "0"], "max_new_tokens 0: must be at least 1"),
    (["--max-new-tokens", "32700"], "73 tokens and 32700 new ones exceed the context of 32768: use fewer"),
    (["--temperature", "-1"], "temperature -1.0: must be 0 (greedy) or above"),
    (["--temperature", "nan"], "temperature nan: must be 0 (greedy) or above"),
    (["--top-p", "0"], "top_p 0.0: must be above 0 and at most 1"),
    (["--seed", str(2**70)], f"seed {2**70}: must be from 0 to 2**64 - 1"),
    (["--temperature", "inf"], "temperature inf: must be 0 (greedy) or above"),
    (["--top-p", "nan"], "top_p nan: must be above 0 and at most 1"),
    (["--dtype", "float16"], "dtype float16: use bfloat16 or float32; float16 overflows in the vision tower"),
    (["--device", "cuda"], "device cuda: not to be had here; use cpu"),
])
def test_mistake_answered_with_a_traceback(argv, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    if argv == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is CUDA")
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name, content, message", [
    ("config.json", '{"model_type": "llava"}', "config.json: model_type 'llava' is not supported; use a pub"),
    ("adapter_config.json", "{}", "a LoRA adapter only; merge it into its base model and save that"),
])
def test_another_model_called_incomplete(name, content, message, tmp_path, capsys):
    """What else a directory may hold is said before the files are missed that it hasn't."""
    (tmp_path / name).write_text(content)
    assert main(["--model", str(tmp_path), "--prompt", "Hi"]) == 2
    assert message in capsys.readouterr().err


def test_patches_of_another_size_end_in_a_traceback(capsys, monkeypatch):
    processor = replace(module.load_processor(ROOT / "tiny"), temporal_patch_size=0)
    monkeypatch.setattr(module, "load_processor", lambda *args, **limits: processor)
    assert main([]) == 2 and "tiny: its preprocessor and config.json differ" in capsys.readouterr().err


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_large_picture_makes_a_noise(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)      # the demo has more, but not twice as many
    assert main(["--max-new-tokens", "1"]) == 0


def test_closed_stderr_moves_notes_into_the_answer(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert main(["--image", "nowhere.png"]) == 2 and capsys.readouterr().out == ""


@pytest.mark.parametrize("stdin, message", [(None, "ask something"), (io.StringIO(" \n"), "ask something")])
def test_no_question_on_stdin_ends_in_a_traceback(stdin, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["--prompt", "-"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def start(*arguments, stdout=subprocess.PIPE, **options):
    return subprocess.Popen([sys.executable, ROOT / "generate.py", *arguments], stdout=stdout,
                            stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9663676416 bytes."),
], ids=["cuda", "cpu"])
def test_out_of_memory_ends_in_a_traceback(error, capsys, monkeypatch):
    def full(*args, **settings):
        raise error
    monkeypatch.setattr(module, "generate", full)
    assert main([]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: out of memory; use a smaller --max-pixels or --dtype bfloat16")


def test_long_work_says_nothing(capsys, monkeypatch):
    timer = threading.Timer
    monkeypatch.setattr("threading.Timer", lambda seconds, *args: timer(seconds / 100, *args))
    with module.progress("loading"):
        time.sleep(0.2)
    assert capsys.readouterr().err == "loading ...\n"


def test_terminal_obeys_the_answer(capsys, monkeypatch):
    """Colours, cursor movements and changes of direction in an answer don't reach the terminal."""
    def stream_text(tokens, processor):
        return [str(len(list(tokens)) > 0), "\x1b[2J\u202eb\tc\r\n"]
    monkeypatch.setattr(module, "stream_text", stream_text)
    assert main([]) == 0
    assert capsys.readouterr().out == "True[2Jb\tc\n\n"


def test_stdin_not_read_or_another_answer_elsewhere(tmp_path):
    process = start("--prompt", "-", cwd=tmp_path, stdin=subprocess.PIPE)
    out, err = process.communicate("Describe the image.", timeout=60)
    assert process.returncode == 0, err
    again = start(cwd=ROOT)
    assert again.communicate(timeout=60)[0] == out


def test_closed_pipe_makes_a_noise():
    read, write = os.pipe()
    os.close(read)
    process = start(stdout=write)
    os.close(write)
    assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode == 0


def test_interruption_leaves_a_traceback(tmp_path):
    for file in (ROOT / "tiny").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text("{}")      # no end token: answers on
    process = start("--model", tmp_path, "--prompt", "Hi", "--max-new-tokens", "20000")
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


@pytest.mark.parametrize("owner, name", [(module, "load_model"), (module.Qwen2_5_VL, "embed")])
def test_interruption_before_the_first_token(owner, name, capsys, monkeypatch):
    """Ctrl-C while the weights load, and while the prompt is read."""
    def interrupt(*args, **settings):
        raise KeyboardInterrupt
    monkeypatch.setattr(owner, name, interrupt)
    assert main([]) == 130 and capsys.readouterr().out == ""
