"""What a graphics card would do, on machines without one.

`Card` stands in for it: its tensors say that they are on cuda:1, keep their numbers on the CPU, and can't
meet tensors of the CPU in one operation; every wait of the host is counted. `Graph` stands in for a CUDA
graph, and shows what one is: a list of operations, with where they read and write. Capturing fills the list
and leaves the card as it was; a replay goes through it and asks nothing of Python.

No time can be measured here, and no kernel of CUDA's runs. What holds: no tensor is forgotten on the CPU, no
value is looked at, and the graph computes what the plain loop does.
"""

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROWS, VIDEO_ROWS, flat, prompts, write
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import generate as program
import load_weights
import rope
import sampling
from load_weights import load_config
from model import KVCache, Qwen2_5_VL
from sampling import decode_step, generate

INDEX = 1               # not the current device, to which a forgotten device= would lead
DEVICE = torch.device("cuda", INDEX)

aten = torch.ops.aten
TRANSFERS = (aten._to_copy, aten.copy_)
INDEXING = (Tensor.__getitem__, Tensor.__setitem__, aten.index)     # CUDA takes an index from the CPU, too
EMPTY = (aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided)
LOOKS = (
    Tensor.tolist, aten.item, aten.is_nonzero, aten._local_scalar_dense, aten.equal, aten.nonzero,
    aten.masked_select,
)
# What torch asks a driver about before it asks us.
EARLY = {
    Tensor.copy_: aten.copy_.default,
    Tensor.tolist: Tensor.tolist,
    Tensor.__invert__: aten.bitwise_not.default,
    Tensor.__getitem__: Tensor.__getitem__,
    Tensor.__setitem__: Tensor.__setitem__,
    F.scaled_dot_product_attention: F.scaled_dot_product_attention,
}

# ---------------------------------------------------------------------------- the stand-ins

