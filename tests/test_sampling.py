"""Choosing, steps and the loop: answers equal Hugging Face's, token by token."""

import ast
import copy
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from conftest import (
    MIXED_ROWS,
    ROWS,
    START,
    TOLERANCE,
    VIDEO_ROWS,
    assert_close,
    assert_equal,
    prompts,
)
from transformers.generation import logits_process as hf

import sampling
from model import KVCache, Qwen2_5_VL
from sampling import Sampler, decode_step, generate

ROOT = Path(__file__).parent.parent


def ours(model, inputs, **settings):
    """Tokens (B, n) of an answer."""
    return torch.stack(list(generate(model, inputs, **settings)), dim=1)


def ours_with_logits(model, inputs, monkeypatch, **settings):
    """Tokens (B, n), and a list of the logits that each was chosen from."""
    logits = []
    choose = Sampler.__call__

    def recording(sampler, x, seen, generator):
        logits.append(x.clone())
        return choose(sampler, x, seen, generator)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", recording)
        return ours(model, inputs, **settings), logits


def theirs(hf, inputs, seed=None, **settings):
    """Tokens (B, 32) of Hugging Face's answer and a list of their logits; greedy without a seed."""
    hf.model.rope_deltas = None     # left over from an earlier call
    if seed is not None:
        torch.manual_seed(seed)
    out = hf.generate(
        **inputs,
        max_new_tokens=32,
        do_sample=seed is not None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return out.sequences[:, inputs["input_ids"].shape[1]:], out.logits


# ---------------------------------------------------------------------------- choosing a token

@pytest.mark.parametrize("penalty", [1.0, 1.05])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_greedy_answer_equals_hugging_face(pair, rows, penalty, monkeypatch):
    """Bugs: it is decoded at the cache's length, one position too far, or at another row's positions."""
    inputs = prompts(rows)
    expected, their_logits = theirs(pair.hf, inputs, repetition_penalty=penalty)
    tokens, logits = ours_with_logits(
        pair.ours, inputs, monkeypatch, max_new_tokens=32, repetition_penalty=penalty)

    assert len(logits) == len(their_logits) == 32
    for a, b in zip(logits, their_logits):
        assert_close("logits of 32 greedy steps", a, b)

    # The answers say something, and without ties that could hide or fake a difference.
    assert all(len(row.unique()) >= 12 for row in expected)
    for b in their_logits if penalty == 1 else ():
        first, second = b.topk(2).values.T
        assert ((first - second) / b.abs().max()).min() > 100 * TOLERANCE
    assert_equal("32 greedy tokens", tokens, expected)


@pytest.mark.parametrize("settings", [
    dict(temperature=0.9),
    dict(temperature=0.7, top_k=5),
    dict(temperature=1.0, top_p=0.6),
    dict(temperature=1.3, top_k=40, top_p=0.8, repetition_penalty=1.1),
], ids=str)
@pytest.mark.parametrize("rows", [ROWS["one picture"], ROWS["padded batch"]], ids=["one", "padded"])
def test_sampled_answer_equals_hugging_face(pairs, rows, settings):
    """Bugs: the filters in another order, or with another edge, leave other tokens to draw from."""
    pair = pairs("sdpa")
    inputs = prompts(rows)
    if "repetition_penalty" in settings:    # Hugging Face penalizes pads too: let pad be one the prompt has
        inputs["input_ids"][inputs["attention_mask"] == 0] = START

    everything = dict(top_k=0, top_p=1.0)   # where Hugging Face's defaults are not ours
    expected, _ = theirs(pair.hf, inputs, seed=7, **everything | settings)
    tokens = ours(pair.ours, inputs, max_new_tokens=32, seed=7, **settings)
    assert_equal("32 sampled tokens", tokens, expected)

    another = ours(pair.ours, inputs, max_new_tokens=8, seed=8, **settings)
    assert not torch.equal(tokens[:, :8], another)


def test_penalty_counts_prompt_and_answer_and_no_pads(pairs):
    """Bug: pads are penalized, and a padded row does not answer as it does alone."""
    model = pairs("sdpa").ours
    settings = dict(max_new_tokens=24, repetition_penalty=1.3)
    inputs = prompts([[30], [9]])
    alone = dict(input_ids=inputs["input_ids"][1:, 21:])
    answer = ours(model, alone, **settings)[0]

    # The most telling pads are those that the answer wants to say.
    for pad in answer.unique()[::3]:
        inputs["input_ids"][1, :21] = pad
        assert torch.equal(ours(model, inputs, **settings)[1], answer)


@pytest.mark.parametrize("settings", [
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=1.3, temperature=0.9, top_k=40, top_p=0.8),
], ids=["greedy", "sampled"])
def test_bfloat16_logits_are_chosen_from_as_hugging_face_does(pairs, settings, monkeypatch):
    """Bugs: penalty and temperature in bfloat16, where 1.3 is 1.297; in a batch, ids that only another row,
    or a pad, has. Two of the three rows are padded.
    """
    model = copy.deepcopy(pairs("sdpa").ours).bfloat16()
    inputs = prompts(ROWS["padded batch"])
    tokens, logits = ours_with_logits(model, inputs, monkeypatch, max_new_tokens=24, seed=3, **settings)
    assert logits[0].dtype == torch.bfloat16

    # Hugging Face's rules, for every row by itself, without its pads.
    rules = hf.LogitsProcessorList([hf.RepetitionPenaltyLogitsProcessor(1.3)])
    if "temperature" in settings:
        rules.append(hf.TemperatureLogitsWarper(0.9))
        rules.append(hf.TopKLogitsWarper(40))
        rules.append(hf.TopPLogitsWarper(0.8))
    generator = torch.Generator().manual_seed(3)
    real = inputs["attention_mask"].bool()
    for n, x in enumerate(logits):
        scores = []
        for b, ids in enumerate(inputs["input_ids"]):
            said = torch.cat((ids[real[b]], tokens[b, :n]))
            scores.append(rules(said[None], x[b:b + 1].float()))
        scores = torch.cat(scores)

        expected = scores.argmax(dim=-1)
        if "temperature" in settings:
            expected = torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)[:, 0]
        assert_equal("tokens chosen from bfloat16 logits", tokens[:, n], expected)


