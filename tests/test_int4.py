"""int4.py: weights in four bits are what an independent reader makes of them, and are used as such."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert import AutoAWQConverter
from conftest import assert_close, assert_equal, make_pair, prompts, small_config, write
from hugging_face import distance
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.quantizers import quantizer_awq

import generate
import int4
import load_weights
from int4 import Int4Linear, PackedLinear, has_kernel, unpack
from load_weights import load_config, load_model

AWQ = dict(
    bits=4, group_size=128, modules_to_not_convert=["visual"], quant_method="awq", version="gemm",
    zero_point=True,
)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)        # what the eight places of an int32 hold, lowest bits first


# ---------------------------------------------------------------------------- written by the test itself

def random_layer(K, N, bias=True, seed=0):
    """An Int4Linear of random words, in float16, as in a file."""
    generator = torch.Generator().manual_seed(seed)
    linear = Int4Linear(nn.Linear(K, N, bias=bias)).half().requires_grad_(False)
    for words in (linear.qweight, linear.qzeros):
        words.random_(-2**31, 2**31, generator=generator)
    linear.scales.uniform_(0.001, 0.02, generator=generator)
    return linear


def packed(numbers):
    """Numbers from 0 to 15 (rows, N), eight to an int32."""
    eights = numbers.long().unflatten(1, (-1, 8))[:, :, ORDER]
    words = (eights << torch.arange(0, 32, 4)).sum(dim=2)
    return (words - (words >> 31 << 32)).int()      # as int32 says it


def quantized(weight):
    """What a file holds in place of a weight (N, K): each scale covers its group's smallest and largest."""
    groups = weight.T.float().unflatten(0, (-1, 128))                       # (G, 128, N)
    low = groups.amin(dim=1, keepdim=True).clamp(max=0)
    high = groups.amax(dim=1, keepdim=True).clamp(min=0)

    scales = ((high - low) / 15).half()
    zeros = (-low / scales).round().clamp(0, 15)
    q = (groups / scales + zeros).round().clamp(0, 15)
    return dict(qweight=packed(q.flatten(0, 1)), qzeros=packed(zeros[:, 0]), scales=scales[:, 0])


def quantized_weights(model):
    """All tensors of a checkpoint: the decoder layers' matrices quantized, the rest in float16."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.layers.") and tensor.ndim == 2:
            layer = name.removesuffix("weight")
            weights |= {layer + part: value for part, value in quantized(tensor).items()}
        else:
            weights[name] = tensor.half()
    return weights


@pytest.fixture
def saved(tmp_path):
    """A directory in the form of the published AWQ checkpoints, and the dense model whose weights it has."""
    pair = make_pair(intermediate_size=512)
    write(tmp_path, small_config(intermediate_size=512) | dict(quantization_config=AWQ))
    save_file(quantized_weights(pair.ours), tmp_path / "model.safetensors")
    return tmp_path, pair.ours


# ---------------------------------------------------------------------------- one layer

def test_a_word_holds_eight_numbers():
    """Four bits that are taken for another number's."""
    assert_equal("four-bit words", unpack(torch.tensor([[0x75316420]], dtype=torch.int32)),
                 torch.arange(8, dtype=torch.uint8)[None])


@pytest.mark.parametrize("K, N", [(128, 8), (384, 48), (1024, 256)])
def test_weights_are_those_of_an_independent_reader(K, N):
    """Scrambled numbers, the 1 that GPTQ adds to its zeros, zeros left out: of random words, negative too."""
    linear = random_layer(K, N)
    assert linear.qweight.min() < 0 and linear.qzeros.min() < 0
    reader = AutoAWQConverter()
    read = reader.process({f"layer.{name}": tensor for name, tensor in linear.state_dict().items()})
    scheme = reader.update_config(None).config_groups["config_group_0"]
    theirs = PackedQuantizationCompressor.decompress(
        {name.removeprefix("layer."): tensor for name, tensor in read.items()}, scheme)
    assert_equal("four-bit weights", linear.weight(), theirs["weight"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("K, N", [(128, 16), (384, 48), (3584, 512)])
def test_the_kernel_computes_the_same(K, N, bias):
    """A shift of the wrong sign, numbers in an order that the kernel does not expect, a bias left out."""
    linear = random_layer(K, N, bias).float()
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1))
    assert_close("four-bit kernel", PackedLinear(linear)(x), linear(x))