class OnCard(Tensor):
    """A tensor that says it is on the card, with its numbers in `.there`."""

    def __new__(cls, there, card):
        return cls._make_wrapper_subclass(
            cls, there.shape, strides=there.stride(), storage_offset=there.storage_offset(),
            dtype=there.dtype, device=DEVICE)

    def __init__(self, there, card):
        self.there = there
        self.card = card

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func not in EARLY:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})
        card = next(x.card for x in tree_leaves((args, kwargs)) if isinstance(x, OnCard))
        return card.run(EARLY[func], args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: no card")


class Graph:
    """A CUDA graph: operations in a row, each with the tensors that it reads and writes."""

    def __init__(self):
        self.calls = []
        self.before = []        # tensors that were written to while capturing, as they were
        self.replays = 0

    def note(self, func, args, kwargs):
        """Run an operation once, to know where its result lies."""
        arguments = func._schema.arguments if hasattr(func, "_schema") else []
        for x, argument in zip(args, arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((x, x.clone()))

        # A number on the CPU is read now, and never again.
        args, kwargs = tree_map_only(Tensor, lambda x: x.clone() if x.dim() == 0 else x, (args, kwargs))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def undo(self):
        """Capturing is not running: what was written is as before, and there are no results yet."""
        for func, args, kwargs, out in self.calls:
            read = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for x in tree_leaves(out):
                if storage(x) not in read:
                    x.fill_(torch.nan if x.is_floating_point() else 0)
        for x, old in reversed(self.before):
            x.copy_(old)

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            for x, y in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if storage(x) != storage(y):
                    x.copy_(y)


class Card(TorchDispatchMode):
    """A device of its own, and torch.cuda as far as it is used here. inner: where its numbers really are."""

    def __init__(self, inner="cpu"):
        super().__init__()
        self.inner = inner
        self.current = 0        # torch.cuda.current_device()
        self.waits = []         # of the host for the card
        self.kernels = []       # launched one by one
        self.met = set()        # operations and shapes that libraries have set themselves up for
        self.streams = []
        self.graphs = []
        self.capturing = None   # the graph that is being captured

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        name = getattr(func, "overloadpacket", func)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in given if isinstance(x, OnCard)]
        others = [x for x in given if not isinstance(x, OnCard) and x.dim() > 0]
        on_card = bool(ours)

        # Tensors of two devices meet only in a copy.
        if ours and others:
            indexed = name in INDEXING and isinstance(args[0], OnCard)
            if name not in TRANSFERS and not indexed:
                raise RuntimeError(f"{func}: tensors on the card and on the CPU")
            self.forbid_in_capture(f"{func}: a copy from or to the CPU")

        # Does the host wait? A boolean index is a look, too: how many are true?
        indices = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)] if name in INDEXING else []
        if ours and (name in LOOKS or any(x.dtype is torch.bool for x in indices)):
            self.wait("a look at a value")
        if ours and others and name in INDEXING:
            self.wait("an index from the CPU")
        if ours and name is aten.copy_ and not isinstance(args[0], OnCard):
            self.wait("a copy to the CPU")
            on_card = False

        # Where does the result go?
        target = kwargs.get("device")
        if target is not None:
            on_card = torch.device(target).type == "cuda"
            if ours and not on_card:
                self.wait("a copy to the CPU")
            if on_card:
                index = torch.device(target).index
                assert (self.current if index is None else index) == INDEX, f"{func}: on another card"
                if others:
                    self.forbid_in_capture(f"{func}: a copy from the CPU")
                kwargs = kwargs | dict(device=self.inner)

        if not on_card:
            return func(*unwrap(args), **unwrap(kwargs))
        out = self.launch(func, name, unwrap(args), unwrap(kwargs))
        known = {id(x.there): x for x in ours}      # what works in place returns the tensor it was given
        return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else OnCard(x, self), out)

    def launch(self, func, name, args, kwargs):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        shapes = (name, *((x.shape, x.dtype) for x in given))
        if self.capturing is None:
            out = func(*args, **kwargs)
            self.met.add(shapes)
        else:
            assert shapes in self.met, f"{func} runs for the first time, which can't be captured"
            out = self.capturing.note(func, args, kwargs)

        # Fresh memory holds anything. A view is no kernel.
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if name in EMPTY:
            out.fill_(torch.nan if out.is_floating_point() else 7)
        mutable = getattr(getattr(func, "_schema", None), "is_mutable", False)
        if mutable or not {storage(x) for x in results} & {storage(x) for x in given}:
            self.kernels.append(name)
        return out

    def wait(self, what):
        self.forbid_in_capture(what)
        self.waits.append(what)

    def forbid_in_capture(self, what):
        assert self.capturing is None, f"{what}, which can't be captured"

    # What stands for torch.cuda's names.

    def stream(self, device):
        self.streams.append(device)
        return device

    def graph(self):
        self.graphs.append(Graph())
        return self.graphs[-1]

    @contextmanager
    def device(self, device):
        before = self.current
        self.current = device.index
        yield
        self.current = before

    @contextmanager
    def capture(self, graph, stream, capture_error_mode):
        assert self.current == stream.index == INDEX        # it waits for the current device
        assert capture_error_mode == "thread_local"         # or what other threads do would end it
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None
            graph.undo()


def storage(x):
    return x.untyped_storage()._cdata


def unwrap(tree):
    return tree_map_only(OnCard, lambda x: x.there, tree)


def to_card(model, card):
    """The same model with its weights on the card."""
    model = copy.deepcopy(model)
    for part in model.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(OnCard(p.data, card), requires_grad=False))
    return model


@contextmanager
def inserted(card, monkeypatch):
    """torch takes `card` for a card of this machine."""
    names = dict(
        _lazy_init=lambda: None,
        is_available=lambda: True,
        device_count=lambda: INDEX + 1,
        max_memory_allocated=lambda device: 0,
        device=card.device,
        Stream=card.stream,
        CUDAGraph=card.graph,
        graph=card.capture,
    )
    with monkeypatch.context() as patch:
        for name, value in names.items():
            patch.setattr(torch.cuda, name, value)
        forget()
        with card:
            yield card
        forget()


def forget():
    """Nothing of a pretended card stays behind."""
    rope.inv_freq.cache_clear()
    sampling.capture_stream.cache_clear()


@pytest.fixture
def card(monkeypatch):
    with inserted(Card(), monkeypatch) as card:
        yield card


@pytest.fixture
def caches(monkeypatch):
    """The caches that `generate` makes."""
    made = []

    def make(*args):
        made.append(KVCache(*args))
        return made[-1]

    monkeypatch.setattr(sampling, "KVCache", make)
    return made


@pytest.fixture
def choices(monkeypatch):
    """What every token was chosen from, on the CPU: logits, and the ids that had been said."""
    noted = []
    choose = sampling.Sampler.__call__

    def note(self, logits, seen, generator=None):
        noted.append((unwrap(logits).clone(), unwrap(seen).clone()))
        return choose(self, logits, seen, generator)

    monkeypatch.setattr(sampling.Sampler, "__call__", note)
    return noted


