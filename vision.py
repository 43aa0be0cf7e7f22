"""Patches become tokens: the vision transformer, and the parts that both towers share.

Read from the top: RMSNorm, SwiGLU and attention serve the decoder too; then come patch embedding, windows,
block, merger, tower. Patches of pictures and videos of any size lie in one sequence, without a batch axis.
Most blocks attend inside windows, a few inside the whole frame, none across frames or items: but for the two
frames of a patch, time exists only in the decoder. A patch is 14 pixels a side, a merge group 28 (2 x 2
patches, one token for the decoder), a window 112.

Source: Qwen2.5-VL (arXiv 2502.13923) section 2.1.1. Next: model.py

Shapes: N patches, C width, H heads, D head dim, B batch or windows, T queries, S keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rope import rotate, vision_positions, vision_rotary

NORM_EPS = 1e-6     # of the tower; config.json has only the decoder's


@dataclass(frozen=True)
class VisionConfig:
    depth: int                              # blocks
    hidden_size: int
    intermediate_size: int                  # width of the MLPs
    num_heads: int
    out_hidden_size: int                    # the decoder's width
    in_chans: int
    patch_size: int                         # pixels
    temporal_patch_size: int                # frames
    spatial_merge_size: int                 # patches a side of a merge group
    window_size: int                        # pixels, not patches
    fullatt_block_indexes: tuple[int, ...]  # blocks that attend inside the whole frame
    tokens_per_second: int                  # the decoder's time positions per second of video


# ---------------------------------------------------------------------------- shared with the decoder

class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, and only then times the weight. HF: Qwen2_5_VLRMSNorm."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """HF: Qwen2_5_VLMLP, Qwen2MLP."""

    def __init__(self, dim: int, hidden: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# What a query may attend to. None: every key. CAUSAL: keys up to itself, where there are as many keys as
# queries; no mask tensor is made. A tensor: added to the scores, broadcasts to (B, 1, T, S).
CAUSAL = "causal"
Mask = Tensor | str | None
Attend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]


def repeat_heads(x: Tensor, H: int) -> Tensor:
    """(B, kv heads, S, D) -> (B, H, S, D), each for neighbouring query heads; a view where H is the same."""
    return x[:, :, None].expand(-1, -1, H // x.shape[1], -1, -1).flatten(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention by torch's fused kernels: no tensor of T x S unless the mask is one.

    q: (B, H, T, D); k and v: (B, kv heads, S, D), each shared by H / kv heads neighbours in q.
    Returns (B, H, T, D).
    """
    B, H, T, D = q.shape
    if T == 1 and mask is not CAUSAL:
        # One new token: the queries that share a key become the query axis, and no key is repeated.
        return F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, D), k, v, mask).reshape(B, H, T, D)
    k, v = repeat_heads(k, H), repeat_heads(v, H)   # enable_gqa would rule out the kernels that take a mask
    if mask is CAUSAL:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, mask)


def attention_weights(q: Tensor, k: Tensor, mask: Mask) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask), (B, H, T, S), with the softmax in float32. Arguments as for `sdpa`."""
    T, S = q.shape[2], k.shape[2]
    scores = q @ repeat_heads(k, q.shape[1]).transpose(2, 3) * q.shape[3] ** -0.5
    if mask is CAUSAL:
        scores = scores.masked_fill(torch.ones(T, S, device=q.device).triu(1).bool(), -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """`sdpa` written out, for reading, checking and drawing the weights. Takes T x S of memory per head."""
    return attention_weights(q, k, mask) @ repeat_heads(v, q.shape[1])


# ---------------------------------------------------------------------------- patches and windows

class PatchEmbed(nn.Module):
    """A convolution whose stride equals its kernel: a linear map of the flattened patch, computed as one."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_chans, config.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight.flatten(1))


class Layout(NamedTuple):
    """How attention cuts up a picture or video: in each of its frames lie the same runs of equal windows."""
    frames: int
    runs: list[tuple[int, int]]     # (number of windows, patches in each), in stored order

    @property
    def patches(self) -> int:
        return self.frames * sum(windows * patches for windows, patches in self.runs)


