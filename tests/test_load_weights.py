"""Checkpoints: the published family, three dialects of config.json, and files that must not load."""

import json
import os

import pytest
import torch
from conftest import assert_equal, make_pair, prompts
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import load_weights
from load_weights import checkpoint, load_config, load_generation_config, load_model, published_name
from model import Qwen2_5_VL

# Published numbers: hidden, layers, heads, key heads, MLP, vocabulary, tied; vision MLP; bytes in bfloat16,
# tensors.
FAMILY = {
    "3B": (2048, 36, 16, 2, 11008, 151936, True, 3420, 7_509_245_952, 824),
    "7B": (3584, 28, 28, 4, 18944, 152064, False, 3420, 16_584_333_312, 729),
    "32B": (5120, 64, 40, 8, 27648, 152064, False, 3456, 66_905_436_672, None),
    "72B": (8192, 80, 64, 8, 29568, 152064, False, 3456, 146_821_554_688, 1353),
}
COMMON = dict(
    model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"], hidden_act="silu",
    rms_norm_eps=1e-6, rope_theta=1000000.0, max_position_embeddings=128000, use_sliding_window=False,
    sliding_window=32768, image_token_id=151655, video_token_id=151656, vision_start_token_id=151652,
    vision_end_token_id=151653, torch_dtype="bfloat16",
)
VISION = dict(
    depth=32, hidden_act="silu", hidden_size=1280, num_heads=16, patch_size=14, spatial_merge_size=2,
    window_size=112, spatial_patch_size=14, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2,
    temporal_patch_size=2, in_chans=3,
)


INDEX = "model.safetensors.index.json"


def flat(size):
    """config.json as it was published; the 32B's leaves out most of the vision config."""
    hidden, layers, heads, kv, mlp, vocabulary, tied, vision_mlp, *_ = FAMILY[size]
    vision = VISION | dict(intermediate_size=vision_mlp, out_hidden_size=hidden)
    rope = dict(type="mrope", mrope_section=[16, 24, 24])
    if size == "32B":
        kept = ("hidden_size", "in_chans", "intermediate_size", "out_hidden_size", "spatial_patch_size",
                "tokens_per_second")
        vision = {key: vision[key] for key in kept} | dict(model_type="qwen2_5_vl")
        rope = dict(rope_type="default", type="default", mrope_section=[16, 24, 24])
    return COMMON | dict(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=mlp, vocab_size=vocabulary, tie_word_embeddings=tied, vision_config=vision,
        rope_scaling=rope)


def write(directory, config, name="config.json"):
    (directory / name).write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("size", FAMILY)
def test_names_shapes_or_bytes_not_as_published(size, tmp_path):
    config = load_config(write(tmp_path, flat(size)))
    with torch.device("meta"):
        ours = Qwen2_5_VL(config).state_dict()
        hf = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**flat(size)))
        theirs = {published_name(name): p for name, p in hf.state_dict().items()}
    if config.tie_word_embeddings:
        theirs.pop("lm_head.weight")
    assert_equal("names and shapes of parameters, 3B to 72B",
                 {name: p.shape for name, p in ours.items()}, {name: p.shape for name, p in theirs.items()})
    *_, size_in_bytes, tensors = FAMILY[size]
    assert sum(2 * p.numel() for p in ours.values()) == size_in_bytes
    assert tensors in (None, len(ours))


def test_sparse_config_read_as_having_no_windows(tmp_path):
    """What a config leaves out, as the published 32B its windows and full blocks, is as in all others, not as
    in Hugging Face's classes (eps 1e-5, 4 per second).
    """
    full = flat("32B") | dict(vision_config=VISION | dict(intermediate_size=3456, out_hidden_size=5120))
    sparse = flat("32B")
    for key in ("rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings", "image_token_id"):
        del sparse[key]
    del sparse["vision_config"]["tokens_per_second"]
    assert load_config(write(tmp_path, sparse)) == load_config(write(tmp_path, full))