def test_least_temperature_is_greedy_and_takes_the_first_of_two_equals():
    """Bug: the published 1e-6 draws between two equally large logits."""
    tie = torch.tensor([[1.0, 3.0, 0.0, 3.0]])
    seen = torch.zeros_like(tie).bool()
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for temperature in (0.0, 1e-6, 1e-4):
        sampler = Sampler(temperature)
        drawn[temperature] = {sampler(tie, seen, generator).item() for _ in range(32)}
    assert drawn == {0.0: {1}, 1e-6: {1}, 1e-4: {1, 3}}


def test_edges_of_top_k_and_top_p_equal_hugging_face():
    """Bugs: a top_k above the vocabulary fails; at exactly 1 - p, or among equals, another token is kept."""
    logits = torch.tensor([[0.125, 0.25, 0.125, 0.5]]).log()
    seen = torch.zeros_like(logits).bool()
    cases = [
        (dict(top_k=5), hf.TopKLogitsWarper(5)),
        (dict(top_k=3), hf.TopKLogitsWarper(3)),
        (dict(top_p=0.5), hf.TopPLogitsWarper(0.5)),
        (dict(top_p=0.75), hf.TopPLogitsWarper(0.75)),
        (dict(top_p=1e-9), hf.TopPLogitsWarper(1e-9)),      # in float32 all of them are unlikely
    ]
    for settings, rule in cases:
        kept = {Sampler(1.0, **settings)(logits, seen).item() for _ in range(200)}
        expected = rule(None, logits)[0].isfinite().nonzero()[:, 0]
        assert_equal("tokens kept at the edges of top-k and top-p", kept, set(expected.tolist()))


def test_penalty_lowers_positive_and_negative_logits():
    """Bug: a negative logit is divided, too, which rewards it."""
    seen = torch.tensor([[True, False]])
    sampler = Sampler(repetition_penalty=1.2)
    assert sampler(torch.tensor([[1.1, 1.0]]), seen).item() == 1
    assert sampler(torch.tensor([[-1.0, -1.1]]), seen).item() == 1