def window_order(grid_thw: Tensor, merge_size: int, window: int) -> tuple[Tensor, list[Layout]]:
    """The order of merge groups in which every window is contiguous, and how each item is cut in that order.

    A frame is cut into windows of `window` x `window` merge groups; those at its right and bottom edges are
    smaller, not padded. Whole windows come first, then the right edge, the bottom edge, the corner: equal
    ones are neighbours and can share an attention call. Frames and items stay where they were.

    grid_thw: (items, 3) in patches. Returns order (N / merge_size^2,), int64 on the CPU, to index groups by.
    HF: get_vision_window_index (the same windows, in raster order).
    """
    order, layouts, first = [], [], 0
    for t, h, w in grid_thw.tolist():
        h, w = h // merge_size, w // merge_size
        groups = torch.arange(first, first + t * h * w).view(t, h, w)
        bottom, right = h % window, w % window
        regions, runs = [], []
        for band in groups.split((h - bottom, bottom), dim=1):
            for region in band.split((w - right, right), dim=2):
                if region.numel() > 0:
                    wh, ww = min(window, region.shape[1]), min(window, region.shape[2])
                    windows = region.unflatten(2, (-1, ww)).unflatten(1, (-1, wh)).transpose(2, 3)
                    regions.append(windows.flatten(1))      # from (t, down, across, wh, ww)
                    runs.append((windows.shape[1] * windows.shape[2], wh * ww * merge_size**2))
        order.append(torch.cat(regions, dim=1).flatten())
        layouts.append(Layout(t, runs))
        first += t * h * w
    return torch.cat(order), layouts


def attend_windows(attend: Attend, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Attention inside every window of one item, a call per run. (N, H, D) each -> (N, H * D)."""
    N, H, D = q.shape
    frames, runs = layout
    sizes = [windows * patches for windows, patches in runs]
    q_runs, k_runs, v_runs = (x.view(frames, N // frames, H, D).split(sizes, dim=1) for x in (q, k, v))
    out = []
    for (windows, patches), *qkv in zip(runs, q_runs, k_runs, v_runs):
        batch = [x.reshape(frames * windows, patches, H, D).transpose(1, 2) for x in qkv]   # (B, H, T, D)
        out.append(attend(*batch, None).transpose(1, 2).reshape(frames, windows * patches, H * D))
    return torch.cat(out, dim=1).view(N, H * D)


# ---------------------------------------------------------------------------- the tower

class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig, attend: Attend):
        super().__init__()
        self.num_heads, self.attend = config.num_heads, attend
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layouts: list[Layout]) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (3, self.num_heads, -1))                             # (N, 3, H, D)
        q, k = rotate(qkv[:, :2].float(), cos, sin).to(x.dtype).unbind(1)                   # (N, H, D) each
        sizes = [layout.patches for layout in layouts]
        items = zip(q.split(sizes), k.split(sizes), qkv[:, 2].split(sizes), layouts)
        return self.proj(torch.cat([attend_windows(self.attend, *item) for item in items]))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig, attend: Attend):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, NORM_EPS)
        self.norm2 = RMSNorm(config.hidden_size, NORM_EPS)
        self.attn = VisionAttention(config, attend)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layouts: list[Layout]) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, layouts)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """The patches of a merge group, which are neighbours in x, become one token of the decoder's width."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.dim = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, NORM_EPS)       # each patch by itself, before they are joined
        self.mlp = nn.Sequential(nn.Linear(self.dim, self.dim), nn.GELU(),
                                 nn.Linear(self.dim, config.out_hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.dim))


class VisionTransformer(nn.Module):
    """HF: Qwen2_5_VisionTransformerPretrainedModel."""

    def __init__(self, config: VisionConfig, attend: Attend = sdpa):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config, attend) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Vision tokens (N / 4, out_hidden_size), merge groups in reading order: time, row, column.

        pixel_values: (N, 1176), rows in merge-group order. grid_thw: (items, 3) int64, best on the CPU:
        from a GPU it must be fetched, which waits.
        """
        config, weight, merge = self.config, self.patch_embed.proj.weight, self.config.spatial_merge_size
        order, windowed = window_order(grid_thw, merge, config.window_size // (config.patch_size * merge))
        full = [Layout(t, [(1, h * w)]) for t, h, w in grid_thw.tolist()]
        positions = vision_positions(grid_thw, merge)
        order, inverse, positions = (
            x.to(weight.device, non_blocking=True) for x in (order, order.argsort(), positions))

        # Into window order once, and out of it once at the end: full blocks don't mind.
        to_windows = lambda x: x.unflatten(0, (-1, merge**2))[order].flatten(0, 1)
        x = to_windows(self.patch_embed(pixel_values.to(weight.dtype)))                         # (N, C)
        cos, sin = vision_rotary(to_windows(positions), config.hidden_size // config.num_heads)
        cos, sin = cos[:, None, None], sin[:, None, None]                   # (N, 1, 1, D): q and k, all heads
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, full if i in config.fullatt_block_indexes else windowed)
        return self.merger(x)[inverse]
