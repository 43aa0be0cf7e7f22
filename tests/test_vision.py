"""The vision tower: windows, frames, items, and that it never waits for the device."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import Largest, assert_close, assert_equal, noise
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf
from transformers.vision_utils import get_vision_window_index

import vision
from rope import vision_positions, vision_rotary
from vision import Layout, RMSNorm, VisionTransformer, window_order

# Among their regions: whole windows, right edges, bottom edges, corners, each also alone.
GRIDS = [
    (1, 20, 26), (3, 10, 18), (2, 18, 6), (1, 8, 8), (1, 4, 30), (1, 6, 4), (1, 4, 40), (1, 16, 6),
]


def seeded(grids):
    """Random pixels and the grid tensor for a list of (t, h, w) in patches."""
    grid_thw = torch.tensor(grids)
    return noise(grid_thw.prod(dim=1).sum(), 1176, seed=1), grid_thw


# ---------------------------------------------------------------------------- windows, frames, items

def test_tower_equals_hugging_face(pair):
    """Bugs: windows left out or of another size, full blocks elsewhere, the order of windows not undone."""
    pixels, grid_thw = seeded(GRIDS)
    theirs = pair.hf.model.visual(pixels, grid_thw=grid_thw).pooler_output
    assert_close("vision tower", pair.ours.visual(pixels, grid_thw), theirs)


def members(order, sizes):
    """Windows as sets of merge groups."""
    return {frozenset(window.tolist()) for window in order.split(sizes)}


def test_windows_equal_hugging_face():
    """Bugs: windows padded at the edges, or equal windows of several frames or items sorted together."""
    grid_thw = torch.tensor(GRIDS)
    order, layouts = window_order(grid_thw, merge_size=2, window=4)
    sizes = [patches // 4 for layout in layouts for patches in layout.lengths]
    theirs, ends = get_vision_window_index(grid_thw, spatial_merge_size=2, window_size=112, patch_size=14)
    their_sizes = (ends.diff() // 4).tolist()
    assert_equal("members of windows", members(order, sizes), members(theirs, their_sizes))

    # Equal windows are neighbors, so four runs suffice.
    assert all(len(layout.runs) <= 4 for layout in layouts)

    # Every frame has stayed where it was.
    start = 0
    for t, h, w in GRIDS:
        groups = h * w // 4
        for _ in range(t):
            frame = order[start:start + groups]
            assert frame.sort().values.tolist() == list(range(start, start + groups))
            start += groups


def test_items_do_not_see_each_other(pair):
    """Bug: the full blocks attend over everything that lies in the sequence."""
    pixels, grid_thw = seeded([(1, 20, 26), (2, 18, 6)])
    both = pair.ours.visual(pixels, grid_thw)

    first = pair.ours.visual(pixels[:520], grid_thw[:1])
    second = pair.ours.visual(pixels[520:], grid_thw[1:])
    assert_close("itself: items together = alone", both[:130], first)
    assert_close("itself: items together = alone", both[130:], second)


def test_patches_must_be_as_many_as_the_grids_say(pairs):
    """Bug: the patches of another picture are cut as if they were this one's."""
    pixels, grid_thw = seeded([(1, 6, 4), (1, 4, 8)])
    for fewer in (pixels[:-4], pixels[:24]):
        with pytest.raises(AssertionError):
            pairs("sdpa").ours.visual(fewer, grid_thw)


def test_frames_do_not_see_each_other(pair):
    """Bug: the full blocks attend over a whole video."""
    pixels, grid_thw = seeded([(3, 10, 18)])
    frame_thw = torch.tensor([[1, 10, 18]])
    alone = [pair.ours.visual(frame, frame_thw) for frame in pixels.split(180)]
    assert_close("itself: frames together = alone", pair.ours.visual(pixels, grid_thw), torch.cat(alone))


def test_equal_windows_share_a_call(pairs, monkeypatch):
    """Bug: an attention call for every window or frame, where one per run would do."""
    tower = pairs("sdpa").ours.visual
    calls = [0] * len(tower.blocks)

    def counted(i):
        def attend(*args):
            calls[i] += 1
            return vision.sdpa(*args)
        return attend

    for i, block in enumerate(tower.blocks):
        monkeypatch.setattr(block.attn, "attend", counted(i))
    tower(*seeded([(5, 20, 26), (1, 50, 36)]))

    # Two items: at most four calls each in a windowed block, one each in a full one.
    assert calls == [8, 2, 8, 2]


# ---------------------------------------------------------------------------- arithmetic

