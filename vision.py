"""Patches become tokens: the vision transformer (the tower), and the parts that it shares with the decoder.

Read from the top: RMSNorm, SwiGLU and attention serve the decoder too; then come patch embedding, windows,
block, merger, tower. Patches of pictures and videos of any size lie in one sequence, without a batch axis.
A patch is 14 pixels a side, a merge group 28 (2 x 2 patches, one token for the decoder), a window 112.

Two frames of a video share their patches; once embedded, such a pair is called one frame. Most blocks attend
inside windows, a few inside the whole frame, none across frames or items: only the decoder knows about time.

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
    temporal_patch_size: int                # frames of a video in one patch
    spatial_merge_size: int                 # patches per side of a merge group
    window_size: int                        # pixels, not patches
    fullatt_block_indexes: tuple[int, ...]  # blocks that attend inside the whole frame
    tokens_per_second: int                  # the decoder's time positions per second of video

    def __post_init__(self):
        group = self.patch_size * self.spatial_merge_size
        if self.num_heads < 1 or self.hidden_size % (4 * self.num_heads):   # channel pairs for two axes
            raise ValueError(f"vision hidden_size {self.hidden_size} must be a multiple of "
                             f"4 x num_heads {self.num_heads}")
        if group < 1 or self.window_size < 1 or self.window_size % group:
            raise ValueError(f"window_size {self.window_size} must be a multiple of "
                             f"patch_size x spatial_merge_size, {group}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def window(self) -> int:
        """Merge groups per side of a window."""
        return self.window_size // (self.patch_size * self.spatial_merge_size)


# ---------------------------------------------------------------------------- shared with the decoder

class RMSNorm(nn.Module):
    """x / rms(x), cast back to x's dtype, and only then multiplied by the weight.

    F.rms_norm computes in float32 by itself. HF: Qwen2_5_VLRMSNorm.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, self.weight.shape, None, self.eps)


class SwiGLU(nn.Module):
    """HF: Qwen2_5_VLMLP, Qwen2MLP."""

    def __init__(self, dim: int, hidden: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# Attention is a function: attend(q, k, v, mask, causal).
#
# q (B, H, T, D); k and v (B, kv heads, S, D); a key head serves H / (kv heads) neighboring query heads.
# Returns (B, H, T, D). mask: None, or what to add to the scores, (B or 1, 1, T, S). causal: a query sees the
# keys up to itself, without a mask tensor; there must be as many keys as queries.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]


def repeat_heads(x: Tensor, H: int) -> Tensor:
    """(B, kv heads, S, D) -> (B, H, S, D), each repeated for its query heads; no copy if kv heads == H."""
    return x[:, :, None].expand(-1, -1, H // x.shape[1], -1, -1).flatten(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention by torch's fused kernels, which hold no T x S tensor of weights (save for a case on CUDA)."""
    B, H, T, D = q.shape
    kv_heads = k.shape[1]
    assert k.shape == v.shape and H % kv_heads == 0, (q.shape, k.shape, v.shape)

    if T == 1:
        # One new token: the query heads that share a key head go on the T axis, so no key is repeated.
        # (B, H, 1, D) -> (B, kv heads, H / (kv heads), D)
        q = q.reshape(B, kv_heads, -1, D)
    else:
        # Repeated, because enable_gqa would rule out the kernels that take a mask.
        k = repeat_heads(k, H)
        v = repeat_heads(v, H)

    # With a mask, CUDA's fused kernels would run one thread block per key head, and leave most of the card
    # idle. The two plain products of `eager` use all of it.
    if T == 1 and q.is_cuda and mask is not None:
        y = eager(q, k, v, mask, causal)
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    return y.reshape(B, H, T, D)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask), (B, H, T, S). torch's softmax is in float32 inside."""
    B, H, T, D = q.shape
    S = k.shape[2]
    assert T == S or not causal, (q.shape, k.shape)

    scores = q @ repeat_heads(k, H).transpose(2, 3) * D**-0.5
    if causal:
        later = torch.ones(T, S, device=q.device).triu(1)
        scores = scores.masked_fill(later.bool(), -torch.inf)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """`sdpa` written out, for reading, checking and drawing the weights. Takes T x S of memory per head."""
    return attention_weights(q, k, mask, causal) @ repeat_heads(v, q.shape[1])


# ---------------------------------------------------------------------------- patches and windows

class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel is a linear map of flattened patches, and is computed as one.

    Its weights are in the order of a row of pixel_values: channel, frame of the pair, y, x.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_chans, config.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight.flatten(1))


class Layout(NamedTuple):
    """How attention cuts up a picture or video: every frame into the same runs, each of equal windows.

    A picture 420 pixels wide and 280 high is 1 frame, with runs [(6, 64), (2, 48), (3, 32), (1, 24)].
    """
    frames: int
    runs: list[tuple[int, int]]     # (number of windows, patches in each), in window order

    @property
    def lengths(self) -> list[int]:
        """The patches in each window of all frames, in window order."""
        return self.frames * [patches for windows, patches in self.runs for _ in range(windows)]


