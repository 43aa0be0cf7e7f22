"""The decoder and the whole model: parity, the cache, batches, and random mixes of everything."""

import random
from inspect import signature

import pytest
import torch
from conftest import assert_close, hf_logits, make_pair, prompts

import vision
from generate import decode_step
from model import KVCache, Qwen2_5_VL

ROWS = {
    "text": [[40]],
    "one picture": [[5, (20, 26), 7]],
    "three pictures": [[3, (10, 26), 2, (18, 8), (6, 6), 5]],
    "padded batch": [[5, (20, 24), 7], [30], [4, (8, 18), 3]],
}
VIDEO_ROWS = [[4, (3, 10, 18, 1.5), 6]]
MIXED_ROWS = [[4, (3, 10, 18, 0.5), 3, (18, 6), 8]]
CHUNKS = (5, 3, 1, 1, 2)


def given(method, inputs):
    """A method of the model, with those of a processor's inputs that it takes."""
    return method(**{name: inputs[name] for name in signature(method).parameters if name in inputs})


def in_chunks(model, inputs, padded=False):
    """Logits of a prompt decoded into a cache, its last tokens in CHUNKS, the rest before in one go."""
    x, (position_ids, _) = given(model.embed, inputs), given(model.positions, inputs)
    B, T, _ = x.shape
    cache = KVCache(model.config, B, T + 3, x.device, x.dtype)
    out, sizes = [], (T - sum(CHUNKS), *CHUNKS)
    for part, p in zip(x.split(sizes, dim=1), position_ids.split(sizes, dim=2)):
        mask = inputs["attention_mask"][:, :cache.length + part.shape[1]] if padded else None
        out.append(model.decode(part, p, mask, cache))
    return torch.cat(out, dim=1)


def test_attention_too_flat_to_show_a_bug(pairs, monkeypatch):
    """In every layer the median over queries and heads of largest weight x number of keys is 5 or more."""
    model, peaks = pairs("eager").ours, {}
    for name, module in model.named_modules():
        if hasattr(module, "attend"):
            def attend(q, k, v, mask, name=name):
                weights = vision.attention_weights(q, k, mask)
                peaks.setdefault(name, []).append((weights.amax(-1) * k.shape[2]).flatten())
                return vision.eager(q, k, v, mask)
            monkeypatch.setattr(module, "attend", attend)
    model(**prompts([[5, (24, 26), 7]]))
    assert len(peaks) == 8
    assert min(torch.cat(values).median() for values in peaks.values()) >= 5


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_logits_differ(pair, rows):
    inputs = prompts(rows)
    assert_close("logits", pair.ours(**inputs), hf_logits(pair.hf, inputs), inputs["attention_mask"])


@pytest.mark.parametrize("rows", [VIDEO_ROWS, MIXED_ROWS, [[30], *MIXED_ROWS]],
                         ids=["video", "mixed", "padded"])
def test_video_logits_differ_at_our_positions(pair, rows):
    """Everything about video but the positions, in which transformers 5.23.0 errs (test_rope.py)."""
    inputs = prompts(rows)
    theirs = hf_logits(pair.hf, inputs, given(pair.ours.positions, inputs)[0])
    assert_close("logits of videos, at our positions", pair.ours(**inputs), theirs, inputs["attention_mask"])


def test_eager_differs_from_sdpa(pairs):
    for rows in (*ROWS.values(), MIXED_ROWS):
        inputs = prompts(rows)
        assert_close("itself: eager = sdpa", pairs("eager").ours(**inputs), pairs("sdpa").ours(**inputs),
                     inputs["attention_mask"])


@pytest.mark.parametrize("rows", [ROWS["one picture"], VIDEO_ROWS, MIXED_ROWS], ids=str)
def test_prefill_and_decode_disagree(pair, rows):
    """Chunks after a cached prefix equal one pass; a causal mask aligned to the top left does not."""
    inputs = prompts(rows)
    assert_close("itself: chunked and cached = one pass", in_chunks(pair.ours, inputs), pair.ours(**inputs))


def test_slots_ahead_are_looked_at(pairs):
    """A mask as long as the cache, all ones: what lies ahead stays invisible."""
    model, inputs = pairs("sdpa").ours, prompts([[20]])
    x, (p, _) = given(model.embed, inputs), given(model.positions, inputs)
    cache = KVCache(model.config, 1, 32, "cpu", x.dtype)
    cache.k += 1
    cache.v += 1
    model.decode(x[:, :18], p[:, :, :18], torch.ones(1, 32), cache)
    rest = model.decode(x[:, 18:], p[:, :, 18:], torch.ones(1, 32), cache)
    assert_close("itself: chunked and cached = one pass", rest, model(**inputs)[:, 18:])


def test_mask_goes_by_position(pairs):
    """Every token sees those before it and no other, also inside a picture, where positions repeat."""
    model, inputs = pairs("sdpa").ours, prompts([[3, (8, 8), 2]])
    x, (p, _) = given(model.embed, inputs), given(model.positions, inputs)
    before = model.decode(x, p)
    for i in range(x.shape[1]):
        changed = x.clone()
        changed[:, i] += 1
        moved = (model.decode(changed, p) - before).abs().amax(-1)[0] > 1e-3
        assert moved.tolist() == [False] * i + [True] * (x.shape[1] - i)