@pytest.mark.parametrize("name, values, message", [
    ("temperature", [-1.0, float("inf"), float("nan")], "must be 0 (greedy) or above"),
    ("top_k", [-1], "must be 0 (all) or above"),
    ("top_p", [0.0, 1.5, float("nan")], "must be above 0 and at most 1"),
    ("repetition_penalty", [0.0, float("nan")], "must be above 0"),
    ("seed", [-1, 2**64], "must be from 0 to 2**64 - 1"),
    ("max_new_tokens", [0], "must be at least 1"),
    ("max_new_tokens", [128_000], "a prompt of 9 tokens and 128000 new ones exceed the context of 128000: "),
    ("graph", [True], "the model is on cpu, and only CUDA has graphs; leave it out"),
])
def test_meaningless_settings_are_refused_at_once(pairs, name, values, message):
    """Bug: it is accepted, or refused only when the first token is asked for, outside of a caller's `try`."""
    for value in values:
        with pytest.raises(ValueError) as error:
            generate(pairs("sdpa").ours, prompts([[9]]), **{name: value})
        assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_at_their_limits_are_accepted(pairs):
    """Bug: the last token of the context, or a limit itself, is refused."""
    model = pairs("sdpa").ours
    for settings in (dict(max_new_tokens=128_000 - 9), dict(top_p=1.0), dict(seed=0), dict(seed=2**64 - 1)):
        generate(model, prompts([[9]]), **settings)

    # The cache is then full to its last slot.
    inputs = prompts([[sampling.SLOT_MULTIPLE - 8]])
    assert ours(model, inputs, max_new_tokens=8).shape == (1, 8)


# ---------------------------------------------------------------------------- one step

def test_steps_equal_one_pass(pair, monkeypatch):
    """Bug: steps drift. Compared with ourselves, because transformers 5.23.0 fails after a video."""
    inputs = prompts(MIXED_ROWS)
    tokens, logits = ours_with_logits(pair.ours, inputs, monkeypatch, max_new_tokens=8)

    ids = torch.cat((inputs["input_ids"], tokens), dim=1)
    whole = pair.ours(**inputs | dict(input_ids=ids, attention_mask=None))
    assert_close("itself: chunked and cached = one pass", torch.stack(logits, dim=1), whole[:, -9:-1])


def test_decode_step_never_waits(pairs):
    """Bug: something on the device is looked at. On the meta device .item(), .tolist(), boolean indices and
    `if tensor` raise.
    """
    config = pairs("sdpa").ours.config
    with torch.device("meta"):
        model = Qwen2_5_VL(config).requires_grad_(False)
        cache = KVCache(config, 2, 64, "meta", torch.float32)
        token = torch.zeros(2, 1, dtype=torch.int64)
        position = torch.zeros(2, 1, dtype=torch.int64)
        mask = torch.ones(2, 64, dtype=torch.int64)
        for _ in range(2):
            logits = decode_step(model, token, position, mask, cache)
    assert logits.shape == (2, config.vocab_size)
    assert cache.length == 2


# ---------------------------------------------------------------------------- the graph

@pytest.mark.parametrize("rows", [ROWS["one picture"], ROWS["padded batch"], VIDEO_ROWS],
                         ids=["one", "padded", "video"])
def test_captured_loop_equals_the_plain_one(pairs, rows, monkeypatch):
    """Bug: a step takes something from Python, which a graph replays as it was at the capture. Static
    buffers, the whole mask and the device's own count must do.
    """
    model = pairs("sdpa").ours
    inputs = prompts(rows)
    captured_at = []

    def not_captured(step, cache):
        """Runs the step with the host's count of when it was captured."""
        captured_at.append(cache.length)

        def replay():
            length = cache.length
            cache.length = captured_at[0]
            logits = step()
            cache.length = length + 1
            return logits
        return replay

    def loop(graph):
        no_end = torch.tensor([], dtype=torch.int64)
        steps = sampling.token_loop(model, inputs, 20, no_end, 0, graph, Sampler())
        return torch.stack(list(steps), dim=1)

    monkeypatch.setattr(sampling, "capture", not_captured)
    plain = loop(graph=False)
    assert captured_at == []
    assert torch.equal(loop(graph=True), plain)

    # Once, and after a trial run: at the first call libraries do what a capture forbids.
    assert captured_at == [inputs["input_ids"].shape[1] + 1]


# ---------------------------------------------------------------------------- the loop

def test_every_end_token_ends_a_row(pairs):
    """Bug: end tokens are cut to one, and rows that meet another go on."""
    model = pairs("sdpa").ours
    inputs = prompts([[20], [30]])
    tokens = ours(model, inputs, max_new_tokens=20)

    # Let two tokens of the answers be end tokens. Which row meets one where?
    ends = [tokens[0, 4].item(), tokens[1, 9].item()]
    stops = [next(n for n, token in enumerate(row) if token in ends) for row in tokens.tolist()]

    stopped = ours(model, inputs, max_new_tokens=20, eos_token_id=ends, pad_token_id=3)
    assert stopped.shape[1] == max(stops) + 1 < 20
    for row, full, stop in zip(stopped.tolist(), tokens.tolist(), stops):
        assert row[:stop + 1] == full[:stop + 1]
        assert set(row[stop + 1:]) <= {3}

    # One alone, as a number.
    assert ours(model, prompts([[20]]), max_new_tokens=20, eos_token_id=ends[0]).shape[1] <= 5