@pytest.mark.parametrize("size", FAMILY)
def test_dialect_read_otherwise(size, tmp_path):
    """Flat as published, and nested as transformers 5 saves it, where rope_theta and the tie have moved."""
    ours = load_config(write(tmp_path, flat(size)))
    Qwen2_5_VLConfig(**flat(size)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved["text_config"] and "rope_theta" not in saved["text_config"]
    assert load_config(tmp_path) == ours
    saved["text_config"]["tie_word_embeddings"] = False         # what stands at the top is right
    assert load_config(write(tmp_path, saved)) == ours
    saved["text_config"]["tie_word_embeddings"] = saved.pop("tie_word_embeddings")
    assert load_config(write(tmp_path, saved)) == ours


@pytest.mark.parametrize("change, message", [
    (dict(quantization_config=dict(quant_method="awq")), "quant_method 'awq' is not supported"),
    (dict(use_sliding_window=True), "use_sliding_window"),
    (dict(rope_scaling=dict(type="yarn", factor=4.0, mrope_section=[16, 24, 24])),
     "rope_type 'yarn' is not supported"),
    (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    (dict(hidden_size=None), "no hidden_size; download it again"),
    (dict(num_attention_heads=28 * 2), "half of hidden_size / num_attention_heads"),
    (dict(num_attention_heads=0), "num_attention_heads must be a multiple"),
    (dict(num_key_value_heads=3), "num_attention_heads must be a multiple of num_key_value_heads"),
    (dict(rope_scaling=dict(mrope_section=[16, 24, 25])), "mrope_section must be three numbers that add up"),
    (dict(rope_scaling=dict(mrope_section=[32, 32])), "mrope_section must be three numbers that add up"),
    (dict(rope_scaling=dict(mrope_section=[-16, 40, 40])), r"mrope_section cannot be \[-16, 40, 40\]"),
    (dict(vision_config=VISION | dict(intermediate_size=3420, out_hidden_size=2048)),
     "vision out_hidden_size must equal hidden_size; download it again"),
    (dict(vision_config=VISION | dict(intermediate_size=3420, out_hidden_size=3584, window_size=0)),
     "window_size must be a multiple of patch_size x spatial_merge_size"),
    (dict(vision_config="none"), "vision_config cannot be 'none'"),
    (dict(num_hidden_layers="28"), "num_hidden_layers cannot be '28'; download it again"),
    (dict(tie_word_embeddings="no"), "tie_word_embeddings cannot be 'no'"),
])
def test_config_computed_wrongly_instead_of_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, flat("7B") | change))


@pytest.fixture
def saved(tmp_path):
    """A directory with the seeded model, written by Hugging Face in two or more shards; and that model."""
    pair = make_pair()
    pair.hf.save_pretrained(tmp_path, max_shard_size="6MB")
    assert (tmp_path / INDEX).exists()
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


def test_shards_or_live_names_not_found(saved):
    """Shards, one file, and the names inside Hugging Face's live module, all give the same model."""
    directory, pair = saved
    assert same(load_model(directory), pair.ours)
    merge(directory)
    assert same(load_model(directory), pair.ours)
    save_file(pair.hf.state_dict(), directory / "model.safetensors")
    assert same(load_model(directory), pair.ours)


def test_left_in_training_mode(saved):
    model = load_model(saved[0], device="cpu", dtype="bfloat16", attention="eager")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("visual.merger.ln_q.weight"), r"Missing key\(s\) .*visual.merger.ln_q.weight"),
    (lambda w: w.update(extra=torch.zeros(1)), r"Unexpected key\(s\) .*extra"),
    (lambda w: w.update({"model.norm.weight": torch.zeros(3)}),
     "size mismatch for model.norm.weight.*one checkpoint"),
    (lambda w: w.update({"model.norm.weight": torch.ones(256, dtype=torch.int8)}),
     r"model.norm.weight.*Only Tensors of floating point.*one checkpoint"),
])
def test_tensor_never_loaded(saved, change, message):
    directory, _ = saved
    weights = merge(directory)
    change(weights)
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(directory)


def test_tied_head_silently_untied(saved):
    directory, _ = saved
    config = json.loads((directory / "config.json").read_text())
    write(directory, config | dict(tie_word_embeddings=True))
    weights = merge(directory)
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_model(directory)
    no_embedding = {name: p for name, p in weights.items() if "embed_tokens" not in name}
    save_file(no_embedding, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"Missing key\(s\) .*model.embed_tokens.weight"):
        load_model(directory)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, directory / "model.safetensors")
    tied = load_model(directory)
    del weights["lm_head.weight"]
    save_file(weights, directory / "model.safetensors")
    assert same(tied, load_model(directory))


