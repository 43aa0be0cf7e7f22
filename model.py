"""Tokens become logits: the decoder, its cache, and the splicing in of vision tokens.

A forward pass, with the sizes of one picture of 672 x 448 pixels and the 7B:

    pixel_values (1536, 1176)  -- vision.VisionTransformer -->  vision tokens (384, 3584)
    input_ids (1, T)           -- embed, splice -->             x (1, T, 3584), vision tokens in their places
                               -- rope.mrope_positions -->      position_ids (3, 1, T)
    x, position_ids            -- logits: 28 layers, head -->   logits (1, T, 152064)

Read from the top: config, cache, attention, layer, model. After a picture two counters differ: how many
tokens the cache holds (KVCache.length), and the MRoPE position of the next one. Neither follows from the
other, so the caller keeps the position and passes it in. No module keeps it, where it could go stale.

Sources: Qwen2.5 (arXiv 2412.15115) section 2, Qwen2.5-VL (2502.13923) section 2.1. Next: sampling.py

Shapes: B batch, T new tokens, S slots attended to, C width, H heads, D head dim.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rope import mrope_positions, mrope_rotary, rotate
from vision import Attend, RMSNorm, SwiGLU, VisionConfig, VisionTransformer, sdpa


@dataclass(frozen=True)
class Config:
    vocab_size: int                     # rows of the embedding, more than there are tokens
    hidden_size: int
    intermediate_size: int              # width of the MLPs
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]      # channel pairs that rotate with time, row and column
    max_position_embeddings: int
    tie_word_embeddings: bool           # the head is the embedding (3B)
    image_token_id: int
    video_token_id: int
    vision: VisionConfig

    def __post_init__(self):
        heads = self.num_attention_heads
        kv_heads = self.num_key_value_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"num_attention_heads {heads} must be a multiple of "
                             f"num_key_value_heads {kv_heads}")
        if len(self.mrope_section) != 3:
            raise ValueError(f"mrope_section {self.mrope_section} must be three numbers")
        if self.vision.out_hidden_size != self.hidden_size:
            raise ValueError(f"vision out_hidden_size {self.vision.out_hidden_size} must equal "
                             f"hidden_size {self.hidden_size}")

    @property
    def head_dim(self) -> int:
        # The sections add up to all D/2 channel pairs. `load_config` checks that D is hidden_size / heads.
        return 2 * sum(self.mrope_section)


# ---------------------------------------------------------------------------- the cache

class LayerCache(NamedTuple):
    """One layer's part of a KVCache, its first S slots."""
    slots: Tensor           # (T,) int64, where the new tokens go
    k: Tensor               # (B, kv heads, S, D), a view of the cache
    v: Tensor

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of T new tokens, (B, kv heads, T, D). Returns those of all S slots."""
        return self.k.index_copy_(2, self.slots, k), self.v.index_copy_(2, self.slots, v)


class KVCache:
    """Keys and values of up to max_tokens tokens, allocated once: nothing moves while decoding."""

    def __init__(
        self, config: Config, batch_size: int, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ):
        layers = config.num_hidden_layers
        shape = (layers, batch_size, config.num_key_value_heads, max_tokens, config.head_dim)
        # Zeros, because slots that are masked out enter the product all the same, and 0 * NaN is NaN.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

        # How many tokens are stored: as a Python int, and on the device, for a CUDA graph (sampling.py),
        # which runs no Python.
        self.length = 0
        self.end = torch.zeros(1, device=device, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def reserve(self, T: int) -> Tensor:
        """The slots (T,) of the next T tokens; HF: cache_position. ValueError if they don't fit."""
        max_tokens = self.k.shape[3]
        if self.length + T > max_tokens:
            raise ValueError(f"the cache is full: it holds {self.length} of at most {max_tokens} tokens and "
                             f"{T} more were given; make it with a larger max_tokens")
        slots = self.end + torch.arange(T, device=self.end.device)
        self.length += T
        self.end += T
        return slots

    def layers(self, slots: Tensor, S: int) -> list[LayerCache]:
        return [LayerCache(slots, k[:, :, :S], v[:, :, :S]) for k, v in zip(self.k, self.v)]