class OnCuda(torch.Tensor):
    """Says that it is on a card."""
    device = torch.device("cuda")


def test_the_cards_kernel_gets_two_numbers_in_a_byte(monkeypatch):
    """Bug: the even input channel in the lower half, as on the CPU it would make no difference."""
    given = []

    def convert(halves, tiles):
        given.append(halves)
        return halves

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", convert)
    monkeypatch.setattr(int4, "unpack", lambda words: unpack(words).as_subclass(OnCuda))
    linear = random_layer(128, 8)
    PackedLinear(linear)
    channels = unpack(linear.qweight).T
    assert torch.equal(given[0] // 16, channels[:, 0::2])
    assert torch.equal(given[0] % 16, channels[:, 1::2])


# ---------------------------------------------------------------------------- a model

def test_logits_are_those_of_a_dense_model_with_the_same_weights(saved, monkeypatch):
    """A layer that is not converted, packed with another's tensors, or loaded in a dtype that loses some."""
    directory, dense = saved
    inputs = prompts([[4, (8, 12), 3], [6, (2, 8, 12, 1.0), 2]])
    model = load_model(directory, "cpu", "float32")
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 7 * 4

    # The same without the kernel, and a dense model with the weights that its layers make.
    monkeypatch.setattr(load_weights, "pack", lambda model: None)
    plain = load_model(directory, "cpu", "float32")
    weights = plain.state_dict()
    for name, linear in plain.named_modules():
        if isinstance(linear, Int4Linear):
            weights[f"{name}.weight"] = linear.weight()
            for packed in ("qweight", "qzeros", "scales"):
                del weights[f"{name}.{packed}"]
    dense.load_state_dict(weights)
    expected = dense(**inputs)
    assert_equal("logits of four-bit weights, in plain torch", plain(**inputs), expected)
    assert_close("logits of four-bit weights", model(**inputs), expected, inputs["attention_mask"])


def test_numbers_are_bfloat16_by_themselves(saved):
    """The files say float16, which overflows in the vision tower."""
    directory, _ = saved
    model = load_model(directory, "cpu")
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    exact = load_model(directory, "cpu", "float32")
    inputs = prompts([[4, (8, 12), 3]])
    assert distance(model(**inputs).float(), exact(**inputs)) < 0.1


def test_bytes_before_the_answer_count_four_bits(saved):
    """Packed weights are no parameters; without them the 32B would be said to take 4 GB."""
    directory, dense = saved

    # Two bytes for each number; in four bits half of one, and two numbers more for 128 of them.
    expected = 0
    for name, p in dense.named_parameters():
        expected += 2 * p.numel()
        if name.startswith("model.layers.") and p.ndim == 2:
            expected -= (2 - 1 / 2 - 4 / 128) * p.numel()

    line = generate.line_before(load_model(directory, "cpu"), prompts([[4]]), 8)
    assert f"weights {expected / 1e9:.3f} GB" in line


@pytest.mark.parametrize("change, message", [
    (dict(quant_method="gptq"), "quant_method 'gptq' is not supported"),
    (dict(bits=8), "bits 8 is not supported"),
    (dict(group_size=64), "group_size 64 is not supported"),
    (dict(version="gemv"), "version 'gemv' is not supported"),
    (dict(zero_point=False), "zero_point False is not supported"),
])
def test_what_is_not_computed_is_refused_by_name(change, message, tmp_path):
    """Other bits, groups, versions and quantizers, read as if they were these."""
    config = small_config(intermediate_size=512) | dict(quantization_config=AWQ | change)
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, config))


