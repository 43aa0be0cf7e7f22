"""Checkpoints: the published family, the dialects of config.json, and files that must not load."""

import json
import os
import re
import shutil

import pytest
import torch
from conftest import FAMILY, TINY, VISION, assert_equal, flat, make_pair, prompts, write
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import load_weights
import vision
from load_weights import (
    checkpoint,
    load_config,
    load_generation_config,
    load_model,
    load_processor,
    published_name,
)
from model import Qwen2_5_VL
from processing import Processor

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


# ---------------------------------------------------------------------------- config.json

@pytest.mark.parametrize("size", FAMILY)
def test_names_shapes_and_bytes_are_as_published(size, tmp_path):
    """Bugs: a bias too many or too few, another width, a head of its own where it is tied."""
    config = load_config(write(tmp_path, flat(size)))
    with torch.device("meta"):
        ours = Qwen2_5_VL(config).state_dict()
        hf = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**flat(size)))
    theirs = {published_name(name): p for name, p in hf.state_dict().items()}
    if config.tie_word_embeddings:
        theirs.pop("lm_head.weight")

    our_shapes = {name: p.shape for name, p in ours.items()}
    their_shapes = {name: p.shape for name, p in theirs.items()}
    assert_equal("names and shapes of parameters, 3B to 72B", our_shapes, their_shapes)
    assert sum(2 * p.numel() for p in ours.values()) == FAMILY[size].nbytes
    assert FAMILY[size].tensors in (None, len(ours))


def test_missing_keys_fall_back_on_the_published_values(tmp_path):
    """Bug: what a config leaves out, as the published 32B its windows and full blocks, comes from the
    defaults of Hugging Face's classes (no full blocks, eps 1e-5, 4 per second).
    """
    vision = VISION | dict(intermediate_size=3456, out_hidden_size=5120)
    full = load_config(write(tmp_path, flat("32B") | dict(vision_config=vision)))

    sparse = flat("32B")
    for key in ("rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings", "image_token_id",
                "video_token_id", "tie_word_embeddings"):
        del sparse[key]
    for key in ("tokens_per_second", "in_chans"):
        del sparse["vision_config"][key]
    assert load_config(write(tmp_path, sparse)) == full