@pytest.mark.parametrize("damage, error, message", [
    (lambda d: os.truncate(next(d.glob("*.safetensors")), 5000), ValueError, "not a whole safetensors file"),
    (lambda d: [f.rename(d / "model.bin") for f in d.glob("*.safetensors*")], ValueError,
     r"only pickled weights \(model.bin\)"),
    (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "../b"}}'), ValueError, "not a file beside it"),
    (lambda d: next(d.glob("*-00002-*")).unlink(), OSError, "model-00002-of-.*safetensors are missing"),
    (lambda d: [f.unlink() for f in d.glob("*.safetensors*")], OSError,
     "neither model.safetensors nor an index"),
    (lambda d: (d / "config.json").unlink(), OSError, "config.json: no such file"),
    (lambda d: (d / "config.json").write_text("{"), ValueError, "config.json: not a JSON object"),
    (lambda d: (d / "config.json").write_text("[]"), ValueError, "config.json: not a JSON object"),
    (lambda d: (d / INDEX).write_text("{}"), ValueError, "no weight_map; download it again"),
    (lambda d: (d / INDEX).write_text('{"weight_map": {"a": ".."}}'), OSError, r"shards \.\. are missing"),
])
def test_damaged_checkpoint_ends_in_a_traceback(saved, damage, error, message):
    damage(saved[0])
    with pytest.raises(error, match=message):
        load_model(saved[0])


@pytest.mark.parametrize("settings, message", [
    (dict(device="cuda:99"), "device cuda:99: not to be had here; use cpu"),
    (dict(attention="flash"), "attention flash: use sdpa or eager"),
])
def test_no_such_device_or_attention_accepted(settings, message):
    with pytest.raises(ValueError, match=message):
        load_model("tiny", **settings)


def test_weights_copied_into_memory(tmp_path):
    """Loading maps the file: less than a tenth of its size becomes memory of the process's own."""
    pair = make_pair(vocab_size=80_000)
    pair.hf.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    before = anonymous_bytes()
    model = load_model(tmp_path, device="cpu")
    assert size > 150e6 and anonymous_bytes() - before < 0.1 * size
    assert same(model, pair.ours)


def anonymous_bytes():
    with open(f"/proc/{os.getpid()}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def test_missing_checkpoint_loaded_as_no_settings():
    for name in ("nothing", "./no/where", "/nowhere", ""):
        message = f"{name}: no such directory; give a checkpoint's directory or a hub id"
        with pytest.raises(OSError, match=message):
            checkpoint(name)
        with pytest.raises(OSError, match=message):
            load_generation_config(name)        # and not the settings of no checkpoint, which end no answer


def test_pickles_downloaded_from_the_hub(tmp_path, monkeypatch):
    asked = {}
    download = lambda name, **settings: asked.update(settings) or str(tmp_path)
    monkeypatch.setattr(load_weights, "snapshot_download", download)
    assert checkpoint("Qwen/Qwen2.5-VL-3B-Instruct") == tmp_path
    assert asked == dict(allow_patterns=["*.safetensors", "*.json"])


def test_hub_failure_ends_in_a_traceback(monkeypatch):
    def dropped(*args, **settings):
        raise RuntimeError("Server disconnected without sending a response.")
    monkeypatch.setattr(load_weights, "snapshot_download", dropped)
    with pytest.raises(OSError, match=r"Qwen/Nowhere: neither a .* and the network \(Server disconnected"):
        checkpoint("Qwen/Nowhere")


@pytest.mark.parametrize("saved, expected", [
    (dict(do_sample=True, temperature=1e-6, repetition_penalty=1.05, eos_token_id=[5, 6], pad_token_id=6),
     dict(temperature=1e-6, top_k=50, top_p=1.0, repetition_penalty=1.05, eos_token_id=[5, 6],
          pad_token_id=6)),
    (dict(do_sample=True, top_p=0.8, eos_token_id=5, pad_token_id=6),
     dict(temperature=1.0, repetition_penalty=1.0, top_p=0.8, top_k=50, eos_token_id=5, pad_token_id=6)),
    (dict(eos_token_id=5, temperature=0.7),
     dict(temperature=0.0, repetition_penalty=1.0, eos_token_id=5, pad_token_id=0)),
])
def test_generation_defaults_differ(saved, expected, tmp_path):
    write(tmp_path, saved, "generation_config.json")
    assert load_generation_config(tmp_path) == expected


@pytest.mark.parametrize("config", [dict(eos_token_id=7), dict(text_config=dict(eos_token_id=7))], ids=str)
def test_no_end_without_generation_config(config, tmp_path):
    """It then stands in config.json, as for Hugging Face."""
    assert load_generation_config(write(tmp_path, config))["eos_token_id"] == 7


@pytest.mark.parametrize("change, message", [
    (dict(temperature="hot"), "temperature cannot be 'hot'"), (dict(top_k=2.5), "top_k cannot be 2.5"),
    (dict(eos_token_id=[1, "2"]), r"eos_token_id cannot be \[1, '2'\]; download it again"),
])
def test_settings_that_are_no_numbers_accepted(tmp_path, change, message):
    write(tmp_path, dict(do_sample=True) | change, "generation_config.json")
    with pytest.raises(ValueError, match=message):
        load_generation_config(tmp_path)
