"""Where every token sits: rotary position embeddings (RoPE), with two axes in the vision tower and three in
the decoder (MRoPE, the multimodal form).

A rotary embedding adds nothing to its input. It takes the channels of a query or key in pairs, as points in
a plane, and rotates each by position times frequency. The dot product of two rotated vectors then depends on
their positions only through the difference.

Read from the top: the rotation itself, then the two axes of a patch, then the three axes of a token. Both
rotary embeddings are half-split: channel i is paired with channel i + D/2, not with its neighbor i + 1.

Sources: RoFormer (arXiv 2104.09864) section 3.2; MRoPE: Qwen2-VL (2409.12191) section 2.1; time in seconds:
Qwen2.5-VL (2502.13923) section 2.1.3. Next: vision.py

Shapes: B batch, T tokens, N patches, D head dim.
"""

from functools import lru_cache

import torch
from torch import Tensor

Item = tuple[int, int, int, float]      # temporal patches, rows, columns; seconds per temporal patch


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every channel pair (i, i + D/2) of x (..., D) by its angle; cos and sin broadcast to x.

    HF: apply_rotary_pos_emb.
    """
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


@lru_cache
def inv_freq(dim: int, theta: float, device: torch.device) -> Tensor:
    """Radians per position, for dim/2 channel pairs: theta^(-2i/dim), fastest first. (dim/2,) float32.

    Computed on the CPU, so that every device starts from the same bits.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    return (1.0 / theta**exponents).to(device)


# ---------------------------------------------------------------------------- two axes, for patches

def vision_positions(grid_thw: Tensor, merge_size: int) -> Tensor:
    """Row and column of every patch, in stored order.

    Patches are stored merge group by merge group, not in raster order: on a 4x4 grid with merge_size 2 the
    first four are (0, 0), (0, 1), (1, 0), (1, 1). Every temporal patch of a video repeats these positions.

    grid_thw: (items, 3) int64: temporal patches, rows, columns. Returns (N, 2) int64 on the CPU.
    HF: get_vision_position_ids.
    """
    items = []
    for t, h, w in grid_thw.tolist():
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        raster = torch.stack((rows, columns), dim=-1)                           # (h, w, 2)

        # From raster order to merge groups: group row, group column, row, column, 2.
        groups = raster.unflatten(1, (-1, merge_size)).unflatten(0, (-1, merge_size))
        groups = groups.transpose(1, 2)
        items.append(groups.reshape(h * w, 2).repeat(t, 1))
    return torch.cat(items)


