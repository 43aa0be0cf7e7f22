"""The vision tower: windows, frames, items, and that it never waits for the device."""

import copy

import torch
from conftest import assert_close, assert_equal
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf
from transformers.vision_utils import get_vision_window_index

import vision
from rope import vision_positions, vision_rotary
from vision import RMSNorm, VisionTransformer, window_order

GRIDS = [       # among their regions: whole windows, right edges, bottom edges, corners, each also alone
    (1, 20, 26), (3, 10, 18), (2, 18, 6), (1, 8, 8), (1, 4, 30), (1, 6, 4), (1, 4, 40), (1, 16, 6)]


def seeded(grids):
    """Random pixels and the grid tensor for a list of (t, h, w) in patches."""
    grid_thw = torch.tensor(grids)
    return torch.randn(grid_thw.prod(1).sum(), 1176, generator=torch.Generator().manual_seed(1)), grid_thw


def test_windows_left_out_or_not_put_back(pair):
    pixels, grid_thw = seeded(GRIDS)
    theirs = pair.hf.model.visual(pixels, grid_thw=grid_thw).pooler_output
    assert_close("vision tower", pair.ours.visual(pixels, grid_thw), theirs)


def test_windows_of_another_size():
    """Hugging Face's windows, as sets of merge groups; equal ones neighbours; frames where they were."""
    grid_thw = torch.tensor(GRIDS)
    order, layouts = window_order(grid_thw, merge_size=2, window=4)
    sizes = [patches // 4 for frames, runs in layouts for _ in range(frames)
             for n, patches in runs for _ in range(n)]
    theirs, ends = get_vision_window_index(grid_thw, spatial_merge_size=2, window_size=112, patch_size=14)
    their_sizes = (ends.diff() // 4).tolist()
    members = lambda order, sizes: {frozenset(window.tolist()) for window in order.split(sizes)}
    assert_equal("members of windows", members(order, sizes), members(theirs, their_sizes))
    assert all(len(runs) <= 4 for _, runs in layouts)
    frames = [h * w // 4 for t, h, w in GRIDS for _ in range(t)]
    for frame, start in zip(order.split(frames), torch.tensor([0, *frames]).cumsum(0)):
        assert torch.equal(frame.sort().values, start + torch.arange(len(frame)))


def test_items_see_each_other(pair):
    pixels, grid_thw = seeded([(1, 20, 26), (2, 18, 6)])
    both, n = pair.ours.visual(pixels, grid_thw), 20 * 26
    assert_close("itself: items together = alone", both[:n // 4], pair.ours.visual(pixels[:n], grid_thw[:1]))
    assert_close("itself: items together = alone", both[n // 4:], pair.ours.visual(pixels[n:], grid_thw[1:]))


def test_frames_see_each_other(pair):
    pixels, grid_thw = seeded([(3, 10, 18)])
    alone = [pair.ours.visual(frame, torch.tensor([[1, 10, 18]])) for frame in pixels.split(180)]
    assert_close("itself: frames together = alone", pair.ours.visual(pixels, grid_thw), torch.cat(alone))


def test_windows_one_call_each(pairs, monkeypatch):
    """A windowed block makes at most four attention calls per item, whatever its size, a full one makes one.
    """
    tower, calls = pairs("sdpa").ours.visual, []
    for number, block in enumerate(tower.blocks):
        def counted(*args, number=number):
            calls[number] += 1
            return vision.sdpa(*args)
        monkeypatch.setattr(block.attn, "attend", counted)
        calls.append(0)
    tower(*seeded([(5, 20, 26), (1, 50, 36)]))
    assert calls == [8, 2, 8, 2]


def test_norm_casts_back_after_the_weight():
    """In float32 the order does not show; in bfloat16 it does."""
    x = torch.randn(64, 160, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.rand(160, generator=torch.Generator().manual_seed(1)).bfloat16() + 0.5
    ours, theirs = RMSNorm(160, eps=1e-2).bfloat16(), hf.Qwen2_5_VLRMSNorm(160, eps=1e-2).bfloat16()
    ours.weight.data = theirs.weight.data = weight
    assert_equal("RMSNorm in bfloat16", ours(x), theirs(x))


def test_wrong_eps(pair):
    """Values so small that eps is as large as their squares; for larger ones 1e-5 does as well as 1e-6."""
    pixels, grid_thw = seeded([(1, 6, 4)])
    theirs = pair.hf.model.visual(pixels * 1e-3, grid_thw=grid_thw).pooler_output
    assert_close("vision tower", pair.ours.visual(pixels * 1e-3, grid_thw), theirs)


def test_angles_in_bfloat16(pairs):
    """What a bfloat16 block attends with: queries and keys that were turned in float32."""
    block, got = copy.deepcopy(pairs("sdpa").ours.visual.blocks[0].attn).bfloat16(), []
    block.attend = lambda q, k, v, mask: got.append((q, k)) or v
    cos, sin = vision_rotary(vision_positions(torch.tensor([[1, 60, 62]]), 2), 40)
    x = torch.randn(60 * 62, 160, generator=torch.Generator().manual_seed(0)).bfloat16()
    block(x, cos[:, None, None], sin[:, None, None], [vision.Layout(1, [(1, 60 * 62)])])
    q, k, _ = block.qkv(x).view(-1, 3, 4, 40).unbind(1)
    for ours, theirs in zip(got[0], hf.apply_rotary_pos_emb_vision(q, k, cos, sin)):
        assert_equal("rotated queries and keys", ours[0].transpose(0, 1), theirs)


def test_tower_waits_for_the_device(pairs):
    """On the meta device every .item(), .tolist(), boolean index and `if tensor` raises."""
    with torch.device("meta"):
        tower = VisionTransformer(pairs("sdpa").ours.config.vision)
    pixels, grid_thw = seeded(GRIDS)
    assert tower(pixels.to("meta"), grid_thw).shape == (int(grid_thw.prod(1).sum()) // 4, 256)


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation makes, views of parameters aside."""

    def __init__(self, model):
        super().__init__()
        self.elements, self.parameters = 0, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.parameters:
                self.elements = max(self.elements, x.numel())
        return out


def test_memory_quadratic_in_patches(pairs):
    ratios = {}
    for attend in (vision.sdpa, vision.eager):
        tower = VisionTransformer(pairs("sdpa").ours.config.vision, attend)
        for side in (16, 32, 64):       # 256, 1,024 and 4,096 patches
            with torch.no_grad(), Largest(tower) as largest:
                tower(*seeded([(1, side, side)]))
            ratios[attend.__name__, side] = largest.elements / side**2
    assert ratios["sdpa", 16] == ratios["sdpa", 32] == ratios["sdpa", 64]
    assert ratios["eager", 64] > 3 * ratios["eager", 32]        # the measure does see what is quadratic