@pytest.mark.parametrize("name, tensor, message", [
    ("model.layers.1.mlp.up_proj.qzeros", None, r"Missing key\(s\).*layers.1.mlp.up_proj.qzeros"),
    ("model.layers.1.mlp.up_proj.g_idx", torch.zeros(256), "its .*up_proj.g_idx is not a name in this model"),
    ("model.layers.1.mlp.up_proj.qweight", torch.zeros(32, 512).int(), "size mismatch.*up_proj.qweight"),
    ("lm_head.qweight", torch.zeros(256, 64).int(), "its lm_head.qweight is not a name in this model"),
])
def test_tensors_that_do_not_fit_are_refused(saved, name, tensor, message):
    """Zeros that are missing, a permutation that is not applied, GPTQ's shape, a head in four bits."""
    directory, dense = saved
    weights = quantized_weights(dense)
    weights.pop(name, None)
    if tensor is not None:
        weights[name] = tensor
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(directory, "cpu")


def test_groups_that_do_not_divide_are_refused():
    """As in half of an MLP of width 29568; or channels that don't fill their last word."""
    for K, N in ((14784, 8192), (128, 12)):
        with pytest.raises(ValueError, match=f"{K} x {N}: four-bit weights come in groups of 128 x 8"):
            Int4Linear(nn.Linear(K, N, device="meta"))


@pytest.mark.parametrize("device, dtype, capability, N, has", [
    ("cpu", torch.float32, None, 48, True),
    ("cpu", torch.float32, None, 24, False),
    ("cuda", torch.bfloat16, (8, 0), 8, True),
    ("cuda", torch.bfloat16, (7, 5), 8, False),
    ("cuda", torch.float32, (9, 0), 8, False),
    ("mps", torch.bfloat16, None, 16, False),
])
def test_the_kernel_is_used_where_torch_has_it(device, dtype, capability, N, has, monkeypatch):
    """Bug: a card that is too old, or a device of another kind, ends in a traceback of torch's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    scales = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(3, N))
    assert has_kernel(SimpleNamespace(scales=scales)) == has


# ---------------------------------------------------------------------------- Hugging Face

class Stub(nn.Module):
    """In place of GPTQModel's layer, which is not installed here: the tensors, and no arithmetic."""

    def __init__(self, in_features, out_features, bias, **settings):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(in_features, out_features // 8, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(in_features // 128, out_features // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(in_features // 128, out_features, dtype=torch.float16))
        if bias:
            self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float16))


@pytest.fixture
def gptqmodel(monkeypatch):
    """What Hugging Face's AWQ loader imports, as far as it needs it to choose layers and fill them."""
    for name, content in {
        "gptqmodel": {},
        "gptqmodel.quantization": dict(METHOD=SimpleNamespace(AWQ="awq")),
        "gptqmodel.quantization.awq.modules.act": dict(ScaledActivation=None),
        "gptqmodel.utils.importer": dict(hf_select_quant_linear_v2=lambda **settings: Stub),
        "gptqmodel.utils.model": dict(hf_gptqmodel_post_init=lambda model, **settings: model),
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(quantizer_awq, "is_gptqmodel_available", lambda: True)
    monkeypatch.setattr(quantizer_awq, "is_accelerate_available", lambda: True)


@pytest.mark.parametrize("kept, missing, unexpected", [("visual", 66, 22), ("model.visual", 0, 0)])
def test_hugging_face_converts_the_tower_of_published_checkpoints(
    saved, gptqmodel, kept, missing, unexpected
):
    """transformers 5.23.0 looks for `visual` at the start of names, but calls the tower model.visual: all its
    layers become four-bit ones, and none finds its weights. It warns, and answers.
    """
    directory, _ = saved
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = [kept]
    _, found = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        write(directory, config), output_loading_info=True)
    assert len(found["missing_keys"]) == missing and len(found["unexpected_keys"]) == unexpected
    assert all("visual" in name for name in found["missing_keys"] | found["unexpected_keys"])
