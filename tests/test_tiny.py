"""The tiny checkpoint: its files, what it can do, and that Hugging Face's classes read it as we do."""

import json
import re
from pathlib import Path
from trace import hf_inputs

import torch
import train_tiny
from conftest import assert_equal
from transformers import Qwen2_5_VLForConditionalGeneration

from generate import generate
from load_weights import load_generation_config, load_model
from processing import load_processor

TINY = Path(__file__).parent.parent / "tiny"


def test_engines_disagree_about_the_tiny_checkpoint():
    """Our dict equals Hugging Face's parts' tensors, and from it both models say the same, token by token."""
    ours, processor = load_model(TINY, dtype="float32"), load_processor(TINY)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    questions = list(train_tiny.asked(0, 10, ("describe", "locate", "count", "color", "every", "compare")))
    assert len(questions) >= 50
    for pair in questions:
        messages = train_tiny.conversation(*pair)
        mine, inputs = processor(messages), hf_inputs(TINY, messages)
        assert mine.keys() == inputs.keys()
        for name, value in inputs.items():
            assert_equal("inputs of the tiny checkpoint", mine[name], value)
        theirs.model.rope_deltas = None
        expected = theirs.generate(**mine, max_new_tokens=256)[0, inputs["input_ids"].shape[1]:]
        answer = torch.cat(list(generate(ours, mine, **load_generation_config(TINY))))
        assert_equal("tokens of the tiny checkpoint, in float32", answer, expected)


def test_tiny_has_forgotten(tmp_path, capsys, monkeypatch):
    """In its own bfloat16, as it is used, by the command whose table of 500 scenes the README shows."""
    monkeypatch.setattr("sys.argv", ["train_tiny.py", "--evaluate", "tiny", "--scenes", "10", "--seed", "9",
                                     "--failures", str(tmp_path / "wrong.png")])
    train_tiny.main()
    reached = [float(share) for share in re.findall(r"\| ([\d.]+)% \|", capsys.readouterr().out)]
    assert len(reached) == 8 and min(reached) >= 70 and sum(reached) / 8 >= 95
    assert (tmp_path / "wrong.png").exists()


def test_files_are_large_or_incomplete():
    sizes = {file.name: file.stat().st_size for file in TINY.iterdir()}
    assert sizes.keys() == {
        "config.json", "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert sum(sizes.values()) <= 6_000_000
    model = load_model(TINY)
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    config = json.loads((TINY / "config.json").read_text())
    published = set(train_tiny.vision.VisionConfig.__dataclass_fields__)
    assert published <= config["vision_config"].keys()