@pytest.mark.parametrize("size", FAMILY)
def test_dialects_agree(size, tmp_path):
    """Bug: in a file nested as transformers 5 saves it, rope_theta or the tie is not found where it went."""
    ours = load_config(write(tmp_path, flat(size)))
    Qwen2_5_VLConfig(**flat(size)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved["text_config"]
    assert "rope_theta" not in saved["text_config"]
    assert load_config(tmp_path) == ours

    # Of two ties the one at the top is right; one that stands below counts, too.
    saved["text_config"]["tie_word_embeddings"] = False
    assert load_config(write(tmp_path, saved)) == ours
    saved["text_config"]["tie_word_embeddings"] = saved.pop("tie_word_embeddings")
    assert load_config(write(tmp_path, saved)) == ours


def test_channels_have_two_names(tmp_path):
    """Bug: in_channels, as transformers 5 writes it, is passed over, and three are as good as any."""
    vision = flat("7B")["vision_config"]
    del vision["in_chans"]
    config = flat("7B") | dict(vision_config=vision | dict(in_channels=1))
    assert load_config(write(tmp_path, config)).vision.in_chans == 1


def test_nulls_say_nothing(tmp_path):
    """Bug: a null hides what another level says, or the value that all published checkpoints share."""
    config = flat("7B")
    ours = load_config(write(tmp_path, config))
    nulls = dict(
        text_config=dict(hidden_size=None, rope_theta=None),
        vision_config=config["vision_config"] | dict(window_size=None, hidden_act=None),
        rope_parameters=None,
        rms_norm_eps=None,
        quantization_config=None,
    )
    assert load_config(write(tmp_path, config | nulls)) == ours


def tower(**changes):
    """The 7B's vision_config with changes."""
    return dict(vision_config=flat("7B")["vision_config"] | changes)


@pytest.mark.parametrize("change, message", [
    (dict(quantization_config=dict(quant_method="gptq")), "quant_method 'gptq' is not supported"),
    (dict(use_sliding_window=True), "use_sliding_window True is not supported"),
    (dict(rope_scaling=dict(type="yarn", mrope_section=[16, 24, 24])), "rope_type 'yarn' is not supported"),
    (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    (dict(hidden_size=None), "no hidden_size in it; it must be an integer from 0 up"),
    (dict(num_attention_heads=56), "must add up to half of hidden_size / num_attention_heads, 3584 / 56"),
    (dict(num_attention_heads=0), "num_attention_heads 0 must be a multiple of num_key_value_heads 4"),
    (dict(num_key_value_heads=0), "heads 28 must be a multiple of num_key_value_heads 0; compare it"),
    (dict(num_key_value_heads=3), "heads 28 must be a multiple of num_key_value_heads 3; compare it"),
    (dict(rope_scaling=dict(mrope_section=[16, 24, 25])), "mrope_section (16, 24, 25) must add up to half"),
    (dict(rope_scaling=dict(mrope_section=[32, 32])), "mrope_section (32, 32) must be three numbers"),
    (dict(rope_scaling=dict(mrope_section=[-16, 40, 40])), "mrope_section cannot be [-16, 40, 40]"),
    (tower(out_hidden_size=2048), "vision out_hidden_size 2048 must equal hidden_size 3584; compare it"),
    (tower(window_size=0), "window_size 0 must be a multiple of patch_size x spatial_merge_size, 28"),
    (tower(patch_size=0), "window_size 112 must be a multiple of patch_size x spatial_merge_size, 0"),
    (tower(window_size=100), "window_size 100 must be a multiple of patch_size x spatial_merge_size, 28"),
    (tower(num_heads=0), "vision hidden_size 1280 must be a multiple of 4 x num_heads 0; compare it"),
    (tower(num_heads=640), "vision hidden_size 1280 must be a multiple of 4 x num_heads 640; compare it"),
    (tower(num_heads=3), "vision hidden_size 1280 must be a multiple of 4 x num_heads 3; compare it"),
    (dict(vision_config="none"), "vision_config cannot be 'none'"),
    (dict(num_hidden_layers="28"), "num_hidden_layers cannot be '28'; it must be an integer"),
    (dict(num_hidden_layers=True), "num_hidden_layers cannot be True; it must be an integer"),
    (dict(tie_word_embeddings="no"), "tie_word_embeddings cannot be 'no'"),
])
def test_wrong_config_is_refused(change, message, tmp_path):
    """Bug: something else than it asks for is computed."""
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(write(tmp_path, flat("7B") | change))


# ---------------------------------------------------------------------------- generation_config.json

@pytest.mark.parametrize("saved, expected", [
    (dict(do_sample=True, temperature=1e-6, repetition_penalty=1.05, eos_token_id=[5, 6], pad_token_id=6),
     dict(temperature=1e-6, top_k=50, top_p=1.0, repetition_penalty=1.05, eos_token_id=(5, 6),
          pad_token_id=6)),
    (dict(do_sample=True, temperature=None, top_p=0.8, eos_token_id=5, pad_token_id=6),
     dict(temperature=1.0, repetition_penalty=1.0, top_p=0.8, top_k=50, eos_token_id=5, pad_token_id=6)),
    (dict(eos_token_id=5, temperature=0.7),
     dict(temperature=0.0, repetition_penalty=1.0, eos_token_id=5, pad_token_id=0)),
])
def test_generation_defaults_equal_hugging_face(saved, expected, tmp_path):
    """Bugs: sampling without do_sample, all tokens kept where Hugging Face's default keeps 50."""
    write(tmp_path, saved, "generation_config.json")
    assert load_generation_config(tmp_path) == expected


@pytest.mark.parametrize("config", [dict(eos_token_id=7), dict(text_config=dict(eos_token_id=7))], ids=str)
def test_end_token_falls_back_on_config(config, tmp_path):
    """Bug: without a generation_config.json no token ends an answer."""
    assert load_generation_config(write(tmp_path, config))["eos_token_id"] == 7


@pytest.mark.parametrize("change, message", [
    (dict(temperature="hot"), "temperature cannot be 'hot'"),
    (dict(top_k=2.5), "top_k cannot be 2.5"),
    (dict(eos_token_id=[1, "2"]), "eos_token_id cannot be [1, '2']; it must be a list of integers"),
])
def test_settings_must_be_numbers(tmp_path, change, message):
    """Bug: they break the loop, or an end token is never met."""
    write(tmp_path, dict(do_sample=True) | change, "generation_config.json")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_generation_config(tmp_path)


# ---------------------------------------------------------------------------- the processor

@pytest.fixture
def copy(tmp_path):
    """A directory to change: all as published but the vocabulary, which takes a second to read."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(TINY / name, tmp_path)
    return write(tmp_path, {}, "preprocessor_config.json")


def test_settings_of_transformers_5_are_read(copy):
    """Bug: limits that stand in processor_config.json, as edges of a size, are not found."""
    picture = dict(size=dict(shortest_edge=784, longest_edge=7840), image_mean=[0.5] * 3, image_std=[0.5] * 3)
    video = dict(size=dict(shortest_edge=1568, longest_edge=15680))
    write(copy, dict(image_processor=picture, video_processor=video), "processor_config.json")
    (copy / "preprocessor_config.json").unlink()

    processor = load_processor(copy)
    assert (processor.min_pixels, processor.max_pixels) == (784, 7840)
    assert (processor.video_min_pixels, processor.video_max_pixels) == (1568, 15680)
    white = {"image": Image.new("RGB", (56, 56), "white")}
    pixels = processor([{"role": "user", "content": [white]}])["pixel_values"]
    assert pixels.unique().tolist() == [1.0]


def test_settings_of_transformers_4_are_read(copy):
    """Bug: limits by name, or those in a video's own file, are not found; a null counts as one."""
    write(copy, dict(min_pixels=784, max_pixels=7840, size=None), "preprocessor_config.json")
    write(copy, dict(size=dict(shortest_edge=1568, longest_edge=15680)), "video_preprocessor_config.json")
    processor = load_processor(copy)
    assert (processor.min_pixels, processor.max_pixels) == (784, 7840)
    assert (processor.video_min_pixels, processor.video_max_pixels) == (1568, 15680)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_processor_needs_its_files(copy, name):
    """Bug: without one of them it goes by assumptions, or ends in a traceback."""
    (copy / name).unlink()
    with pytest.raises((OSError, ValueError), match=f"/{name}: .*[Nn]o such file"):
        load_processor(copy)


@pytest.mark.parametrize("name, content, message", [
    ("preprocessor_config.json", dict(patch_size=16), "patch_size 16 is not supported"),
    ("preprocessor_config.json", dict(temporal_patch_size=1), "temporal_patch_size 1 is not supported"),
    ("preprocessor_config.json", dict(merge_size="2"), "merge_size '2' is not supported"),
    ("preprocessor_config.json", dict(image_mean=[0.5, "x"]), "image_mean cannot be [0.5, 'x']"),
    ("preprocessor_config.json", dict(size=5), "size cannot be 5"),
    ("tokenizer.json", {}, "tokenizer.json: not a tokenizer"),
    ("tokenizer.json", json.loads(Tokenizer(models.BPE()).to_str()), "no <|endoftext|> in it; is it Qwen2.5"),
])
def test_wrong_processor_is_refused(copy, name, content, message):
    """Bug: pictures are cut into patches that the model does not know, or it ends in a traceback."""
    write(copy, content, name)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_processor(copy)


def test_limits_are_the_published_ones(copy):
    """Bug: without limits in the files, those of Hugging Face's classes, or others."""
    processor = load_processor(copy)
    assert (processor.min_pixels, processor.max_pixels) == (3136, 12_845_056)
    assert (processor.video_min_pixels, processor.video_max_pixels) == (100_352, 0)
    assert Processor(processor.tokenizer, 14, 2, 2) == processor        # by itself it has the same


def test_limits_must_leave_room(copy):
    """Bug: no picture fits, and the first one ends in a division by zero."""
    for low in (-1, 0, 10):
        with pytest.raises(ValueError, match=f"max_pixels 9: must be above 0 and at least min_pixels, {low}"):
            load_processor(copy, min_pixels=low, max_pixels=9)

    # Both the same is room enough for one size.
    processor = load_processor(copy, min_pixels=3136, max_pixels=3136)
    assert (processor.min_pixels, processor.max_pixels) == (3136, 3136)


# ---------------------------------------------------------------------------- the weights

@pytest.fixture
def saved(tmp_path):
    """A directory with the seeded model, written by Hugging Face in two or more shards; and that model."""
    pair = make_pair()
    pair.hf.save_pretrained(tmp_path, max_shard_size="6MB")
    assert (tmp_path / SHARD).exists()
    return tmp_path, pair


def merge(directory):
    """The shards as one file."""
    weights = {}
    for file in directory.glob("*.safetensors"):
        weights |= load_file(file)
        file.unlink()
    (directory / INDEX).unlink()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return weights


def same(a, b):
    inputs = prompts([[4, (8, 12), 3]])
    return torch.equal(a(**inputs), b(**inputs))


def test_shards_one_file_and_live_names_agree(saved):
    """Bug: weights under the names inside Hugging Face's live module, or in shards, are not found."""
    directory, pair = saved
    assert same(load_model(directory), pair.ours)
    merge(directory)
    assert same(load_model(directory), pair.ours)
    save_file(pair.hf.state_dict(), directory / "model.safetensors")
    assert same(load_model(directory), pair.ours)


def test_one_file_comes_before_an_index(saved):
    """Bug: an index that was left beside it names shards that are gone. Hugging Face's order."""
    directory, pair = saved
    index = (directory / INDEX).read_text()
    merge(directory)
    (directory / INDEX).write_text(index)
    assert same(load_model(directory), pair.ours)


def test_float16_is_not_computed_in(saved):
    """Bug: a checkpoint in float16 is taken as it is, and overflows in the vision tower."""
    directory, _ = saved
    weights = merge(directory)
    save_file({name: p.half() for name, p in weights.items()}, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        config.pop(name, None)
    write(directory, config)
    with pytest.raises(ValueError, match="weights are torch.float16; give dtype bfloat16 or float32"):
        load_model(directory)
    write(directory, config | dict(dtype="float16"))
    with pytest.raises(ValueError, match="dtype float16: use bfloat16 or float32"):
        load_model(directory)
    assert load_model(directory, dtype="float32").dtype == torch.float32


def test_model_is_ready_to_answer(saved):
    """Bug: it is left in training mode, keeps gradients, or has another dtype than was asked for."""
    directory, _ = saved
    model = load_model(directory, device="cpu", dtype="bfloat16", attention="eager")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {module.attend for module in model.modules() if hasattr(module, "attend")} == {vision.eager}
    assert not torch.backends.cuda.cudnn_sdp_enabled()      # it would make a plan for each new length


def test_defaults_are_the_checkpoints_own(saved):
    """Bugs: the attention that is written out where the fused one was meant, another dtype or device."""
    model = load_model(saved[0])
    assert {module.attend for module in model.modules() if hasattr(module, "attend")} == {vision.sdpa}
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize("name, tensor, message", [
    ("visual.merger.ln_q.weight", None, r"Missing key\(s\) .*visual.merger.ln_q.weight"),
    ("extra", torch.zeros(1), "its extra is not a name in this model"),
    ("model.norm.weight", torch.zeros(3), "size mismatch for model.norm.weight.*the same checkpoint"),
    ("model.norm.weight", torch.ones(256, dtype=torch.int8),
     "model.norm.weight.*Only Tensors of floating point.*the same checkpoint"),
])
def test_every_tensor_must_fit(saved, name, tensor, message):
    """Bug: a tensor that has no place, or a place that has no tensor, is passed over."""
    directory, _ = saved
    weights = merge(directory)
    weights.pop(name, None)
    if tensor is not None:
        weights[name] = tensor
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(directory)


def test_tied_head_is_the_embedding(saved):
    """Bug: a head of its own is loaded beside the tie, or passed over."""
    directory, _ = saved
    config = json.loads((directory / "config.json").read_text())
    write(directory, config | dict(tie_word_embeddings=True))
    weights = merge(directory)
    head = {HEAD: weights.pop(HEAD)}
    embedding = {EMBEDDING: weights.pop(EMBEDDING)}

    def load(changed):
        save_file(weights | changed, directory / "model.safetensors")
        return load_model(directory)

    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load(head | embedding)

    # An equal head is as good as none, and as the embedding.
    inputs = prompts([[9]])
    equal = load(embedding | {HEAD: embedding[EMBEDDING].clone()})(**inputs)
    assert torch.equal(equal, load(embedding)(**inputs))
    assert torch.equal(equal, load({HEAD: embedding[EMBEDDING]})(**inputs))


@pytest.mark.parametrize("name, content, error, message", [
    ("config.json", None, OSError, "config.json: no such file"),
    ("config.json", "{", ValueError, "config.json: not JSON"),
    ("config.json", "[]", ValueError, "config.json: not a JSON object"),
    (INDEX, "{}", ValueError, "no weight_map in it; it must be an object"),
    (INDEX, '{"weight_map": {"a": "../b"}}', ValueError, "../b is not a file beside it"),
    (INDEX, '{"weight_map": {"a": ".."}}', OSError, "shards are missing: .."),
    (SHARD, None, OSError, f"missing: {SHARD}"),
])
def test_damaged_checkpoint_is_refused(saved, name, content, error, message):
    """Bug: it ends in a traceback, or files outside the directory are read."""
    directory, _ = saved
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_text(content)
    with pytest.raises(error, match=re.escape(message)):
        load_model(directory)


def test_weights_must_be_whole_safetensors(saved):
    """Bug: a download that broke off ends in a traceback, or a pickle is opened."""
    directory, _ = saved
    merge(directory)
    file = directory / "model.safetensors"
    os.truncate(file, 5000)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_model(directory)

    for suffix in (".bin", ".pt", ".pth", ".ckpt"):
        file = file.rename(directory / f"model{suffix}")
        with pytest.raises(ValueError, match=rf"only pickled weights \(model{suffix}\)"):
            load_model(directory)

    file.unlink()
    with pytest.raises(OSError, match="neither model.safetensors nor an index"):
        load_model(directory)


@pytest.mark.parametrize("device", ["cuda:99", "mps", "xpu", "hpu", "meta", "card"])
def test_missing_device_is_refused(device):
    """Bugs: torch's own error after all weights have been read; a device that torch knows by another name is
    refused without a try; on the meta device an answer of nothing.
    """
    with pytest.raises(ValueError, match=f"device {device}: not available here .*; use cpu, or") as error:
        load_model("tiny", device)
    assert "\n" not in str(error.value)
    assert load_model("tiny", torch.device("cpu")).device.type == "cpu"


@pytest.mark.parametrize("settings, message", [
    (dict(attention="flash"), "attention flash: use sdpa or eager"),
    (dict(dtype=torch.float16), "dtype torch.float16: use bfloat16 or float32; float16 overflows"),
])
def test_unknown_attention_and_dtype_are_refused(settings, message):
    """Bug: another attention, or numbers that overflow."""
    with pytest.raises(ValueError, match=message):
        load_model("tiny", **settings)


def anonymous_bytes():
    """Memory of the process's own, mapped files aside."""
    with open(f"/proc/{os.getpid()}/status") as status:
        (line,) = [line for line in status if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def test_weights_stay_in_the_file(tmp_path):
    """Bug: loading copies them. Mapped, less than a tenth of the file becomes memory of the process's own."""
    pair = make_pair(vocab_size=80_000)
    pair.hf.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 150e6

    before = anonymous_bytes()
    model = load_model(tmp_path, device="cpu")
    assert anonymous_bytes() - before < 0.1 * size
    assert same(model, pair.ours)


# ---------------------------------------------------------------------------- where a checkpoint is

@pytest.mark.parametrize("name", ["nothing", "./no/where", "/nowhere", ""])
def test_missing_checkpoint_is_refused(name):
    """Bug: it is taken for one without settings, whose answers never end."""
    message = f"{name}: no such directory; give a checkpoint's directory or a hub id"
    with pytest.raises(OSError, match=message):
        checkpoint(name)
    with pytest.raises(OSError, match=message):
        load_generation_config(name)


def test_adapter_beside_whole_weights_is_no_obstacle(saved):
    """Bug: a checkpoint into which an adapter was merged is refused for the file that it left."""
    directory, pair = saved
    write(directory, {}, "adapter_config.json")
    assert same(load_model(directory), pair.ours)


def test_hub_gives_no_pickles(tmp_path, monkeypatch):
    """Bug: pickles are downloaded, too."""
    asked = {}

    def download(name, **settings):
        asked[name] = settings
        return str(tmp_path)

    monkeypatch.setattr(load_weights, "snapshot_download", download)
    assert checkpoint("Qwen/Qwen2.5-VL-3B-Instruct") == tmp_path
    patterns = ["*.safetensors", "*.json", "*.jinja"]
    assert asked == {"Qwen/Qwen2.5-VL-3B-Instruct": dict(allow_patterns=patterns)}


def test_hub_failure_is_an_oserror(monkeypatch):
    """Bug: an exception of the hub's library or its transport ends in a traceback."""
    def dropped(name, **settings):
        raise RuntimeError("Server disconnected without sending a response.")

    monkeypatch.setattr(load_weights, "snapshot_download", dropped)
    with pytest.raises(OSError, match=r"Qwen/Nowhere: not a directory here.*\(Server disconnected"):
        checkpoint("Qwen/Nowhere")
