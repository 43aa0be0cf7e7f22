"""Tokens become logits: the decoder, its cache, and the splicing in of vision tokens.

A forward pass, with the sizes of one 448 x 672 picture and the 7B:

    pixel_values (1536, 1176)  -- vision.VisionTransformer -->  vision tokens (384, 3584)
    input_ids (1, T)           -- embed -->                     x (1, T, 3584), vision tokens in their places
                               -- rope.mrope_positions -->      position_ids (3, 1, T)
    x, position_ids            -- decode, 28 layers -->         logits (1, T, 152064)

Read from the top: config, cache, attention, layer, model. After a picture two counters differ: how many
tokens the cache holds (KVCache.length), and the MRoPE position of the next one, which the caller keeps. No
module stores a position.

Sources: Qwen2.5 (arXiv 2412.15115) section 2, Qwen2.5-VL (2502.13923) section 2.1. Next: generate.py

Shapes: B batch, T new tokens, S slots attended to, C width, H heads, D head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rope import mrope_positions, mrope_rotary, rotate
from vision import CAUSAL, Attend, Mask, RMSNorm, SwiGLU, VisionConfig, VisionTransformer, sdpa


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
    mrope_section: tuple[int, ...]      # how many channel pairs turn with time, with the row, with the column
    max_position_embeddings: int
    tie_word_embeddings: bool           # the head is the embedding (3B)
    image_token_id: int
    video_token_id: int
    vision: VisionConfig

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


LayerCache = tuple[Tensor, Tensor, Tensor]  # slots to write (T,), keys and values to write into and attend to


class KVCache:
    """Keys and values of up to max_tokens tokens, allocated once: nothing moves while decoding."""

    def __init__(
        self, config: Config, batch_size: int, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ):
        layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
        shape = (layers, batch_size, kv_heads, max_tokens, config.head_dim)
        # Zeros, because slots that are masked out enter the product all the same, and 0 * NaN is NaN.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0                                                     # tokens stored, for the host
        self.end = torch.zeros(1, device=device, dtype=torch.int64)         # the same, for a CUDA graph

    def clear(self) -> None:
        self.length = 0
        self.end.zero_()

    def reserve(self, T: int) -> Tensor:
        """The slots (T,) of the next T tokens; HF: cache_position. ValueError where they don't fit."""
        max_tokens = self.k.shape[3]
        if self.length + T > max_tokens:
            raise ValueError(f"the cache is full: it holds {self.length} of at most {max_tokens} tokens and "
                             f"{T} more were given; make it with a larger max_tokens")
        slots = self.end + torch.arange(T, device=self.end.device)
        self.length += T
        self.end += T
        return slots

    def layers(self, slots: Tensor, S: int) -> list[LayerCache]:
        """For each layer: the slots to write, and its keys and values up to slot S."""
        return [(slots, k, v) for k, v in zip(self.k[:, :, :, :S], self.v[:, :, :, :S])]


