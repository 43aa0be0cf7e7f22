"""The tiny checkpoint: its files, what it can do, and that Hugging Face's classes read it as we do."""

import json
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
SCENES = 50


@pytest.fixture(scope="module")
def theirs():
    """Hugging Face's model in float32, picture processor and tokenizer, from the same directory."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    return model, Qwen2VLImageProcessorPil.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def asked():
    """A picture and a question for each of 50 scenes, all kinds in turn."""
    cases = []
    for n in range(SCENES):
        rng = train_tiny.random.Random(f"tests {n}")
        scene = train_tiny.Scene(rng, rng.choice(train_tiny.SIDES), rng.choice(train_tiny.SIDES))
        kind = ("describe", "locate", "count", "color", "every")[n % 5]
        options = [rest for k, *rest in train_tiny.questions(scene, rng) if k == kind]
        if options:     # in some scenes no shape is alone, and no color can be asked for
            cases.append((kind, scene.draw(), *options[0]))
    return cases


def inputs_of(picture, question, theirs):
    """What Hugging Face's parts make of a question: the template through jinja, placeholders by the grid."""
    _, pictures, tokenizer = theirs
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    inputs = pictures(picture, return_tensors="pt")
    count = int(inputs["image_grid_thw"].prod()) // 4
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * count)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    types = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return messages, dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types)


def test_engines_disagree_about_the_tiny_checkpoint(theirs, asked):
    """Our dict equals Hugging Face's parts' tensors, and from it both models say the same, token by token."""
    ours, processor = load_model(TINY, dtype=torch.float32), load_processor(TINY)
    settings = load_generation_config(TINY)
    for _, picture, question, _ in asked:
        messages, inputs = inputs_of(picture, question, theirs)
        mine = processor(messages)
        assert mine.keys() == inputs.keys()
        for name, value in inputs.items():
            assert_equal("inputs of the tiny checkpoint", mine[name], value)
        theirs[0].model.rope_deltas = None
        expected = theirs[0].generate(**mine, max_new_tokens=160)[0, inputs["input_ids"].shape[1]:]
        answer = torch.cat(list(generate(ours, mine, **settings)))
        assert_equal("tokens of the tiny checkpoint, in float32", answer, expected)


def test_tiny_has_forgotten(asked):
    """As it is used, in its own bfloat16. The README's table says how good it really is."""
    model, processor, right = load_model(TINY), load_processor(TINY), []
    for kind, picture, question, expected in asked:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        ids = torch.cat(list(generate(model, processor([{"role": "user", "content": content}]),
                                      **load_generation_config(TINY))))
        if kind in ("describe", "count", "color"):
            right.append(processor.decode(ids) == expected)
    assert sum(right) >= 0.85 * len(right)


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