def test_norm_casts_back_before_the_weight():
    """Bug: it casts back after the weight. In float32 the order does not show; in bfloat16 it does."""
    x = noise(64, 160).bfloat16()
    weight = noise(160, seed=1).bfloat16()
    ours = RMSNorm(160, eps=1e-2).bfloat16()
    theirs = hf.Qwen2_5_VLRMSNorm(160, eps=1e-2).bfloat16()
    ours.weight.data = weight
    theirs.weight.data = weight
    assert_equal("RMSNorm in bfloat16", ours(x), theirs(x))


def test_new_norm_leaves_a_scale_of_1():
    """Bug: weights that begin at zero, of which training would have to lift every one."""
    x = 7 * noise(64, 160)
    y = RMSNorm(160, eps=1e-6)(x)
    assert y.pow(2).mean(dim=1).tolist() == pytest.approx([1.0] * 64)


def test_norm_eps_equals_hugging_face(pair):
    """Bug: 1e-5, which does as well for pixels of usual size. These are so small that eps is as large as
    their squares.
    """
    pixels, grid_thw = seeded([(1, 6, 4)])
    pixels *= 1e-3
    theirs = pair.hf.model.visual(pixels, grid_thw=grid_thw).pooler_output
    assert_close("vision tower", pair.ours.visual(pixels, grid_thw), theirs)


@pytest.mark.parametrize("T", [40, 1])
def test_eager_in_bfloat16_equals_hugging_face(T):
    """Bugs: a softmax in bfloat16, scores scaled before the product, keys repeated in turn."""
    q = 3 * noise(2, 8, T, 32).bfloat16()
    k, v = noise(2, 2, 2, 40, 32, seed=1).bfloat16()
    later = torch.ones(T, 40).triu(40 - T + 1).bool()
    mask = torch.zeros(1, 1, T, 40).masked_fill(later, -torch.inf).bfloat16()

    layer = SimpleNamespace(num_key_value_groups=4, training=False)
    theirs, weights = hf.eager_attention_forward(layer, q, k, v, mask, scaling=32**-0.5)
    assert_equal("eager attention in bfloat16", vision.attention_weights(q, k, mask, False), weights)
    assert_equal("eager attention in bfloat16", vision.eager(q, k, v, mask, False), theirs.transpose(1, 2))
    if T == 40:
        assert_equal("eager attention in bfloat16", vision.attention_weights(q, k, None, True), weights)


def test_causal_attention_has_as_many_keys_as_queries():
    """Bug: with keys of a cache before them, queries see the first of them only."""
    q = noise(1, 4, 3, 8)
    k = noise(1, 4, 5, 8)
    with pytest.raises(AssertionError):
        vision.eager(q, k, k, None, True)


def test_angles_are_float32(pairs):
    """Bug: a bfloat16 block rotates its queries and keys in bfloat16."""
    attention = copy.deepcopy(pairs("sdpa").ours.visual.blocks[0].attn).bfloat16()
    rotated = []

    def attend(q, k, v, mask, causal):
        rotated.extend([q, k])
        return v

    # One large frame, so that there are large angles.
    attention.attend = attend
    grid_thw = torch.tensor([[1, 60, 62]])
    cos, sin = vision_rotary(vision_positions(grid_thw, 2), head_dim=40)
    x = noise(3720, 160).bfloat16()
    attention(x, cos[:, None, None], sin[:, None, None], [Layout(1, [(1, 3720)])])

    q, k, _ = attention.qkv(x).view(3720, 3, 4, 40).unbind(1)
    theirs = hf.apply_rotary_pos_emb_vision(q, k, cos, sin)
    for a, b in zip(rotated, theirs, strict=True):
        assert_equal("rotated queries and keys", a[0].transpose(0, 1), b)


# ---------------------------------------------------------------------------- speed and memory

def test_tower_never_waits(pairs):
    """Bug: something on the device is looked at: by .item(), .tolist(), a boolean index, `if tensor`.

    On the meta device all of these raise.
    """
    with torch.device("meta"):
        tower = VisionTransformer(pairs("sdpa").ours.config.vision)
    pixels, grid_thw = seeded(GRIDS)
    assert tower(pixels.to("meta"), grid_thw).shape == (len(pixels) // 4, 256)


def test_memory_is_linear_in_patches(pairs):
    """Bug: a full block makes a tensor of all pairs of patches."""
    config = pairs("sdpa").ours.config.vision
    ratios = {}
    for attend, sides in ((vision.sdpa, (16, 32, 64)), (vision.eager, (16, 32))):
        tower = VisionTransformer(config, attend)
        for side in sides:              # 256, 1,024 and 4,096 patches
            with torch.no_grad(), Largest(tower) as largest:
                tower(*seeded([(1, side, side)]))
            ratios[attend.__name__, side] = largest.elements / side**2

    assert ratios["sdpa", 16] == ratios["sdpa", 32] == ratios["sdpa", 64]
    assert ratios["eager", 32] > 3 * ratios["eager", 16]        # the measure does see what is quadratic