class Attention(nn.Module):
    """Grouped queries: neighbouring query heads share one of num_key_value_heads keys and values."""

    def __init__(self, config: Config, attend: Attend):
        super().__init__()
        C, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        self.attend = attend
        self.q_proj = nn.Linear(C, C)
        self.k_proj = nn.Linear(C, kv)
        self.v_proj = nn.Linear(C, kv)
        self.o_proj = nn.Linear(C, C, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, layer_cache: LayerCache | None
    ) -> Tensor:
        B, T, C = x.shape
        H, kv_heads = self.heads
        qk = torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1).view(B, T, H + kv_heads, C // H)
        q, k = rotate(qk.transpose(1, 2), cos, sin).split(self.heads, dim=1)        # (B, heads, T, D)
        v = self.v_proj(x).view(B, T, kv_heads, C // H).transpose(1, 2)
        if layer_cache is not None:
            slots, keys, values = layer_cache
            k, v = keys.index_copy_(2, slots, k), values.index_copy_(2, slots, v)   # (B, kv heads, S, D)
        y = self.attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class DecoderLayer(nn.Module):
    def __init__(self, config: Config, attend: Attend):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, attend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, layer_cache: LayerCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, layer_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def causal_mask(slots: Tensor, S: int, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What to add to the scores of new tokens at slots (T,) against S: (B or 1, 1, T, S), 0 or -inf.

    By order in the sequence and never by position: inside a picture positions repeat and fall back. A pad
    sees itself, because the softmax of a row that sees nothing would be NaN.
    """
    keys, queries = torch.arange(S, device=slots.device), slots[:, None]
    visible = (keys <= queries)[None, None]
    if attention_mask is not None:
        visible = (visible & attention_mask[:, None, None, :].bool()) | (keys == queries)
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, -torch.inf)


class Qwen2_5_VL(nn.Module):
    """HF: Qwen2_5_VLForConditionalGeneration. Parameters are named as in the published files."""

    def __init__(self, config: Config, attend: Attend = sdpa):
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config.vision, attend)
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(DecoderLayer(config, attend) for _ in range(config.num_hidden_layers)),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        ))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def positions(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None, second_per_grid_ts: Tensor | list[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`rope.mrope_positions` with this model's token ids and sizes."""
        config = self.config
        return mrope_positions(
            input_ids, image_token_id=config.image_token_id, video_token_id=config.video_token_id,
            merge_size=config.vision.spatial_merge_size, tokens_per_second=config.vision.tokens_per_second,
            image_grid_thw=image_grid_thw, video_grid_thw=video_grid_thw,
            second_per_grid_ts=second_per_grid_ts, attention_mask=attention_mask,
        )

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
    ) -> Tensor:
        """Token embeddings (B, T, C), with vision tokens at the placeholders of pictures and videos.

        input_ids: (B, T) int64; pixels: (N, 1176) floats; grids: (items, 3) int64, best on the CPU.
        Raises ValueError where placeholders and vision tokens differ in number.
        """
        config = self.config
        x = self.model.embed_tokens(input_ids)
        for what, placeholder, pixels, grid_thw in (
            ("pictures", config.image_token_id, pixel_values, image_grid_thw),
            ("videos", config.video_token_id, pixel_values_videos, video_grid_thw),
        ):
            if pixels is not None:
                tokens = self.visual(pixels, grid_thw).to(x.dtype)
                here = input_ids == placeholder
                if here.sum() != len(tokens):
                    raise ValueError(
                        f"the prompt has {here.sum()} placeholders for {what}, which take {len(tokens)}")
                x = x.masked_scatter(here[:, :, None], tokens)
        return x

    def decode(
        self,
        x: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, vocab) of T new tokens, which follow those that the cache holds.

        x: (B, T, C); position_ids: (3, B, T). attention_mask: (B, S) over stored and new tokens, 1 real and
        0 pad; slots ahead may be in it and are not looked at. Logits at pads are finite and mean nothing.
        last_only: logits of the last token alone, (B, 1, vocab).
        Raises ValueError where the cache is too small.
        """
        config, T = self.config, x.shape[1]
        slots = torch.arange(T, device=x.device) if cache is None else cache.reserve(T)
        S = T if cache is None else cache.length
        if attention_mask is not None:
            S = attention_mask.shape[1]
            mask = causal_mask(slots, S, attention_mask, x.dtype)
        elif T == S:
            mask = CAUSAL
        else:       # a single new token sees all there is
            mask = None if T == 1 else causal_mask(slots, S, None, x.dtype)

        cos, sin = mrope_rotary(
            position_ids, config.head_dim, config.rope_theta, config.mrope_section, x.dtype)
        cos, sin = cos[:, None], sin[:, None]                                   # (B, 1, T, D), for all heads
        layer_caches = [None] * config.num_hidden_layers if cache is None else cache.layers(slots, S)
        for layer, layer_cache in zip(self.model.layers, layer_caches):
            x = layer(x, cos, sin, mask, layer_cache)
        x = self.model.norm(x[:, -1:] if last_only else x)
        head = self.model.embed_tokens if config.tie_word_embeddings else self.lm_head
        return F.linear(x, head.weight)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,    # unused: what HF reads from it, the ids say themselves
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | list[float] | None = None,
    ) -> Tensor:
        """Logits (B, T, vocab) of whole prompts, from a processor's dict: ours or Hugging Face's.

        Raises ValueError where placeholders don't match pictures and videos.
        """
        if position_ids is None:
            position_ids, _ = self.positions(
                input_ids, attention_mask, image_grid_thw, video_grid_thw, second_per_grid_ts)
        x = self.embed(input_ids, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        if attention_mask is not None and attention_mask.all():
            attention_mask = None       # nothing is padded: causal attention without a mask tensor
        return self.decode(x, position_ids.to(x.device), attention_mask)