# ---------------------------------------------------------------------------- the layers

class Attention(nn.Module):
    """Grouped queries: neighboring query heads share a key head and a value head."""

    def __init__(self, config: Config, attend: Attend):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.attend = attend

        C = config.hidden_size
        D = config.head_dim
        self.q_proj = nn.Linear(C, self.num_heads * D)
        self.k_proj = nn.Linear(C, self.num_kv_heads * D)
        self.v_proj = nn.Linear(C, self.num_kv_heads * D)
        self.o_proj = nn.Linear(self.num_heads * D, C, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, causal: bool, cache: LayerCache | None
    ) -> Tensor:
        H = self.num_heads
        kv_heads = self.num_kv_heads

        # Queries and keys side by side, so that one rotation serves both.
        qk = torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1).unflatten(2, (H + kv_heads, -1))
        q, k = rotate(qk.transpose(1, 2), cos, sin).split((H, kv_heads), dim=1)     # (B, heads, T, D)
        v = self.v_proj(x).unflatten(2, (kv_heads, -1)).transpose(1, 2)

        # Remember the new keys and values, and attend to all that are remembered.
        if cache is not None:
            k, v = cache.update(k, v)                                               # (B, kv heads, S, D)
        y = self.attend(q, k, v, mask, causal)

        # The heads side by side again.
        return self.o_proj(y.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    def __init__(self, config: Config, attend: Attend):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, attend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, causal: bool, cache: LayerCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, causal, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def causal_mask(slots: Tensor, S: int, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What to add to the scores of new tokens at slots (T,) against S slots: (B or 1, 1, T, S), 0 or -inf.

    Slots decide, never positions: inside a picture those repeat and go backward.
    """
    keys = torch.arange(S, device=slots.device)
    queries = slots[:, None]
    visible = (keys <= queries)[None, None]

    # A pad sees itself, because the softmax of a row that sees nothing would be NaN.
    if attention_mask is not None:
        visible = (visible & attention_mask[:, None, None].bool()) | (keys == queries)
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, -torch.inf)


# ---------------------------------------------------------------------------- the model

class Qwen2_5_VL(nn.Module):
    """Parameters are named as in the published files. HF: Qwen2_5_VLForConditionalGeneration.

    To generate: `positions` once, for the prompt; then `embed` and `logits`, for the prompt and again for
    every new token, with a cache. `forward` does all three for whole prompts, to train or to compare.
    """

    def __init__(self, config: Config, attend: Attend = sdpa):
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config.vision, attend)

        # Empty, because a random start on the meta device would import torch's compiler, which takes seconds.
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding.from_pretrained(embedding, freeze=False),
            layers=nn.ModuleList(DecoderLayer(config, attend) for _ in range(config.num_hidden_layers)),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        ))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        # A function: `rope.mrope_positions` with this model's token ids and sizes.
        self.positions = partial(
            mrope_positions,
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            merge_size=config.vision.spatial_merge_size,
            tokens_per_second=config.vision.tokens_per_second,
        )

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
    ) -> Tensor:
        """Token embeddings (B, T, C), with vision tokens at the placeholders of pictures and videos.

        input_ids: (B, T) int64; pixels: (N, 1176) floats; both are moved to the model's device. Grids:
        (items, 3) int64, best on the CPU. Raises ValueError if the numbers of placeholders and vision tokens
        differ.
        """
        input_ids = input_ids.to(self.device)
        x = self.model.embed_tokens(input_ids)

        # A prompt is checked even if there are no pixels: its placeholders would be read as words. A single
        # token is part of an answer, and looking at it would stall the GPU.
        is_prompt = input_ids.shape[1] > 1
        if pixel_values is not None or is_prompt:
            x = self.splice(x, input_ids == self.config.image_token_id, pixel_values, image_grid_thw)
        if pixel_values_videos is not None or is_prompt:
            x = self.splice(x, input_ids == self.config.video_token_id, pixel_values_videos, video_grid_thw)
        return x

    def splice(
        self, x: Tensor, placeholders: Tensor, pixels: Tensor | None, grid_thw: Tensor | None
    ) -> Tensor:
        """x (B, T, C) with the vision tokens of pictures or videos where placeholders (B, T) is true.

        The whole batch is filled row by row, so items lie in order of appearance.
        """
        tokens = x[0, :0]       # (0, C), if there are no pixels
        if pixels is not None:
            tokens = self.visual(pixels.to(x.device), grid_thw).to(x.dtype)     # (N / 4, C)
        if placeholders.sum() != len(tokens):
            raise ValueError(f"the prompt has {placeholders.sum()} placeholders for pictures or for videos, "
                             f"but their pixels make {len(tokens)} tokens; pass all that the processor made")
        return x.masked_scatter(placeholders[:, :, None], tokens)

    def logits(
        self,
        x: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, vocab) of T new tokens, which follow those that the cache holds.

        x: (B, T, C); position_ids: (3, B, T). attention_mask: (B, S) over stored and new tokens, 1 real and
        0 pad; with a cache it may be longer, and later slots are ignored. Logits at pads are finite and mean
        nothing. last_only: logits of the last token alone, (B, 1, vocab).
        Raises ValueError if the cache is too small.
        """
        config = self.config
        B, T, _ = x.shape
        assert position_ids.shape == (3, B, T), (position_ids.shape, x.shape)

        # The slots of the new tokens, and how many they are scored against.
        if cache is None:
            slots = torch.arange(T, device=x.device)
            S = T
        else:
            slots = cache.reserve(T)
            S = cache.length
        if attention_mask is not None:      # S may pass the filled slots: `causal_mask` hides those
            most = T if cache is None else cache.k.shape[3]
            assert S <= attention_mask.shape[1] <= most, (attention_mask.shape, S, most)
            S = attention_mask.shape[1]

        # What a token sees. Without pads, a whole prompt is causal and one new token sees everything, so
        # neither needs a mask tensor. A chunk (1 < T < S) needs one, and so does an attention_mask.
        mask = None
        causal = attention_mask is None and T == S
        if attention_mask is not None or 1 < T < S:
            mask = causal_mask(slots, S, attention_mask, x.dtype)

        # The angles, once for all layers.
        cos, sin = mrope_rotary(
            position_ids, config.head_dim, config.rope_theta, config.mrope_section, x.dtype)
        cos = cos[:, None]                                                      # (B, 1, T, D), for all heads
        sin = sin[:, None]

        # Through the layers, each with its own part of the cache.
        caches = [None] * config.num_hidden_layers if cache is None else cache.layers(slots, S)
        for layer, layer_cache in zip(self.model.layers, caches, strict=True):
            x = layer(x, cos, sin, mask, causal, layer_cache)

        # Norm and head. A tied head is the embedding.
        x = self.model.norm(x[:, -1:] if last_only else x)
        head = self.model.embed_tokens if config.tie_word_embeddings else self.lm_head
        return F.linear(x, head.weight)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,    # unused, and accepted for HF: input_ids say the same
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | list[float] | None = None,
    ) -> Tensor:
        """Logits (B, T, vocab) of whole prompts, from a processor's dict: ours or Hugging Face's.

        Inputs are moved to the model's device. Raises ValueError if placeholders don't match pictures and
        videos.
        """
        if position_ids is None:
            position_ids, _ = self.positions(
                input_ids,
                attention_mask=attention_mask,
                image_grid_thw=image_grid_thw,
                video_grid_thw=video_grid_thw,
                second_per_grid_ts=second_per_grid_ts,
            )
        x = self.embed(input_ids, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)

        # Without pads no mask is needed.
        if attention_mask is not None:
            attention_mask = None if attention_mask.all() else attention_mask.to(x.device)
        return self.logits(x, position_ids.to(x.device), attention_mask)
