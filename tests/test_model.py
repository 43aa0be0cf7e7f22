"""The decoder and the whole model: parity, the cache, batches, and random mixes of everything."""

import copy
import random
from collections import defaultdict
from dataclasses import replace
from inspect import signature

import pytest
import torch
from conftest import (
    FAMILY,
    MIXED_ROWS,
    ROWS,
    VIDEO,
    VIDEO_ROWS,
    Largest,
    assert_close,
    assert_equal,
    make_pair,
    noise,
    pair_of,
    prompts,
    shallow,
    small_config,
    write,
)
from hugging_face import hf_logits

import vision
from load_weights import load_config, published_name
from model import KVCache, Qwen2_5_VL

CHUNKS = (5, 3, 1, 1, 2)


def given(method, inputs):
    """A method of the model, with those of a processor's inputs that it takes."""
    taken = signature(method).parameters
    return method(**{name: value for name, value in inputs.items() if name in taken})


def embedded(model, inputs):
    """What `logits` takes: embeddings and positions."""
    position_ids, _ = given(model.positions, inputs)
    return given(model.embed, inputs), position_ids


def in_chunks(model, inputs, padded=False, chunks=CHUNKS):
    """Logits of a prompt decoded into a cache, its last tokens in chunks, the rest before in one go."""
    x, position_ids = embedded(model, inputs)
    B, T, _ = x.shape
    sizes = (T - sum(chunks), *chunks)
    cache = KVCache(model.config, B, T + 3, x.device, x.dtype)

    out = []
    for part, p in zip(x.split(sizes, dim=1), position_ids.split(sizes, dim=2)):
        mask = inputs["attention_mask"][:, :cache.length + part.shape[1]] if padded else None
        out.append(model.logits(part, p, mask, cache))
    return torch.cat(out, dim=1)


# ---------------------------------------------------------------------------- against Hugging Face

def noted_peaks(model, monkeypatch):
    """By layer: largest weight x number of keys, for every query and head, of all that the model runs."""
    peaks = defaultdict(list)

    def noting(name, attend):
        def noted(q, k, v, mask, causal):
            weights = vision.attention_weights(q, k, mask, causal)
            peaks[name].append((weights.amax(dim=-1) * k.shape[2]).flatten())
            return attend(q, k, v, mask, causal)
        return noted

    for name, module in model.named_modules():
        if hasattr(module, "attend"):
            monkeypatch.setattr(module, "attend", noting(name, module.attend))
    return peaks


def test_attention_is_peaked(pairs, monkeypatch):
    """In every layer the median over queries and heads of largest weight x number of keys is 5 or more.

    Were it flat, the tests below would not see a wrong mask, window or position.
    """
    model = pairs("eager").ours
    peaks = noted_peaks(model, monkeypatch)
    model(**prompts([[5, (24, 26), 7]]))
    assert len(peaks) == 8
    for values in peaks.values():
        assert torch.cat(values).median() >= 5


def test_each_token_is_measured_by_its_own_largest_value():
    """Bug: next to a token with large logits, an error in those of a token with small ones passes."""
    theirs = torch.tensor([[1000.0, 1.0], [1.0, 1.0]])
    ours = torch.tensor([[1000.0, 1.0], [1.0, 1.001]])
    with pytest.raises(AssertionError):
        assert_close("none", ours, theirs)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_logits_equal_hugging_face(pair, rows):
    """Bugs: key heads repeated in turn and not side by side, biases left out, a head tied that isn't."""
    inputs = prompts(rows)
    theirs = hf_logits(pair.hf, inputs)
    assert_close("logits", pair.ours(**inputs), theirs, inputs["attention_mask"])


@pytest.mark.parametrize(
    "rows", [VIDEO_ROWS, MIXED_ROWS, [[30], *MIXED_ROWS]], ids=["video", "mixed", "padded"])
def test_video_logits_equal_hugging_face_at_our_positions(pair, rows):
    """Bug: pixels of videos in the places of pictures.

    The positions are ours on both sides: in those of videos transformers 5.23.0 errs (test_rope.py).
    """
    inputs = prompts(rows)
    _, position_ids = embedded(pair.ours, inputs)
    theirs = hf_logits(pair.hf, inputs, position_ids)
    assert_close("logits of videos, at our positions", pair.ours(**inputs), theirs, inputs["attention_mask"])


