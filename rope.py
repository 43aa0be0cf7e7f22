"""Where every token sits: rotary positions, 2-D in the vision tower and 3-axis (MRoPE) in the decoder.

Read from the top: the rotation itself, then the two axes of a patch, then the three axes of a token. Both
rotaries are half-split: channel i turns together with channel i + D/2, not with its neighbour i + 1.

Sources: RoFormer (arXiv 2104.09864) section 3.2; MRoPE: Qwen2-VL (2409.12191) section 2.1; time in seconds:
Qwen2.5-VL (2502.13923) section 2.1.3. Next: vision.py

Shapes: B batch, T tokens, N patches, D head dim.
"""

from functools import lru_cache

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every channel pair (i, i + D/2) of x (..., D) by its angle; cos and sin broadcast to x.

    HF: apply_rotary_pos_emb.
    """
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


@lru_cache
def inv_freq(dim: int, theta: float, device: torch.device) -> Tensor:
    """Radians per position of the dim/2 channel pairs, theta^(-2i/dim), fastest first. (dim/2,) float32.

    Computed on the CPU, so that every device starts from the same bits.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    return (1.0 / theta**exponents).to(device)


def vision_positions(grid_thw: Tensor, merge_size: int) -> Tensor:
    """Row and column of every patch, in stored order.

    Patches are stored merge group by merge group, not in raster order: on a 4x4 grid with merge_size 2 the
    first four are (0, 0), (0, 1), (1, 0), (1, 1). All frames of a video repeat the same positions.

    grid_thw: (items, 3) int64, frames x rows x columns of patches. Returns (N, 2) int64 on the CPU.
    HF: get_vision_position_ids.
    """
    items = []
    for t, h, w in grid_thw.tolist():
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        frame = torch.stack((rows, columns), dim=-1)                                        # (h, w, 2)
        groups = frame.unflatten(1, (-1, merge_size)).unflatten(0, (-1, merge_size)).transpose(1, 2)
        items.append(groups.reshape(h * w, 2).repeat(t, 1))
    return torch.cat(items)


def vision_rotary(positions: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin, (N, D) float32, of positions (N, 2): D/4 pairs turn with the row, D/4 with the column.

    HF: Qwen2_5_VLVisionRotaryEmbedding.
    """
    angles = positions[:, :, None].float() * inv_freq(head_dim // 2, theta, positions.device)
    angles = angles.flatten(1).repeat(1, 2)                                                 # (N, D)
    return angles.cos(), angles.sin()


def vision_block(
    start: int, t: int, h: int, w: int, interval: float, tokens_per_second: int
) -> list[list[int]]:
    """[time, row, column] of t x h x w merge groups that begin at `start`, `interval` seconds apart in t."""
    times = (torch.arange(t) * interval * tokens_per_second).long()   # float32, in this order, then truncated
    axes = torch.meshgrid(times, torch.arange(h), torch.arange(w), indexing="ij")
    return (start + torch.stack(axes, dim=-1)).reshape(-1, 3).tolist()


def mrope_positions(
    input_ids: Tensor,
    *,
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
    tokens_per_second: int,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Tensor | list[float] | None = None,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Time, row and column of every token, by the rule of Qwen's training code.

    Text counts up on all three axes at once. A picture or video that begins at s puts each of its merge
    groups at s + (time, row, column), and what follows resumes at 1 + the largest position used: a picture of
    4 x 6 groups fills 24 tokens but only 6 positions.

    input_ids and attention_mask (1 real, 0 pad): (B, T). Grids: (items, 3) in patches, in order of
    appearance. second_per_grid_ts: seconds from one temporal patch to the next, one per video.
    Returns position_ids (3, B, T), 0 at pads, and next_position (B,), where the first new token goes; int64.
    Raises ValueError where placeholders, grids and seconds don't match.
    HF: Qwen2_5_VLModel.get_rope_index.
    """
    images = [] if image_grid_thw is None else image_grid_thw.tolist()
    videos = [] if video_grid_thw is None else video_grid_thw.tolist()
    intervals = [] if second_per_grid_ts is None else torch.as_tensor(second_per_grid_ts).tolist()
    if len(videos) != len(intervals):
        raise ValueError(f"{len(videos)} videos but {len(intervals)} second_per_grid_ts: pass one for each")
    waiting = {     # by placeholder, the items still to come; a picture has no time
        image_token_id: [(t, h // merge_size, w // merge_size, 0.0) for t, h, w in images],
        video_token_id: [(t, h // merge_size, w // merge_size, s) for (t, h, w), s in zip(videos, intervals)],
    }

    real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
    position_ids = torch.zeros(3, *input_ids.shape, dtype=torch.int64)
    next_position = []
    for b in range(len(input_ids)):
        ids, positions, start = input_ids[b, real[b]].tolist(), [], 0
        while len(positions) < len(ids):
            token = ids[len(positions)]
            if token not in waiting:
                positions.append([start] * 3)
                start += 1
                continue
            if not waiting[token]:
                raise ValueError("the prompt has more placeholders than there are pictures or videos")
            block = vision_block(start, *waiting[token].pop(0), tokens_per_second)
            if ids[len(positions):len(positions) + len(block)] != [token] * len(block):
                raise ValueError(f"an item of {len(block)} merge groups takes as many placeholders")
            positions += block
            start = 1 + max(map(max, block))
        position_ids[:, b, real[b].cpu()] = torch.tensor(positions, dtype=torch.int64).reshape(-1, 3).T
        next_position.append(start)
    if any(waiting.values()):
        raise ValueError("there are more pictures or videos than the prompt has placeholders for")
    return position_ids.to(input_ids.device), torch.tensor(next_position, device=input_ids.device)


def mrope_rotary(
    position_ids: Tensor, head_dim: int, theta: float, section: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, (B, T, D) in dtype, of position_ids (3, B, T); the angles are float32.

    Of the D/2 channel pairs, fastest first, section[0] turn with time, the next section[1] with the row, the
    last section[2] with the column: contiguous, not interleaved. HF: Qwen2_5_VLRotaryEmbedding.
    """
    parts = inv_freq(head_dim, theta, position_ids.device).split(section)
    angles = torch.cat([axis[..., None].float() * part for axis, part in zip(position_ids, parts)], dim=-1)
    angles = angles.repeat(1, 1, 2)                                                         # (B, T, D)
    return angles.cos().to(dtype), angles.sin().to(dtype)