def window_order(grid_thw: Tensor, merge_size: int, window: int) -> tuple[Tensor, list[Layout]]:
    """The order of merge groups in which every window is contiguous, and how each item is cut in that order.

    A frame is cut into windows of `window` x `window` merge groups; those at its right and bottom edges are
    smaller, not padded. Equal windows become neighbors, so that they can share one attention call without a
    mask. (Hugging Face keeps them in raster order and needs a kernel for unequal sequences.) Frames and
    items stay where they were.

    grid_thw: (items, 3): temporal patches, rows, columns. Returns order (N / merge_size^2,), int64 on the
    CPU, for indexing groups.
    HF: get_vision_window_index.
    """
    order = []
    layouts = []
    start = 0
    for t, h, w in grid_thw.tolist():
        rows = h // merge_size          # of groups
        columns = w // merge_size
        groups = torch.arange(start, start + t * rows * columns).view(t, rows, columns)
        start += t * rows * columns

        # Four regions, each of equal windows: whole ones, the right edge, the bottom edge, the corner.
        regions = []
        runs = []
        for band in groups.split((rows - rows % window, rows % window), dim=1):
            for region in band.split((columns - columns % window, columns % window), dim=2):
                if region.numel() == 0:
                    continue
                height = min(window, region.shape[1])
                width = min(window, region.shape[2])
                windows = region.unflatten(2, (-1, width)).unflatten(1, (-1, height))
                windows = windows.transpose(2, 3)       # t, down, across, height, width
                regions.append(windows.flatten(1))
                runs.append((windows.shape[1] * windows.shape[2], height * width * merge_size**2))

        order.append(torch.cat(regions, dim=1).flatten())
        layouts.append(Layout(t, runs))
    return torch.cat(order), layouts


def reorder(x: Tensor, order: Tensor, group: int) -> Tensor:
    """The rows of x (N, ...), which come in groups of `group` neighbors, with the groups in another order."""
    return x.unflatten(0, (-1, group))[order].flatten(0, 1)


def attend_windows(attend: Attend, qkv: Tensor, layout: Layout) -> Tensor:
    """Attention inside every window of one item, a call per run. (N, 3, H, D) -> (N, H * D)."""
    N, _, H, D = qkv.shape
    lengths = [windows * patches for windows, patches in layout.runs]
    pieces = qkv.view(layout.frames, -1, 3, H, D).split(lengths, dim=1)

    out = []
    for (windows, patches), piece in zip(layout.runs, pieces, strict=True):
        # The windows of all frames become the batch axis.
        piece = piece.reshape(layout.frames * windows, patches, 3, H, D)
        q, k, v = piece.permute(2, 0, 3, 1, 4)                                  # (B, H, T, D) each
        y = attend(q, k, v, None, False)
        out.append(y.transpose(1, 2).reshape(layout.frames, windows * patches, H * D))
    return torch.cat(out, dim=1).view(N, H * D)


# ---------------------------------------------------------------------------- the tower

class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig, attend: Attend):
        super().__init__()
        self.num_heads = config.num_heads
        self.attend = attend
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layouts: list[Layout]) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (3, self.num_heads, -1))                 # (N, 3, H, D)

        # Queries and keys are rotated in float32, whatever the dtype. cos and sin: (N, 1, 1, D).
        qk = rotate(qkv[:, :2].float(), cos, sin).to(x.dtype)
        qkv = torch.cat((qk, qkv[:, 2:]), dim=1)

        # No item sees another. A layout's lengths add up to the patches of its item.
        items = qkv.split([sum(layout.lengths) for layout in layouts])
        y = [attend_windows(self.attend, item, layout) for item, layout in zip(items, layouts, strict=True)]
        return self.proj(torch.cat(y))


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
    """The patches of a merge group, which are neighbors in x, become one token of the decoder's width."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.dim = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, NORM_EPS)       # of each patch, before four are joined
        self.mlp = nn.Sequential(
            nn.Linear(self.dim, self.dim),
            nn.GELU(),
            nn.Linear(self.dim, config.out_hidden_size),
        )

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

        pixel_values: (N, 1176), rows in merge-group order. grid_thw: (items, 3) int64; keep it on the CPU: on
        a GPU, reading it back would stall.
        """
        config = self.config
        merge = config.spatial_merge_size
        weight = self.patch_embed.proj.weight
        assert len(pixel_values) == grid_thw.prod(dim=1).sum(), (pixel_values.shape, grid_thw)

        # How attention cuts the patches: in windows for most blocks, in whole frames for a few.
        order, windowed = window_order(grid_thw, merge, config.window)
        full = [Layout(t, [(1, h * w)]) for t, h, w in grid_thw.tolist()]

        # Positions travel along with their patches.
        positions = reorder(vision_positions(grid_thw, merge), order, merge**2)
        cos, sin = vision_rotary(positions.to(weight.device, non_blocking=True), config.head_dim)
        cos = cos[:, None, None]                                # (N, 1, 1, D): for q and k, and all heads
        sin = sin[:, None, None]
        inverse = order.argsort().to(weight.device, non_blocking=True)
        order = order.to(weight.device, non_blocking=True)

        # Into window order once, and out of it once, at the end: full attention does not care about order.
        x = self.patch_embed(pixel_values.to(weight.dtype))     # (N, C)
        x = reorder(x, order, merge**2)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, full if i in config.fullatt_block_indexes else windowed)
        return self.merger(x)[inverse]