@pytest.mark.parametrize("size", FAMILY)
def test_published_widths_equal_hugging_face(size, monkeypatch):
    """Bugs: what shows at some widths alone: of heads, 80 or 128; of groups, up to 8 queries to a key.

    One decoder layer, a windowed block and a full one. The last token is decoded into the cache.
    """
    pair = pair_of(shallow(size))
    peaks = noted_peaks(pair.ours, monkeypatch)
    inputs = prompts([[5, (10, 12), 7]])
    ours = in_chunks(pair.ours, inputs, chunks=(1,))
    assert_close("logits at the published widths", ours, hf_logits(pair.hf, inputs))
    assert len(peaks) == 3
    for values in peaks.values():
        assert torch.cat(values).median() >= 5


def test_long_prompt_equals_hugging_face(pairs):
    """Bugs: angles that lose digits far from the start, a table of positions that ends."""
    pair = pairs("sdpa")
    inputs = prompts([[1300, (36, 40), 900, (24, 70), 1016]])
    assert inputs["input_ids"].shape == (1, 4000)
    assert_close("logits of 4,000 tokens", in_chunks(pair.ours, inputs), hf_logits(pair.hf, inputs))


def test_every_norm_has_hugging_faces_eps():
    """Bug: 1e-5 in one of them, which shows only where embeddings are small: here by their standard deviation
    of 0.02. The decoder's is the config's, the tower's is fixed.
    """
    pair = make_pair(rms_norm_eps=3e-6)
    theirs = {published_name(name): module for name, module in pair.hf.named_modules()}
    norms = {name: module for name, module in pair.ours.named_modules() if isinstance(module, vision.RMSNorm)}
    assert len(norms) == 4 * 2 + 1 + 4 * 2 + 1
    for name, norm in norms.items():
        x = 0.02 * noise(32, len(norm.weight))
        assert_equal("every RMSNorm of small embeddings", norm(x), theirs[name](x))


def test_eager_equals_sdpa(pairs):
    """Bug: the attention that is written out to be read is not the one that runs."""
    for rows in (*ROWS.values(), MIXED_ROWS):
        inputs = prompts(rows)
        eager = pairs("eager").ours(**inputs)
        sdpa = pairs("sdpa").ours(**inputs)
        assert_close("itself: eager = sdpa", eager, sdpa, inputs["attention_mask"])


# ---------------------------------------------------------------------------- cache, masks, batches

@pytest.mark.parametrize("rows", [ROWS["one picture"], VIDEO_ROWS, MIXED_ROWS], ids=str)
def test_chunks_equal_one_pass(pair, rows):
    """Bug: the causal mask of a chunk is aligned to the top left, as if nothing stood in the cache."""
    inputs = prompts(rows)
    assert_close("itself: chunked and cached = one pass", in_chunks(pair.ours, inputs), pair.ours(**inputs))


def test_slots_ahead_are_not_looked_at(pairs):
    """Bug: under a mask as long as the cache, all ones, what lies ahead is attended to."""
    model = pairs("sdpa").ours
    inputs = prompts([[20]])
    x, p = embedded(model, inputs)
    cache = KVCache(model.config, 1, 32, "cpu", x.dtype)
    cache.k += 1
    cache.v += 1

    model.logits(x[:, :18], p[:, :, :18], torch.ones(1, 32), cache)
    rest = model.logits(x[:, 18:], p[:, :, 18:], torch.ones(1, 32), cache)
    assert_close("itself: chunked and cached = one pass", rest, model(**inputs)[:, 18:])


def test_token_sees_all_before_it_and_none_after(pairs):
    """Bug: the mask goes by positions, which inside a picture repeat and fall back."""
    model = pairs("sdpa").ours
    x, p = embedded(model, prompts([[3, (8, 8), 2]]))
    before = model.logits(x, p)

    T = x.shape[1]
    for i in range(T):
        changed = x.clone()
        changed[:, i] += 1
        difference = (model.logits(changed, p) - before).abs().amax(dim=-1)
        moved = (difference[0] > 1e-3).tolist()
        assert moved == [False] * i + [True] * (T - i)


