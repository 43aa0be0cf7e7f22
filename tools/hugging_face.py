"""What tests and tools share about Hugging Face's model: configs, the same weights in both, inputs."""

import re
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load_weights import load_config, published_name
from model import Qwen2_5_VL
from processing import IMAGE_PAD
from vision import Attend, sdpa

VISION = dict(
    depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, in_channels=3, patch_size=14,
    window_size=112, spatial_merge_size=2, temporal_patch_size=2, fullatt_block_indexes=[7, 15, 23, 31],
    tokens_per_second=2,
)


def config_dict(
    hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, tied: bool, **tower
) -> dict:
    """A config.json as transformers 5 writes it; the last four ids are those of pictures and videos."""
    width = hidden // heads
    text = dict(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        rms_norm_eps=1e-6,
        max_position_embeddings=128000,
        rope_parameters=dict(
            rope_type="default",
            rope_theta=1e6,
            mrope_section=[width // 8, 3 * width // 16, 3 * width // 16],
        ),
    )
    last = vocabulary - 4
    return dict(
        model_type="qwen2_5_vl",
        text_config=text,
        vision_config=VISION | dict(out_hidden_size=hidden) | tower,
        tie_word_embeddings=tied,
        image_token_id=last,
        video_token_id=last + 1,
        vision_start_token_id=last + 2,
        vision_end_token_id=last + 3,
    )


def ours_of(hf: Qwen2_5_VLForConditionalGeneration, attend: Attend = sdpa) -> Qwen2_5_VL:
    """Our model of the same config, with the very tensors of Hugging Face's."""
    with tempfile.TemporaryDirectory() as directory, torch.device("meta"):
        hf.config.save_pretrained(directory)
        ours = Qwen2_5_VL(load_config(directory), attend)

    state = {published_name(name): p for name, p in hf.state_dict().items()}
    if ours.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    ours.load_state_dict(state, strict=True, assign=True)
    return ours.eval().requires_grad_(False)


@lru_cache
def hf_processors(path: Path) -> tuple[PreTrainedTokenizerBase, Qwen2VLImageProcessorPil]:
    """Hugging Face's tokenizer and picture processor of a checkpoint, read once."""
    return AutoTokenizer.from_pretrained(path), Qwen2VLImageProcessorPil.from_pretrained(path)


def hf_inputs(path: Path, messages: list[dict]) -> dict[str, Tensor]:
    """What Hugging Face's picture processor, template and tokenizer make of a question about pictures."""
    tokenizer, processor = hf_processors(path)

    # Pixels and grids.
    pictures = [item["image"] for item in messages[0]["content"] if "image" in item]
    inputs = dict(processor(pictures, return_tensors="pt"))
    counts = iter((inputs["image_grid_thw"].prod(dim=1) // processor.merge_size**2).tolist())

    # The prompt, with every picture's placeholder repeated.
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = re.sub(re.escape(IMAGE_PAD), lambda pad: pad[0] * next(counts), prompt)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    types = (ids == tokenizer.convert_tokens_to_ids(IMAGE_PAD)).int()
    return inputs | dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types)


def hf_logits(
    hf: Qwen2_5_VLForConditionalGeneration, inputs: dict[str, Tensor], position_ids: Tensor | None = None
) -> Tensor:
    """Hugging Face's logits of whole prompts, (B, T, vocab)."""
    hf.model.rope_deltas = None     # left over from an earlier call
    return hf(**inputs, position_ids=position_ids, use_cache=False).logits


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value of b."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return ((a - b).abs().max() / b.abs().max()).item()
