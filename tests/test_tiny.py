"""The tiny checkpoint: its files, what it can do, and that Hugging Face's classes read it as we do."""

import json
import re
from pathlib import Path

import pytest
import torch
import train_tiny
from conftest import assert_equal
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from generate import generate
from load_weights import load_generation_config, load_model
from processing import load_processor

TINY = Path(__file__).parent.parent / "tiny"
SCENES = 49


@pytest.fixture(scope="module")
def theirs():
    """Hugging Face's model in float32, picture processor and tokenizer, from the same directory."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    return model, Qwen2VLImageProcessorPil.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def asked():
    """A question about each of 49 scenes, all kinds in turn; in some scenes a kind has nothing to ask."""
    kinds = ("describe", "locate", "count", "color", "every", "compare")
    return [pair for n in range(SCENES) for pair in train_tiny.asked(n, 1, (kinds[n % len(kinds)],))]


def inputs_of(messages, theirs):
    """What Hugging Face's parts make of a question: the template through jinja, placeholders by the grid."""
    _, processor, tokenizer = theirs
    pictures = [item["image"] for item in messages[0]["content"] if "image" in item]
    inputs = processor(pictures, return_tensors="pt")
    counts = iter((inputs["image_grid_thw"].prod(dim=1) // 4).tolist())
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = re.sub(r"<\|image_pad\|>", lambda pad: pad[0] * next(counts), prompt)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    types = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types)


def test_engines_disagree_about_the_tiny_checkpoint(theirs, asked):
    """Our dict equals Hugging Face's parts' tensors, and from it both models say the same, token by token."""
    ours, processor = load_model(TINY, dtype=torch.float32), load_processor(TINY)
    settings = load_generation_config(TINY)
    for pair in asked:
        messages = train_tiny.conversation(*pair)
        mine, inputs = processor(messages), inputs_of(messages, theirs)
        assert mine.keys() == inputs.keys()
        for name, value in inputs.items():
            assert_equal("inputs of the tiny checkpoint", mine[name], value)
        theirs[0].model.rope_deltas = None
        expected = theirs[0].generate(**mine, max_new_tokens=256)[0, inputs["input_ids"].shape[1]:]
        answer = torch.cat(list(generate(ours, mine, **settings)))
        assert_equal("tokens of the tiny checkpoint, in float32", answer, expected)


def test_tiny_has_forgotten():
    """As it is used, in its own bfloat16. The README's table says how good it really is."""
    answers = list(train_tiny.answers(TINY, seed="tests", scenes=10))
    assert len(answers) >= 60 and sum(map(train_tiny.good, answers)) >= 0.9 * len(answers)


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