# ---------------------------------------------------------------------------- whole answers

COUNT = 6       # tokens
PENALTY = 1.2
PAD = 7


def answer_without_cache(model, inputs):
    """Tokens, each from the whole text anew: no cache, no loop, no graph."""
    sampler = sampling.Sampler(repetition_penalty=PENALTY)
    tokens = []
    for _ in range(COUNT):
        ids = inputs["input_ids"]
        mask = inputs["attention_mask"]
        seen = torch.stack([torch.bincount(row[real.bool()], minlength=model.config.vocab_size) > 0
                            for row, real in zip(ids, mask)])
        tokens.append(sampler(model(**inputs)[:, -1], seen))
        inputs = inputs | dict(
            input_ids=torch.cat((ids, tokens[-1][:, None]), dim=1),
            attention_mask=F.pad(mask, (0, 1), value=1),
        )
    return tokens


@pytest.mark.parametrize("attention, graph", [("sdpa", True), ("eager", True), ("sdpa", False)])
@pytest.mark.parametrize(
    "rows", [ROWS["three pictures"], ROWS["padded batch"], VIDEO_ROWS], ids=["pictures", "padded", "video"])
def test_an_answer_on_a_card_is_right(pairs, attention, rows, graph, monkeypatch, caches, choices):
    """Bugs: a tensor made or left on the CPU; a wait in the loop; and, in a graph, whatever Python knew while
    the step was captured and should have left to the card: slots, a mask cut at the length, a new token."""
    model = pairs(attention).ours
    inputs = prompts(rows)
    expected = answer_without_cache(model, inputs)
    reference = list(choices)
    choices.clear()

    # The first row ends with its last token but one, and then is padded. Alone it ends the answer.
    eos = expected[COUNT - 2][0].item()
    ended = torch.zeros(len(rows), dtype=torch.bool)
    for n, ids in enumerate(expected):
        expected[n] = ids.masked_fill(ended, PAD)
        ended |= ids == eos
    if len(rows) == 1:
        expected.pop()

    with inserted(Card(), monkeypatch) as card:
        tokens = []
        waits = []
        settings = dict(eos_token_id=eos, pad_token_id=PAD, repetition_penalty=PENALTY)
        for ids in generate(to_card(model, card), inputs, COUNT, graph=graph, **settings):
            tokens.append(ids)
            waits.append(list(card.waits))
            card.waits.clear()

            # The host and the card count alike.
            stored = inputs["input_ids"].shape[1] + len(tokens) - 1
            assert caches[-1].length == caches[-1].end.there.item() == stored

    assert caches[-1].k.shape[3] % 64 == 0      # kernels want masks whose rows are aligned
    assert torch.equal(torch.stack(tokens), torch.stack(expected))
    for (ours, said), (theirs, really_said) in zip(choices, reference):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert torch.equal(said, really_said)

    # One wait a token. Before the first, two more: do the placeholders of pictures, of videos match?
    assert waits[0] == ["a look at a value"] * 2 + ["a copy to the CPU"]
    assert all(wait == ["a copy to the CPU"] for wait in waits[1:])
    assert [graph.replays for graph in card.graphs] == ([len(tokens) - 2] if graph else [])


def test_inputs_may_be_on_the_card(pairs, card):
    """Bug: what the host computes with is taken from inputs as they come."""
    model = to_card(pairs("sdpa").ours, card)
    inputs = prompts(ROWS["padded batch"])
    moved = {name: x if name.endswith("_thw") else x.to(DEVICE) for name, x in inputs.items()}
    assert all(map(torch.equal, generate(model, moved, 3), generate(model, inputs, 3)))


def test_answers_at_the_same_time_do_not_disturb_each_other(pairs, card):
    """Bug: two graphs share what they read and write."""
    model = to_card(pairs("sdpa").ours, card)
    rows = [[5, (6, 6), 7]], [[30]]
    alone = [list(generate(model, prompts(row), 6, graph=False)) for row in rows]
    together = list(zip(*(generate(model, prompts(row), 6) for row in rows)))
    assert [list(answer) for answer in zip(*together)] == alone


def test_all_answers_capture_on_one_stream(pairs, card):
    """Bug: a stream for every answer, each with a workspace of cuBLAS that is never given back."""
    model = to_card(pairs("sdpa").ours, card)
    for _ in range(3):
        list(generate(model, prompts([[9]]), 4))
    assert len(card.graphs) == 3
    assert card.streams == [DEVICE]