def test_tower_and_prompt_run_once(pairs, monkeypatch):
    """Bug: a step runs the tower, or the prompt, again."""
    model = pairs("sdpa").ours
    inputs = prompts(ROWS["three pictures"])
    lengths = []
    towers = []
    logits = model.logits

    def counting(x, position_ids, mask, cache, last_only):
        lengths.append(x.shape[1])
        assert last_only and mask is None       # no logits of the prompt, no mask where there are no pads
        return logits(x, position_ids, mask, cache, last_only)

    monkeypatch.setattr(model, "logits", counting)
    handle = model.visual.register_forward_hook(lambda *args: towers.append(1))
    ours(model, inputs, max_new_tokens=6)
    handle.remove()
    assert lengths == [inputs["input_ids"].shape[1]] + [1] * 5
    assert len(towers) == 1


def test_answers_do_not_disturb_each_other(pairs):
    """Bug: a cache, a count or a position that is kept with the model: for the next answer, or for one that
    is alive at the same time.
    """
    model = pairs("sdpa").ours
    questions = [prompts(ROWS["one picture"]), prompts([[30]]), prompts(VIDEO_ROWS)]
    alone = [list(generate(copy.deepcopy(model), inputs, 8)) for inputs in questions]

    one_after_the_other = [list(generate(model, inputs, 8)) for inputs in questions]
    assert one_after_the_other == alone
    together = zip_longest(*(generate(model, inputs, 8) for inputs in questions))
    assert [list(answer) for answer in zip(*together)] == alone


def test_answer_keeps_no_gradients(pairs, monkeypatch):
    """Bug: a model that was made to be trained keeps every step of an answer in memory."""
    model = copy.deepcopy(pairs("sdpa").ours).requires_grad_(True)
    _, logits = ours_with_logits(model, prompts([[9]]), monkeypatch, max_new_tokens=3)
    assert not any(x.requires_grad for x in logits)


def test_defaults_are_greedy_and_256_tokens(pairs):
    """Bug: another length, or chance, where nothing is asked for."""
    model = pairs("sdpa").ours
    inputs = prompts([[9]])
    tokens = ours(model, inputs)
    assert tokens.shape == (1, 256)
    assert torch.equal(tokens[:, :24], ours(model, inputs, max_new_tokens=24, temperature=0.0))


def test_ended_rows_are_padded_with_0(pairs):
    """Bug: with something else, where nothing is asked for."""
    model = pairs("sdpa").ours
    inputs = prompts([[20], [30]])
    end = ours(model, inputs, max_new_tokens=12)[0, 2].item()
    tokens = ours(model, inputs, max_new_tokens=12, eos_token_id=end)
    first = tokens[0].tolist().index(end)
    assert tokens[0, first + 1:].tolist() == [0] * (11 - first)


def test_a_seed_is_its_answers_own(pairs):
    """Bugs: a seed that nobody gave; one that is set for all that draw."""
    model = pairs("sdpa").ours
    inputs = prompts([[9]])
    settings = dict(max_new_tokens=12, temperature=3.0)

    # Without a seed, torch's own chance.
    torch.manual_seed(1)
    first = ours(model, inputs, **settings)
    assert not torch.equal(ours(model, inputs, **settings), first)

    # It is as if an answer with a seed had not been.
    torch.manual_seed(1)
    ours(model, inputs, **settings, seed=2)
    assert torch.equal(ours(model, inputs, **settings), first)


# ---------------------------------------------------------------------------- where it can be used

def imported(name):
    """What a module of this project imports, and what these import, by their first names."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    for other in list(found):
        if (ROOT / f"{other}.py").exists():
            found |= imported(other)
    return found


def test_sampling_needs_no_terminal():
    """Bug: a notebook that generates loads the command line, and on Windows misses `resource`."""
    found = imported("sampling")
    assert {"torch", "model", "vision", "rope"} <= found
    assert found.isdisjoint({"generate", "argparse", "resource"})