def vision_rotary(positions: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin, (N, D) float32, of positions (N, 2): D/4 pairs rotate with the row, D/4 with the column.

    HF: Qwen2_5_VLVisionRotaryEmbedding.
    """
    frequencies = inv_freq(head_dim // 2, theta, positions.device)              # (D/4,), for either axis
    angles = positions[:, :, None].float() * frequencies                        # (N, 2, D/4)
    angles = angles.flatten(1).repeat(1, 2)                                     # (N, D)
    return angles.cos(), angles.sin()


# ---------------------------------------------------------------------------- three axes, for tokens

def item_positions(start: int, item: Item, merge_size: int, tokens_per_second: int) -> list[list[int]]:
    """[time, row, column] of the merge groups of a picture or video that begins at `start`."""
    t, h, w, interval = item
    rows = torch.arange(h // merge_size)        # of merge groups
    columns = torch.arange(w // merge_size)

    # trunc(index x seconds x rate), in float32. HF 4.57 truncates the seconds before it multiplies.
    times = (torch.arange(t) * interval * tokens_per_second).long()
    axes = torch.meshgrid(times, rows, columns, indexing="ij")
    groups = torch.stack(axes, dim=-1).view(-1, 3)              # in reading order
    return (start + groups).tolist()


def prompt_positions(
    ids: list[int], waiting: dict[int, list[Item]], merge_size: int, tokens_per_second: int
) -> tuple[list[list[int]], int]:
    """[time, row, column] of each of a prompt's tokens, and the position that comes after all of them.

    waiting: by placeholder id, the items that are still to come. This prompt's are popped, so that the next
    prompt of the batch begins with its own.
    """
    positions = []
    start = 0
    while len(positions) < len(ids):
        i = len(positions)
        token = ids[i]
        if token in waiting:
            if not waiting[token]:
                raise ValueError("the prompt has more placeholders than there are pictures or videos")
            block = item_positions(start, waiting[token].pop(0), merge_size, tokens_per_second)
            if ids[i:i + len(block)] != [token] * len(block):
                raise ValueError(f"an item of {len(block)} merge groups needs as many placeholders, "
                                 "none of them masked")
        else:
            block = [[start] * 3]       # text: all three axes move together

        positions += block
        start = 1 + max(map(max, block))
    return positions, start


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
    groups at s + (time, row, column), and what follows resumes at 1 + the largest position used. Two words, a
    picture of 2 x 3 merge groups, two words:

                 a  b  |     picture      |  c  d
        time     0  1  |  2  2  2  2  2  2  |  5  6
        row      0  1  |  2  2  2  3  3  3  |  5  6
        column   0  1  |  2  3  4  2  3  4  |  5  6

    The picture's six tokens use up three positions. In a video, time follows the clock: temporal patch i is
    at s + trunc(i x seconds per temporal patch x tokens_per_second).

    input_ids and attention_mask (1 real, 0 pad; not a way to hide a token): (B, T). Grids: (items, 3) in
    patches, in the order of the whole batch. second_per_grid_ts: seconds from one temporal patch to the next,
    one per video. Returns position_ids (3, B, T), 0 at pads, and next_position (B,), where the first new
    token goes; int64. Raises ValueError if placeholders, grids and seconds don't match.
    HF: Qwen2_5_VLModel.get_rope_index.
    """
    images = [] if image_grid_thw is None else image_grid_thw.tolist()
    videos = [] if video_grid_thw is None else video_grid_thw.tolist()
    seconds = [] if second_per_grid_ts is None else torch.as_tensor(second_per_grid_ts).tolist()
    if len(videos) != len(seconds):
        raise ValueError(f"{len(videos)} videos but {len(seconds)} second_per_grid_ts: pass one for each")

    # By placeholder, in the order of the whole batch. A picture has no time.
    waiting = {
        image_token_id: [(*grid, 0.0) for grid in images],
        video_token_id: [(*grid, interval) for grid, interval in zip(videos, seconds)],
    }

    # Prompt by prompt, pads left out.
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    position_ids = torch.zeros(3, *input_ids.shape, dtype=torch.int64)
    next_position = []
    for b, real in enumerate(attention_mask.bool().cpu()):
        ids = input_ids[b].cpu()[real].tolist()
        positions, following = prompt_positions(ids, waiting, merge_size, tokens_per_second)
        position_ids[:, b, real] = torch.tensor(positions, dtype=torch.int64).view(-1, 3).T
        next_position.append(following)

    if any(waiting.values()):
        raise ValueError("there are more pictures or videos than the prompt has placeholders for; "
                         "attention_mask marks pads and cannot hide a picture: leave it out of the prompt")
    return position_ids.to(input_ids.device), torch.tensor(next_position, device=input_ids.device)


def mrope_rotary(
    position_ids: Tensor, head_dim: int, theta: float, section: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, (B, T, D) in dtype, of position_ids (3, B, T); the angles are float32.

    Of the D/2 channel pairs, fastest first, section[0] rotate with time, the next section[1] with the row,
    the last section[2] with the column: contiguous, not interleaved. HF: Qwen2_5_VLRotaryEmbedding.
    """
    frequencies = inv_freq(head_dim, theta, position_ids.device).split(section)

    # Each axis with its own share of the frequencies. strict: HF also makes (4, B, T) tensors, which begin
    # with an axis of plain text positions, and would be misread.
    angles = []
    for axis, part in zip(position_ids, frequencies, strict=True):
        angles.append(axis[:, :, None].float() * part)
    angles = torch.cat(angles, dim=-1).repeat(1, 1, 2)                          # (B, T, D)
    return angles.cos().to(dtype), angles.sin().to(dtype)