@pytest.mark.parametrize("count", [1, 2])
def test_short_answers_capture_nothing(pairs, card, count):
    """Bug: an answer of two tokens waits for a graph that it never replays."""
    assert len(list(generate(to_card(pairs("sdpa").ours, card), prompts([[9]]), count))) == count
    assert card.graphs == []


def test_the_program_answers_on_a_card(card, monkeypatch, capsys):
    """Bug: only the parts run on a card, put together by hand. The answer is the one on the CPU."""
    assert program.main(["--device", "cpu", "--max-new-tokens", "6"]) == 0
    expected = capsys.readouterr().out

    def read(path, device):
        assert device == "cuda"
        return {name: OnCard(x, card) for name, x in read_weights(path, "cpu").items()}

    read_weights = load_weights.read_weights
    monkeypatch.setattr(load_weights, "read_weights", read)
    card.current = INDEX        # as after torch.cuda.set_device
    assert program.main(["--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == expected
    assert [graph.replays for graph in card.graphs] == [4]


# ---------------------------------------------------------------------------- what can't be done

def test_a_graph_on_the_cpu_is_refused(pairs):
    """Bug: torch's own AssertionError, after the prompt has been read."""
    with pytest.raises(ValueError, match="the model is on cpu, and only CUDA has graphs"):
        generate(pairs("sdpa").ours, prompts([[9]]), graph=True)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 130 MiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 136314880 bytes."),
    MemoryError(),
], ids=["cuda", "cpu", "python"])
@pytest.mark.parametrize("where, remedy", [
    ("load_model", "use --dtype bfloat16, a smaller checkpoint or a larger card"),
    ("generate", "use a smaller --max-pixels or --dtype bfloat16"),
])
def test_out_of_memory_says_what_helps(where, remedy, error, monkeypatch, capsys):
    """Bug: weights that are too large for the card get advice about pictures."""
    def full(*args, **settings):
        raise error

    monkeypatch.setattr(program, where, full)
    assert program.main([]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: out of memory; {remedy}"


def test_another_error_is_not_called_out_of_memory(monkeypatch):
    """Bug: advice about memory where something else is wrong, which nobody finds then."""
    def wrong(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (73x192 and 128x192)")

    monkeypatch.setattr(program, "load_model", wrong)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        program.main([])


# ---------------------------------------------------------------------------- kernels

def test_frequencies_are_computed_on_the_cpu(card):
    """Bug: powers of the card's own, whose last bits are others."""
    rope.inv_freq(128, 1e6, DEVICE)
    assert card.kernels == [aten._to_copy]


def test_a_step_of_the_7b_launches_no_more_kernels(tmp_path, monkeypatch):
    """Bug: casts and copies that creep in, a few in every layer, at 1 to 3 us each. From shapes alone."""
    config = load_config(write(tmp_path, flat("7B")))
    config = replace(config, vision=replace(config.vision, depth=1))
    with torch.device("meta"):
        model = Qwen2_5_VL(config).bfloat16()

    launched = {}
    with inserted(Card(inner="meta"), monkeypatch) as card, torch.inference_mode():
        model = to_card(model, card)
        cache = KVCache(config, 1, 2048, DEVICE, model.dtype)
        token = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
        position = torch.zeros_like(token)
        mask = torch.ones(1, 2048, dtype=torch.int64, device=DEVICE)

        decode_step(model, token, position, mask, cache)        # the first makes what is kept
        for name, visible in (("graph", mask), ("plain", None)):
            card.kernels.clear()
            decode_step(model, token, position, visible, cache)
            launched[name] = len(card.kernels)
    assert card.waits == []
    assert launched["graph"] <= 813
    assert launched["plain"] <= 692


def test_the_captured_step_attends_by_two_products(pairs, card):
    """Bug: the kernel for masks, which gives each key head one processor of the card."""
    model = to_card(pairs("sdpa").ours, card)
    list(generate(model, prompts([[9]]), 4))
    captured = [call[0] for call in card.graphs[0].calls]
    assert len(captured) > 100 and F.scaled_dot_product_attention not in captured

    # Without a graph there is no mask, and torch's kernels split the keys by themselves.
    card.kernels.clear()
    list(generate(model, prompts([[9]]), 4, graph=False))
    assert card.kernels.count(F.scaled_dot_product_attention) == 4 * model.config.num_hidden_layers