def test_full_cache_refuses_more(pairs):
    """Bug: the tokens that don't fit overwrite others, or are counted all the same."""
    model = pairs("sdpa").ours
    cache = KVCache(model.config, 1, 4, "cpu", torch.float32)
    x = torch.zeros(1, 3, 256)
    p = torch.zeros(3, 1, 3).long()

    model.logits(x, p, cache=cache)
    with pytest.raises(ValueError, match="holds 3 of at most 4 tokens and 3 more"):
        model.logits(x, p, cache=cache)
    assert cache.length == 3

    # One more fits.
    model.logits(x[:, :1], p[:, :, :1], cache=cache)
    assert cache.length == 4


def test_batch_equals_single(pair):
    """Bugs: pads are attended to, a row has the pixels or the positions of another. One row is text only."""
    rows = ROWS["padded batch"]
    inputs = prompts(rows)
    together = pair.ours(**inputs)
    for b, mask in enumerate(inputs["attention_mask"].bool()):
        alone = pair.ours(**prompts([rows[b]], first=b))[0]
        assert_close("itself: batch = single", together[b, mask], alone)


def test_masks_are_in_the_models_dtype(pair):
    """Bug: a mask in float32, which makes weights that bfloat16 values cannot be multiplied with."""
    model = copy.deepcopy(pair.ours).bfloat16()
    logits = model(**prompts(ROWS["padded batch"]))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_prefill_makes_no_mask(pairs):
    """Bug: an unpadded prompt gets a mask tensor, and memory grows with the square of its tokens."""
    model = pairs("sdpa").ours
    ratios = []
    for T in (512, 2048):
        x = torch.zeros(1, T, 256)
        p = torch.arange(T).expand(3, 1, T)
        with torch.no_grad(), Largest(model) as largest:
            assert model.logits(x, p, last_only=True).shape[1] == 1
        ratios.append(largest.elements / T)
    assert ratios[0] == ratios[1]

    # Nor does a mask that says nothing.
    inputs = prompts([[600]])
    with torch.no_grad(), Largest(model) as largest:
        model(**inputs)
    assert largest.elements == 600 * 512        # the logits


# ---------------------------------------------------------------------------- what goes in

def test_placeholders_must_match_vision_tokens(pairs):
    """Bug: the tokens of half a picture fill the first half of the placeholders."""
    model = pairs("sdpa").ours
    inputs = prompts(ROWS["one picture"])
    half = inputs["pixel_values"][:260]
    with pytest.raises(ValueError, match="130 placeholders .* but their pixels make 65"):
        model.embed(inputs["input_ids"], half, torch.tensor([[1, 10, 26]]))


def test_placeholders_of_videos_must_not_stay(pairs):
    """Bug: without their pixels they are read as words."""
    with pytest.raises(ValueError, match="135 placeholders .* but their pixels make 0"):
        pairs("sdpa").ours.embed(prompts(VIDEO_ROWS)["input_ids"])


def test_positions_go_by_the_config(pairs):
    """Bugs: the published rate, or another of the published 2s, whatever config.json says."""
    config = pairs("sdpa").ours.config
    tower = replace(config.vision, spatial_merge_size=4, tokens_per_second=5)
    with torch.device("meta"):
        model = Qwen2_5_VL(replace(config, vision=tower))

    grid_thw = torch.tensor([[3, 8, 8]])        # three frames of 2 x 2 groups, a second each
    ids = torch.full((1, 12), VIDEO)
    positions, _ = model.positions(ids, video_grid_thw=grid_thw, second_per_grid_ts=[1.0])
    time, row, column = positions[:, 0].tolist()
    assert time == [0] * 4 + [5] * 4 + [10] * 4
    assert row == [0, 0, 1, 1] * 3
    assert column == [0, 1, 0, 1] * 3


@pytest.mark.parametrize("shape", [(4, 1, 3), (3, 1, 1), (1, 3)], ids=str)
def test_position_ids_must_match_the_tokens(pairs, shape):
    """Bug: Hugging Face's (4, B, T), or one position for all tokens, is broadcast to something."""
    with pytest.raises(AssertionError):
        pairs("sdpa").ours.logits(torch.zeros(1, 3, 256), torch.zeros(shape).long())


