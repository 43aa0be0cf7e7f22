"""Positions and rotary angles: where every token sits."""

import pytest
import torch
from conftest import IMAGE, VIDEO, assert_equal, noise, prompts, small_config
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf
from transformers.vision_utils import get_vision_position_ids

from rope import mrope_positions, mrope_rotary, rotate, vision_positions, vision_rotary

IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, merge_size=2, tokens_per_second=2)
GRIDS = torch.tensor([[1, 20, 24], [3, 6, 10], [1, 4, 4]])
PICTURE = GRIDS[2:]         # of four merge groups
SECTION = (4, 6, 6)


# ---------------------------------------------------------------------------- rotary

def test_rotary_pairs_halves():
    """Bug: channel i is paired with its neighbor and not with channel i + D/2."""
    positions = torch.arange(30).expand(3, 1, 30)
    cos, sin = mrope_rotary(positions, 32, 1e6, SECTION, torch.float32)
    q, k = noise(2, 1, 2, 30, 32)
    theirs = hf.apply_rotary_pos_emb(q, k, cos, sin)
    for x, rotated in zip((q, k), theirs, strict=True):
        ours = rotate(x, cos[:, None], sin[:, None])
        assert_equal("rotated queries and keys", ours, rotated)


def test_rows_come_before_columns_in_the_tower():
    """Bug: the first half of the channels rotates with the column."""
    rotary = hf.Qwen2_5_VLVisionRotaryEmbedding(Qwen2_5_VLConfig(**small_config()).vision_config)
    positions = vision_positions(GRIDS, 2)
    theirs = rotary(torch.zeros(1), positions)
    for a, b in zip(vision_rotary(positions, head_dim=40), theirs, strict=True):
        assert_equal("cos and sin, vision", a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sections_are_contiguous(dtype):
    """Bugs: the axes take turns, or the angles are cast too early.

    The axes differ by far, so that a pair rotated with the wrong one shows.
    """
    rotary = hf.Qwen2_5_VLRotaryEmbedding(Qwen2_5_VLConfig(**small_config()).text_config)
    times = torch.arange(0, 900, 13)
    rows = torch.arange(5000, 5070)
    columns = torch.arange(20000, 22100, 30)
    positions = torch.stack((times, rows, columns))[:, None].repeat(1, 2, 1)

    ours = mrope_rotary(positions, 32, 1e6, SECTION, dtype)
    theirs = rotary(torch.zeros(1, dtype=dtype), positions)
    for a, b in zip(ours, theirs, strict=True):
        assert_equal("cos and sin, decoder", a, b)


def test_a_fourth_axis_is_refused():
    """Bug: of Hugging Face's (4, B, T), whose first is the text's own, the first three are taken."""
    with pytest.raises(ValueError, match="zip"):
        mrope_rotary(torch.zeros(4, 1, 5), 32, 1e6, SECTION, torch.float32)


# ---------------------------------------------------------------------------- positions of patches

def test_patch_positions_follow_merge_groups():
    """Bug: patches are taken to lie in raster order."""
    rows, columns = vision_positions(PICTURE, merge_size=2).T
    raster = 4 * rows + columns
    assert raster.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert_equal("positions of patches", vision_positions(GRIDS, 2), get_vision_position_ids(GRIDS, 2))


# ---------------------------------------------------------------------------- positions of tokens

def test_text_resumes_after_the_largest_position(pairs):
    """Bug: text after a picture goes on by the number of its tokens. One picture, none, three; padded."""
    one = [5, (20, 24), 7]
    three = [3, (10, 26), (18, 8), 4, (4, 4)]
    inputs = prompts([one, [40], three])
    types = inputs["mm_token_type_ids"]
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_grid_thw")}
    ours, following = mrope_positions(**given, **IDS)
    theirs, deltas = pairs("sdpa").hf.model.get_rope_index(**given, mm_token_type_ids=types)

    real = inputs["attention_mask"].bool()
    assert_equal("positions of text and pictures", ours[:, real], theirs[:, real])
    assert torch.equal(following, deltas[:, 0] + real.sum(dim=1))


def test_answer_follows_the_prompt():
    """Bug: the first token of the answer goes one position too far."""
    ids = torch.tensor([[7, IMAGE, IMAGE, IMAGE, IMAGE, 8]])
    positions, following = mrope_positions(ids, **IDS, image_grid_thw=PICTURE)
    time, row, column = positions[:, 0].tolist()
    assert time == [0, 1, 1, 1, 1, 3]
    assert row == [0, 1, 1, 2, 2, 3]
    assert column == [0, 1, 2, 1, 2, 3]
    assert following.tolist() == [4]


@pytest.mark.parametrize("seconds, times, after", [
    (1.0, [4, 6, 8, 10, 12, 14], 15),
    (0.5, [4, 5, 6, 7, 8, 9], 10),          # 4.57.6: all 4, then 6
    (1.5, [4, 7, 10, 13, 16, 19], 20),      # 4.57.6: seconds truncated before the product
    (2.0, [4, 8, 12, 16, 20, 24], 25),
    (0.1, [4, 4, 4, 4, 4, 5], 6),           # rows reach 5: the largest position is not always a time
])
def test_video_times_go_by_the_seconds(seconds, times, after):
    """Bugs: seconds truncated, or text too early: transformers 5.23.0 lets it resume at 6 in all cases.

    The rule is that of the training code.
    """
    ids = torch.tensor([[1, 2, 3, 4, *[VIDEO] * 24, 5]])
    video = dict(video_grid_thw=torch.tensor([[6, 4, 4]]), second_per_grid_ts=[seconds])
    positions, following = mrope_positions(ids, **IDS, **video)
    time, row, column = positions[:, 0].tolist()

    # Four merge groups at each time, and then text.
    assert time == [0, 1, 2, 3, *sorted(4 * times), after]
    assert row == [0, 1, 2, 3, *[4, 4, 5, 5] * 6, after]
    assert column == [0, 1, 2, 3, *[4, 5, 4, 5] * 6, after]
    assert following.tolist() == [after + 1]


def by_the_rule(row):
    """[time, row, column] of every token of a row of `prompts`, counted one by one."""
    positions = []
    for item in row:
        start = 1 + max((max(position) for position in positions), default=-1)
        if isinstance(item, int):
            positions += [[start + i] * 3 for i in range(item)]
            continue

        # START, the merge groups, END.
        positions.append([start] * 3)
        start += 1
        t, h, w, seconds = item if len(item) == 4 else (1, *item, 0)
        groups = []
        for frame in range(t):
            for y in range(h // 2):
                for x in range(w // 2):
                    groups.append([start + int(frame * seconds * 2), start + y, start + x])
        positions += groups
        positions.append([1 + max(map(max, groups))] * 3)
    return positions


def test_videos_of_two_rates_equal_the_rule_written_out():
    """Bugs: the rate of the first video, or of another row's, for all; positions of pads that count."""
    rows = [
        [4, (3, 4, 6, 0.5), 2, (4, 4), (5, 4, 4, 1.5), 3],
        [2, (2, 8, 4, 2.0), 5],
    ]
    inputs = prompts(rows)
    assert inputs["second_per_grid_ts"].tolist() == [0.5, 1.5, 2.0]
    names = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    ours, following = mrope_positions(**{name: inputs[name] for name in names}, **IDS)

    for b, row in enumerate(rows):
        expected = by_the_rule(row)
        real = inputs["attention_mask"][b].bool()
        assert_equal("positions of videos, by the rule", ours[:, b, real].T.tolist(), expected)
        assert following[b] == 1 + max(map(max, expected))
        assert (ours[:, b, ~real] == 0).all()


def test_index_times_seconds_comes_first():
    """Bug: i * (seconds * speed), which truncates to another number than (i * seconds) * speed in float32."""
    ids = torch.full((1, 50), VIDEO)
    grid_thw = torch.tensor([[50, 2, 2]])
    fast = IDS | dict(tokens_per_second=25)
    positions, _ = mrope_positions(ids, **fast, video_grid_thw=grid_thw, second_per_grid_ts=[0.28])

    i = torch.arange(50).float()
    times = (i * 0.28 * 25).long()
    assert torch.equal(positions[0, 0], times)
    assert not torch.equal(times, (i * (0.28 * 25)).long())


class Elsewhere(torch.Tensor):
    """Says that it is on another device."""
    device = torch.device("meta")


def test_positions_are_where_the_ids_are():
    """Bug: they stay on the CPU, where they were counted."""
    ids = torch.tensor([[7, 8, 9]]).as_subclass(Elsewhere)
    positions, following = mrope_positions(ids, **IDS)
    assert positions.device == following.device == Elsewhere.device


@pytest.mark.parametrize("ids, grids, message", [
    ([1, 2], dict(image_grid_thw=PICTURE), "more pictures or videos than"),
    ([1, 2], dict(video_grid_thw=PICTURE, second_per_grid_ts=[1.0]), "more pictures or videos than"),
    ([1, IMAGE], {}, "more placeholders than"),
    ([IMAGE] * 3 + [1], dict(image_grid_thw=PICTURE), "4 merge groups needs as many"),
    ([1, 2], dict(second_per_grid_ts=[1.0]), "0 videos but 1 second_per_grid_ts: pass one"),
    ([VIDEO] * 4, dict(video_grid_thw=PICTURE), "1 videos but 0 second_per_grid_ts: pass one"),
])
def test_placeholders_must_match_grids_and_seconds(ids, grids, message):
    """Bug: positions are computed all the same."""
    with pytest.raises(ValueError, match=message):
        mrope_positions(torch.tensor([ids]), **IDS, **grids)