def test_cache_grows_past_its_end(pairs):
    model = pairs("sdpa").ours
    cache = KVCache(model.config, 1, 4, "cpu", torch.float32)
    x, p = torch.zeros(1, 3, 256), torch.zeros(3, 1, 3).long()
    model.decode(x, p, cache=cache)
    with pytest.raises(ValueError, match="holds 3 of at most 4 tokens and 3 more"):
        model.decode(x, p, cache=cache)
    assert cache.length == 3


def test_batch_differs_from_single(pair):
    """Three rows, one text only: each equals itself alone; none has another's pixels or positions."""
    rows = ROWS["padded batch"]
    inputs = prompts(rows)
    together = pair.ours(**inputs)
    for b, mask in enumerate(inputs["attention_mask"].bool()):
        alone = pair.ours(**prompts([rows[b]], first=b))[0]
        assert_close("itself: batch = single", together[b, mask], alone)


def test_placeholders_and_vision_tokens_differ_in_number(pairs):
    inputs, grid = prompts(ROWS["one picture"]), torch.tensor([[1, 10, 26]])
    with pytest.raises(ValueError, match="130 placeholders for pictures, which take 65"):
        pairs("sdpa").ours.embed(inputs["input_ids"], inputs["pixel_values"][:260], grid)


def test_decode_step_waits_for_the_device(pairs):
    """On the meta device every .item(), .tolist(), boolean index and `if tensor` raises."""
    config = pairs("sdpa").ours.config
    with torch.device("meta"):
        model = Qwen2_5_VL(config).requires_grad_(False)
        cache = KVCache(config, 2, 64, "meta", torch.float32)
        token, position = torch.zeros(2, 1).long(), torch.zeros(2, 1).long()
        mask = torch.ones(2, 64).long()
        for _ in range(2):
            logits = decode_step(model, token, position, mask, cache)
    assert logits.shape == (2, config.vocab_size) and cache.length == 2


def test_prefill_makes_a_mask(pairs):
    """Unpadded, the largest tensor of a prefill grows with the tokens and not with their square."""
    from test_vision import Largest
    model, ratios = pairs("sdpa").ours, []
    for T in (512, 2048):
        x, p = torch.zeros(1, T, 256), torch.arange(T).expand(3, 1, T)
        with torch.no_grad(), Largest(model) as largest:
            assert model.decode(x, p, last_only=True).shape[1] == 1
        ratios.append(largest.elements / T)
    assert ratios[0] == ratios[1]


def random_case(seed):
    """Config changes and rows: heads, groups, windows, full blocks, pictures, videos, text, pads."""
    rng = random.Random(seed)
    kv = rng.choice([1, 2, 4])
    window = rng.choice([56, 84, 112])
    depth = rng.randint(1, 4)
    changes = dict(
        num_key_value_heads=kv, num_attention_heads=8, num_hidden_layers=rng.randint(1, 3),
        rope_parameters=dict(rope_type="default", rope_theta=rng.choice([1e4, 1e6]),
                             mrope_section=rng.choice([[4, 6, 6], [2, 7, 7], [8, 4, 4]])),
        vision_num_heads=rng.choice([2, 4, 8]), vision_depth=depth, vision_window_size=window,
        vision_fullatt_block_indexes=rng.sample(range(depth), rng.randint(0, depth)),
        vision_tokens_per_second=rng.choice([2, 4, 25]),
    )

    def item():
        h, w = 2 * rng.randint(1, 8), 2 * rng.randint(1, 8)
        kind = rng.random()
        if kind < 0.4:
            return rng.randint(1, 12)
        return (h, w) if kind < 0.75 else (rng.randint(1, 4), h, w, rng.choice([0.5, 1.0, 1.3, 2.0]))

    rows = [[rng.randint(1, 6), *(item() for _ in range(rng.randint(0, 3))), rng.randint(12, 16)]
            for _ in range(rng.randint(1, 3))]
    return changes, rows


def test_random_mix_differs(mix_seed):
    """More of them: pytest --seeds 1000. One again: tests/test_model.py::test_random_mix_differs[17]."""
    seed, (changes, rows) = mix_seed, random_case(mix_seed)
    pair = make_pair(attention=["sdpa", "eager"][seed % 2], seed=seed, **changes)
    inputs = prompts(rows, seed)
    mask, ours = inputs["attention_mask"], pair.ours(**inputs)
    theirs = hf_logits(pair.hf, inputs, given(pair.ours.positions, inputs)[0])
    chunked = in_chunks(pair.ours, inputs, padded=True)
    assert_close("logits of random mixes", ours, theirs, mask)
    assert_close("itself: chunked and cached = one pass", chunked, ours, mask)
    for b, row in enumerate(rows):
        alone = pair.ours(**prompts([row], seed, first=b))[0]
        assert_close("itself: batch = single", ours[b, mask[b].bool()], alone)