@pytest.mark.parametrize("cached, length", [(False, 4), (False, 6), (True, 4), (True, 9)])
def test_mask_must_cover_the_tokens(pairs, cached, length):
    """Bug: a mask of another prompt's length is cut, or goes on into slots that are not there."""
    model = pairs("sdpa").ours
    cache = KVCache(model.config, 1, 8, "cpu", torch.float32) if cached else None
    with pytest.raises(AssertionError):
        model.logits(torch.zeros(1, 5, 256), torch.zeros(3, 1, 5).long(), torch.ones(1, length), cache)


def test_every_parameter_can_be_trained(pairs):
    """Bug: the embedding is frozen, because it is made from a tensor."""
    with torch.device("meta"):
        model = Qwen2_5_VL(pairs("sdpa").ours.config)
    assert all(p.requires_grad for p in model.parameters())


def test_inputs_move_to_the_model(tmp_path, monkeypatch):
    """Bug: inputs of the CPU, as a processor makes them, meet a model that lies elsewhere."""
    config = load_config(write(tmp_path, small_config()))
    with torch.device("meta"):
        model = Qwen2_5_VL(config)
    devices = []

    def note(module, args):
        devices.append(args[0].device.type)

    # Ids and pixels. Then it ends: on the meta device no placeholders can be counted.
    model.model.embed_tokens.register_forward_pre_hook(note)
    model.visual.register_forward_pre_hook(note)
    with pytest.raises(RuntimeError, match="meta"):
        model(**prompts([[5, (4, 4)]]))
    assert devices == ["meta", "meta"]

    # Positions and mask.
    monkeypatch.setattr(model, "splice", lambda x, *rest: x)
    assert model(**prompts([[9], [5]])).device.type == "meta"


# ---------------------------------------------------------------------------- random mixes

def random_item(rng):
    """For a row of `prompts`: words, or a picture, or a video."""
    h = 2 * rng.randint(1, 8)
    w = 2 * rng.randint(1, 8)
    kind = rng.random()
    if kind < 0.4:
        return rng.randint(1, 12)
    if kind < 0.75:
        return h, w
    return rng.randint(1, 4), h, w, rng.choice([0.5, 1.0, 1.3, 2.0])


def random_case(seed):
    """Config changes and rows: heads, groups, windows, full blocks, pictures, videos, text, pads."""
    rng = random.Random(seed)
    depth = rng.randint(1, 4)
    changes = dict(
        num_attention_heads=8,
        num_key_value_heads=rng.choice([1, 2, 4]),
        num_hidden_layers=rng.randint(1, 3),
        rope_parameters=dict(
            rope_type="default",
            rope_theta=rng.choice([1e4, 1e6]),
            mrope_section=rng.choice([[4, 6, 6], [2, 7, 7], [8, 4, 4]]),
        ),
        vision_num_heads=rng.choice([2, 4, 8]),
        vision_depth=depth,
        vision_window_size=rng.choice([56, 84, 112]),
        vision_fullatt_block_indexes=rng.sample(range(depth), rng.randint(0, depth)),
        vision_tokens_per_second=rng.choice([2, 4, 25]),
    )

    rows = []
    for _ in range(rng.randint(1, 3)):
        items = [random_item(rng) for _ in range(rng.randint(0, 3))]
        rows.append([rng.randint(1, 6), *items, rng.randint(12, 16)])
    return changes, rows


def test_random_mix_equals_hugging_face(mix_seed):
    """Bug: any that needs a rare combination.

    More of them: pytest --seeds 1000. One again:
    tests/test_model.py::test_random_mix_equals_hugging_face[17].
    """
    changes, rows = random_case(mix_seed)
    pair = make_pair(["sdpa", "eager"][mix_seed % 2], mix_seed, **changes)
    inputs = prompts(rows, mix_seed)
    mask = inputs["attention_mask"]
    ours = pair.ours(**inputs)

    # Against Hugging Face, at our positions.
    _, position_ids = embedded(pair.ours, inputs)
    theirs = hf_logits(pair.hf, inputs, position_ids)
    assert_close("logits of random mixes", ours, theirs, mask)

    # Against itself: in chunks, and every row alone.
    chunked = in_chunks(pair.ours, inputs, padded=True)
    assert_close("itself: chunked and cached = one pass", chunked, ours, mask)
    for b, row in enumerate(rows):
        alone = pair.ours(**prompts([row], mix_seed, first=b))[0]
        assert_close("itself: batch = single", ours[b, mask[b].bool()], alone)
