"""Positions and rotary angles: where every token sits."""

import pytest
import torch
from conftest import IMAGE, VIDEO, assert_equal, prompts, small_config
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf
from transformers.vision_utils import get_vision_position_ids

from rope import mrope_positions, mrope_rotary, rotate, vision_positions, vision_rotary

IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, merge_size=2, tokens_per_second=2)
GRIDS = torch.tensor([[1, 20, 24], [3, 6, 10], [1, 4, 4]])


def test_patches_in_raster_order():
    frame = vision_positions(torch.tensor([[1, 4, 4]]), merge_size=2)
    assert (frame[:, 0] * 4 + frame[:, 1]).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert_equal("positions of patches", vision_positions(GRIDS, 2), get_vision_position_ids(GRIDS, 2))


def test_rows_and_columns_swapped_in_the_tower():
    rotary = hf.Qwen2_5_VLVisionRotaryEmbedding(Qwen2_5_VLConfig(**small_config()).vision_config)
    positions = vision_positions(GRIDS, 2)
    for ours, theirs in zip(vision_rotary(positions, head_dim=40), rotary(torch.zeros(1), positions)):
        assert_equal("cos and sin, vision", ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sections_interleaved(dtype):
    """The axes differ by far, so that a pair turned by the wrong one shows; also angles cast too early."""
    rotary = hf.Qwen2_5_VLRotaryEmbedding(Qwen2_5_VLConfig(**small_config()).text_config)
    axes = (torch.arange(0, 900, 13), torch.arange(5000, 5070), torch.arange(20000, 22100, 30))
    positions = torch.stack(axes).unsqueeze(1).repeat(1, 2, 1)
    theirs = rotary(torch.zeros(1, dtype=dtype), positions)
    for a, b in zip(mrope_rotary(positions, 32, 1e6, (4, 6, 6), dtype), theirs):
        assert_equal("cos and sin, decoder", a, b)


def test_rotary_of_neighbours_instead_of_halves():
    cos, sin = mrope_rotary(torch.arange(30).expand(3, 1, 30), 32, 1e6, (4, 6, 6), torch.float32)
    q, k = torch.randn(2, 1, 2, 30, 32, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip((rotate(q, cos[:, None], sin[:, None]), rotate(k, cos[:, None], sin[:, None])),
                            hf.apply_rotary_pos_emb(q, k, cos, sin)):
        assert_equal("rotated queries and keys", ours, theirs)


def test_text_after_a_picture_counts_its_tokens(pairs):
    """Of one picture, of none, of three; in a padded batch."""
    inputs = prompts([[5, (20, 24), 7], [40], [3, (10, 26), (18, 8), 4, (4, 4)]])
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_grid_thw")}
    ours, following = mrope_positions(**given, **IDS)
    theirs, deltas = pairs("sdpa").hf.model.get_rope_index(
        **given, mm_token_type_ids=inputs["mm_token_type_ids"])
    real = inputs["attention_mask"].bool()
    assert_equal("positions of text and pictures", ours[:, real], theirs[:, real])
    assert torch.equal(following, deltas[:, 0] + real.sum(1))


def test_first_answer_token_one_position_too_far():
    ids = torch.tensor([[7, IMAGE, IMAGE, IMAGE, IMAGE, 8]])
    positions, following = mrope_positions(ids, **IDS, image_grid_thw=torch.tensor([[1, 4, 4]]))
    assert positions[:, 0].tolist() == [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]
    assert following.tolist() == [4]


@pytest.mark.parametrize("seconds, times, after", [
    (1.0, [4, 6, 8, 10, 12, 14], 15),
    (0.5, [4, 5, 6, 7, 8, 9], 10),          # 4.57.6: all 4, then 6
    (1.5, [4, 7, 10, 13, 16, 19], 20),      # 4.57.6: seconds truncated before the product
    (2.0, [4, 8, 12, 16, 20, 24], 25),
    (0.1, [4, 4, 4, 4, 4, 5], 6),           # rows reach 5: the largest position is not always a time
])
def test_seconds_truncated_or_text_too_early(seconds, times, after):
    """The rule of the training code. transformers 5.23.0 lets text resume at 6 whatever the times are."""
    ids = torch.tensor([[1, 2, 3, 4] + [VIDEO] * 24 + [5]])
    positions, following = mrope_positions(
        ids, **IDS, video_grid_thw=torch.tensor([[6, 4, 4]]), second_per_grid_ts=torch.tensor([seconds]))
    assert positions[0, 0, 4:-1].tolist() == [time for time in times for _ in range(4)]
    assert positions[1:, 0, 4:8].tolist() == [[4, 4, 5, 5], [4, 5, 4, 5]]
    assert positions[:, 0, -1].tolist() == [after] * 3 and following.tolist() == [after + 1]


def test_seconds_times_speed_before_index():
    """(i * seconds) * speed in float32, in this order: i * (seconds * speed) truncates to another number."""
    ids = torch.full((1, 50), VIDEO)
    positions, _ = mrope_positions(
        ids, **IDS | dict(tokens_per_second=25), video_grid_thw=torch.tensor([[50, 2, 2]]),
        second_per_grid_ts=[0.28])
    expected = [int(torch.tensor(i * 1.0) * 0.28 * 25) for i in range(50)]
    other = [int(torch.tensor(i * 1.0) * (0.28 * 25)) for i in range(50)]
    assert positions[0, 0].tolist() == expected != other


@pytest.mark.parametrize("ids, grids, message", [
    ([1, 2], dict(image_grid_thw=torch.tensor([[1, 4, 4]])), "more pictures or videos than"),
    ([1, IMAGE], {}, "more placeholders than"),
    ([IMAGE] * 3 + [1], dict(image_grid_thw=torch.tensor([[1, 4, 4]])), "4 merge groups takes as many"),
    ([VIDEO] * 4, dict(video_grid_thw=torch.tensor([[1, 4, 4]])), "0 second_per_grid_ts: pass one"),
])
def test_wrong_placeholders_computed_instead_of_refused(ids, grids, message):
    with pytest.raises(ValueError, match=message):
        mrope_positions(torch.tensor([ids]), **IDS, **grids)
