"""A real checkpoint of any size, ours against Hugging Face's.

pytest tests/test_checkpoint.py --checkpoint DIR; without the option it is the tiny one. In float32 where that
fits into memory: pixels, ids, positions, every block and layer, logits, 32 tokens. In bfloat16 layer by
layer: the measure is each layer's distance to its own float32 self, ours at most 1.25 times theirs.
"""

import copy
import os
import trace

import numpy as np
import pytest
import torch
from benchmark import distance
from conftest import PARITY, hf_logits, make_pair, prompts
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from load_weights import checkpoint, load_config, load_model
from model import Qwen2_5_VL
from processing import load_processor

FACTOR = 1.25


@pytest.fixture
def path(request):
    return checkpoint(request.config.getoption("--checkpoint"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """An uneven picture: several windows, ragged at both edges."""
    noise = np.random.default_rng(0).integers(0, 256, (15, 19, 3), dtype=np.uint8)
    file = tmp_path_factory.mktemp("picture") / "noise.png"
    Image.fromarray(noise).resize((532, 420), Image.Resampling.BICUBIC).save(file)
    return file


def test_a_row_leaves(path, picture, tmp_path, capsys):
    with torch.device("meta"):
        needed = 4 * sum(p.numel() for p in Qwen2_5_VL(load_config(path)).parameters())
    if needed > 0.8 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        pytest.skip(f"float32 takes {needed / 1e9:.0f} GB; the other test goes layer by layer")
    files = [str(tmp_path / name) for name in ("ours.safetensors", "hf.safetensors")]
    for file, hf in zip(files, ([], ["--hf"])):
        assert trace.main([str(path), *hf, "-o", file, "--image", str(picture)]) == 0
    assert trace.main(files) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.endswith("no row leaves\n")


def test_bfloat16_layer_rounds_more_than_hugging_face(path, picture):
    """Blocks and layers one at a time, on the same input."""
    ours = load_model(path, dtype=torch.bfloat16, device="cpu")
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.bfloat16).eval().model
    inputs = load_processor(path)([{"role": "user", "content": [{"type": "image", "image": str(picture)}]}])
    both = [*zip(ours.visual.blocks, theirs.visual.blocks, strict=True),
            *zip(ours.model.layers, theirs.language_model.layers, strict=True)]
    calls = {}
    for module, _ in both:
        module.register_forward_hook(lambda module, args, out: calls.update({module: (args, out)}))
    ours(**inputs)
    for module, layer in both:
        (x, cos, sin, *rest), out = calls[module]
        exact = copy.deepcopy(module).float()(x.float(), cos.float(), sin.float(), *rest)
        if hasattr(module, "attn"):
            lengths = [patches for frames, runs in rest[0] for _ in range(frames)
                       for n, patches in runs for _ in range(n)]
            ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
            their_out = layer(x, cu_seqlens=ends, position_embeddings=(cos[:, 0, 0], sin[:, 0, 0]))
        else:
            their_out = layer(x, attention_mask=None, position_embeddings=(cos[:, 0], sin[:, 0]))
        error, their_error = ((y.float() - exact).pow(2).mean().sqrt() for y in (out, their_out))
        assert error <= FACTOR * their_error


def test_difference_is_not_seen(tmp_path, capsys):
    """Rounding passes; a wrong block is named before all that follows from it; a missing row is said."""
    def rows(wrong=0.0):
        rng = torch.Generator().manual_seed(0)
        return {name: torch.randn(3, 4, generator=rng) * (1 + 1e-7) + wrong * (name != "visual.patch_embed")
                for name in ("visual.patch_embed", "visual.blocks.2", "visual.blocks.10", "logits")}
    assert trace.compare(rows(), {name: row * (1 + 1e-7) for name, row in rows().items()})[1] is None
    lines, first = trace.compare(rows(), rows(wrong=1e-3))
    assert first == "visual.blocks.2" and [line.split()[0] for line in lines[1:]] == list(rows())
    assert trace.compare({"tokens": torch.tensor([1, 2])}, {"tokens": torch.tensor([1, 3])})[1] == "tokens"
    assert "shapes (3, 4) and (4, 3)" in trace.compare(rows(), {n: r.T for n, r in rows().items()})[0][1]
    np.savez(tmp_path / "other.npz", logits=rows()["logits"].numpy())
    trace.save_file(rows(), tmp_path / "ours.safetensors")
    assert trace.main([str(tmp_path / "ours.safetensors"), str(tmp_path / "other.npz")]) == 0
    assert "visual.blocks.2          only in the first" in capsys.readouterr().out
    assert trace.main(["tiny"]) == 2 and "give a checkpoint and -o FILE" in capsys.readouterr().err
    assert trace.main(["LICENSE", "LICENSE"]) == 2 and "LICENSE: not a trace" in capsys.readouterr().err


def test_further_from_float64_than_hugging_face(monkeypatch):
    """The median over five seeds of our largest error against HF's float64 model, and of HF's in float32."""
    inputs = prompts([[5, (20, 26), 7]])
    for attention in ("sdpa", "eager"):
        errors = []
        for seed in range(5):
            pair = make_pair(attention, seed)
            ours, theirs = pair.ours(**inputs), hf_logits(pair.hf, inputs)
            with monkeypatch.context() as patch:
                in_float64(patch)
                exact = hf_logits(pair.hf.double(), {k: v.double() if v.is_floating_point() else v
                                                     for k, v in inputs.items()})
            errors.append((distance(ours.double(), exact), distance(theirs.double(), exact)))
        mine, hf = (sorted(column)[2] for column in zip(*errors))
        assert mine <= FACTOR * hf
        PARITY[f"float64 oracle, {attention}: median of five largest errors (HF's {hf:.1e})"] = 1, mine


def in_float64(patch):
    """Wherever the model asks for float32, it gets float64: the norms, the rotaries, the softmax of eager."""
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax
    wider = lambda dtype: torch.float64 if dtype is torch.float32 else dtype
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    patch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: to(
        self, *map(wider, args), **{name: wider(value) for name, value in kwargs.items()}))
    patch.setattr(torch.nn.functional, "softmax",
                  lambda x, dim, dtype=None: softmax(x, dim, dtype=wider(dtype)))
