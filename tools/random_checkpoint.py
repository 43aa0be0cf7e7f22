"""A random checkpoint in the published format, as a judge of engines: `python tools/cases.py --random CASES`.

A trained checkpoint is a lenient judge: answers of the tiny one survive wrong positions of videos, the tanh
form of GELU and, nearly, windows left out. Weights as models are initialized with are no judge at all: their
attention is flat, and they say one word again and again. Here attention is peaked, answers don't repeat
themselves, and a small cause becomes another token. The tower has the published widths, for engines that have
written them into their code; the decoder is small.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load_weights import load_config, load_generation_config
from model import Qwen2_5_VL

TINY = Path(__file__).resolve().parent.parent / "tiny"
DECODER = dict(
    hidden_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=1024,
    rope_theta=1e6,
    rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
    tie_word_embeddings=False,
)
TOWER = dict(hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=512)
SEED = 15              # the first one without a close call
SCALE = 1.4             # of matrices: from here on attention is peaked, and answers don't repeat themselves


def fill(model: Qwen2_5_VL, words: int, seed: int) -> None:
    """Weights under which a small cause has an effect. Only ids below `words` will be said."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.normal_(0, SCALE / math.sqrt(p[0].numel()), generator=generator)
        elif name.endswith("bias"):
            p.normal_(0, 0.2, generator=generator)
        else:
            p.uniform_(0.5, 1.5, generator=generator)

    # The merger's GELU works around -3, where its tanh form is a tenth off.
    first, _, second = model.visual.merger.mlp
    first.weight.mul_(0.3)
    first.bias.sub_(3)
    second.weight.mul_(150)

    # Words are as large as pictures.
    model.model.embed_tokens.weight.mul_(14)
    model.lm_head.weight[words:] = 0


def random_checkpoint(folder: Path, seed: int = SEED) -> Qwen2_5_VL:
    """Write one into a folder, with the tiny one's tokenizer. Returns its model, in float32."""
    for file in TINY.glob("*.json"):
        shutil.copy(file, folder / file.name)
    config = json.loads((TINY / "config.json").read_text()) | DECODER
    config["vision_config"] |= TOWER
    (folder / "config.json").write_text(json.dumps(config, indent=2))

    model = Qwen2_5_VL(load_config(folder)).eval().requires_grad_(False)
    fill(model, min(load_generation_config(TINY)["eos_token_id"]), seed)
    model.bfloat16()        # as published; what is left are the values in the file
    save_file(model.state_dict(), folder / "model.safetensors", metadata=dict(format="pt"))
    return model.float()
