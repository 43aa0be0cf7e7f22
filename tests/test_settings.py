"""The files of a checkpoint: good ones load, as every release of transformers has written them, and what they
ask for is done, or refused by its name.

tests/data holds what the releases wrote; tests/data/save.py made them.
"""

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_equal, flat, make_pair, prompts, write
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from load_weights import load_config, load_generation_config, load_model, load_processor

DATA = Path(__file__).parent / "data"
RELEASES = {file.stem: json.loads(file.read_text()) for file in DATA.glob("*.json")}
QUESTION = "Which of the objects is the largest, and what is to the left of it? " * 3


@pytest.fixture
def tiny(tmp_path):
    """A copy of the tiny checkpoint's files, but for its weights, to change."""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path


def change(directory, name, **settings):
    """Sets keys in a JSON file of a directory; None removes one."""
    file = directory / name
    content = json.loads(file.read_text()) if file.exists() else {}
    content = {key: value for key, value in (content | settings).items() if value is not None}
    return write(directory, content, name)


def user(*content):
    return [{"role": "user", "content": list(content)}]


# ---------------------------------------------------------------------------- config.json

@pytest.mark.parametrize("release", RELEASES)
def test_configs_of_every_release_load(release, tmp_path):
    """A fine-tune saved by 4.49 lacks widths, nulls of 4.52 hide ids, and the tie has four places."""
    for size in ("3B", "7B"):
        published = load_config(write(tmp_path, flat(size)))
        assert load_config(write(tmp_path, RELEASES[release][size])) == published

    published = load_config(write(tmp_path, flat("3B")))
    untied = load_config(write(tmp_path, RELEASES[release]["untied 3B"]))
    assert untied == replace(published, tie_word_embeddings=False)


def test_oldest_configs_lack_what_they_are_kept_for():
    """The samples are of no use once they are complete."""
    for size, lacking in (("3B", {"intermediate_size"}), ("7B", {"intermediate_size", "out_hidden_size"})):
        written = RELEASES["4.49.0"][size]["vision_config"]
        assert {"intermediate_size", "out_hidden_size"} - written.keys() == lacking
    nested = RELEASES["4.52.4"]["untied 3B"]
    assert nested["tie_word_embeddings"] is False and nested["text_config"]["tie_word_embeddings"] is True
    assert nested["text_config"]["image_token_id"] is None


@pytest.mark.parametrize("release", ["4.52.4", "4.56.2"])
def test_nested_nulls_hide_nothing(release, tiny):
    """Ids at the top, nulls below: another vocabulary's placeholders were read as the published ones."""
    text = RELEASES[release]["3B"]["text_config"]
    nulls = {name: value for name, value in text.items() if value is None}
    assert "image_token_id" in nulls
    change(tiny, "config.json", text_config=nulls)
    assert load_config(tiny) == load_config(TINY)


@pytest.mark.parametrize("settings, message", [
    (dict(rope_scaling=dict(type="yarn", rope_type=None, factor=4.0)), "rope_type 'yarn' is not supported"),
    (dict(rope_scaling=dict(type="default", rope_type="yarn")), "rope_type 'yarn' is not supported"),
    (dict(rope_parameters=dict(rope_type="dynamic")), "rope_type 'dynamic' is not supported"),
    (dict(rope_scaling=dict(type="linear")), "rope_type 'linear' is not supported"),
    (dict(layer_types=["full_attention"] * 27 + ["sliding_attention"]), r"layer_types .* is not supported"),
    (dict(quantization_config=dict(quant_method="fp8")), "quant_method 'fp8' is not supported"),
    (dict(vision_config=dict(hidden_act="gelu")), "hidden_act 'gelu' is not supported"),
    (dict(vision_config=dict(rope_parameters=dict(rope_theta=5000.0))), "rope_theta 5000.0 is not supported"),
    (dict(model_type=None), "model_type None is not supported"),
    (dict(hidden_size=3584.0), "hidden_size cannot be 3584.0; it must be an integer from 0 up"),
    (dict(rope_scaling=dict(mrope_section=0.5)), "mrope_section cannot be 0.5; it must be a list"),
    (dict(hidden_size=None), "no hidden_size in it; it must be an integer"),
])
def test_config_is_computed_or_refused_by_name(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        load_config(write(tmp_path, flat("7B") | settings))
    assert "download" not in str(error.value)       # a second download has the same file


# ---------------------------------------------------------------------------- the weights

@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Config and weights of the seeded model in one file, as Hugging Face saves them; and ours."""
    directory = tmp_path_factory.mktemp("saved")
    pair = make_pair()
    pair.hf.save_pretrained(directory)
    return directory, pair.ours


def with_weights(saved, directory, weights, **settings):
    shutil.copy(saved[0] / "config.json", directory)
    change(directory, "config.json", **settings)
    save_file({name: p.clone() for name, p in weights.items()}, directory / "model.safetensors")
    return directory


def test_head_stored_alone_is_the_embedding(saved, tmp_path):
    """safetensors' save_model keeps the first name of shared tensors, which is the head's."""
    weights = load_file(saved[0] / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    model = load_model(with_weights(saved, tmp_path, weights, tie_word_embeddings=True), device="cpu")
    assert torch.equal(model.model.embed_tokens.weight, saved[1].model.embed_tokens.weight)
    assert not hasattr(model, "lm_head")


def test_untied_head_is_its_own(saved, tmp_path):
    """As 4.52 to 4.56 write a 3B whose user has untied it: false at the top, true below."""
    weights = load_file(saved[0] / "model.safetensors")
    text = json.loads((saved[0] / "config.json").read_text())["text_config"]
    directory = with_weights(saved, tmp_path, weights, tie_word_embeddings=False,
                             text_config=text | dict(tie_word_embeddings=True))
    inputs = prompts([[4, (8, 12), 3]])
    assert torch.equal(load_model(directory, device="cpu")(**inputs), saved[1](**inputs))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "base_model.model.", "module."])
def test_wrapper_prefix_is_shown(saved, tmp_path, prefix):
    weights = {prefix + name: p for name, p in load_file(saved[0] / "model.safetensors").items()}
    with pytest.raises(ValueError, match=f"its {prefix}lm_head.weight is not a name in this model") as error:
        load_model(with_weights(saved, tmp_path, weights), device="cpu")
    assert len(str(error.value).removeprefix(str(tmp_path))) <= 160


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings", [
    dict(dtype="float32"), dict(torch_dtype="bfloat16"), dict(dtype="bfloat16", torch_dtype="float32"), {},
], ids=str)
def test_dtype_is_what_the_config_says(saved, tmp_path, settings, stored):
    """Bug: the weights' own, though the file asks for another: a merge left in float32 is to run in bfloat16.
    """
    weights = {name: p.to(stored) for name, p in load_file(saved[0] / "model.safetensors").items()}
    directory = with_weights(saved, tmp_path, weights, **dict(dtype=None, torch_dtype=None) | settings)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory)
    assert load_model(directory, device="cpu").dtype == theirs.dtype
    assert load_model(directory, device="cpu", dtype="float32").dtype == torch.float32


def test_float16_of_a_config_is_refused_by_name(saved, tmp_path):
    directory = with_weights(saved, tmp_path, load_file(saved[0] / "model.safetensors"), dtype="float16")
    with pytest.raises(ValueError, match="dtype float16: use bfloat16 or float32; float16 overflows"):
        load_model(directory, device="cpu")
    assert load_model(directory, device="cpu", dtype="bfloat16").dtype == torch.bfloat16


# ---------------------------------------------------------------------------- generation_config.json

@pytest.mark.parametrize("name, value", [
    ("no_repeat_ngram_size", 2), ("min_new_tokens", 30), ("min_length", 100), ("num_beams", 4),
    ("suppress_tokens", [5]), ("bad_words_ids", [[5]]), ("sequence_bias", [[[5], 1.0]]), ("min_p", 0.1),
    ("typical_p", 0.9), ("stop_strings", ["."]), ("forced_eos_token_id", 5), ("guidance_scale", 1.5),
    ("encoder_repetition_penalty", 1.2), ("top_h", 0.4), ("num_return_sequences", 2),
    ("exponential_decay_length_penalty", [10, 1.1]), ("token_healing", True), ("max_time", 1.0),
    ("num_beam_groups", 2), ("penalty_alpha", 0.6), ("dola_layers", "low"), ("constraints", [[5]]),
    ("force_words_ids", [[5]]), ("begin_suppress_tokens", [5]), ("forced_bos_token_id", 5),
    ("encoder_no_repeat_ngram_size", 2), ("epsilon_cutoff", 1e-3), ("eta_cutoff", 1e-3),
    ("watermarking_config", {"bias": 2.0}),
])
def test_generation_setting_is_refused_by_name(name, value, tiny):
    assert name in GenerationConfig().to_dict()
    change(tiny, "generation_config.json", **{name: value})
    with pytest.raises(ValueError, match=f"generation_config.json: {name} .* is not supported"):
        load_generation_config(tiny)


def test_neutral_generation_settings_are_accepted(tiny):
    """What a full dump of Hugging Face's defaults holds changes nothing."""
    defaults = dict(num_beams=1, typical_p=1.0, no_repeat_ngram_size=0, min_length=0, length_penalty=1.0,
                    suppress_tokens=None, guidance_scale=None, max_length=20, use_cache=True, top_k=50,
                    num_beam_groups=1, num_return_sequences=1, encoder_no_repeat_ngram_size=0, min_p=0.0,
                    encoder_repetition_penalty=1.0, min_new_tokens=0, epsilon_cutoff=0.0, eta_cutoff=0.0,
                    token_healing=False)
    change(tiny, "generation_config.json", **defaults)
    assert load_generation_config(tiny) == load_generation_config(TINY)
    change(tiny, "generation_config.json", do_sample="yes")
    with pytest.raises(ValueError, match="do_sample cannot be 'yes'; it must be true or false"):
        load_generation_config(tiny)


# ---------------------------------------------------------------------------- preprocessors

@pytest.mark.parametrize("release", RELEASES)
def test_processors_of_every_release_load(release, tiny):
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (tiny / name).unlink()
    for name, text in RELEASES[release]["processor"].items():
        (tiny / name).write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")      # the template that they write is the published one
        processor = load_processor(tiny)
    published = load_processor(TINY)
    assert (processor.min_pixels, processor.max_pixels) == (published.min_pixels, published.max_pixels)
    white = user({"image": Image.new("RGB", (120, 90), "white")})
    assert torch.equal(processor(white)["pixel_values"], published(white)["pixel_values"])


def theirs(directory, picture):
    return Qwen2VLImageProcessorPil.from_pretrained(directory)(picture, return_tensors="pt")["pixel_values"]


def test_pixels_are_normalized_as_the_file_says(tiny):
    """Or with another mean; bit for bit as Hugging Face makes them."""
    picture = Image.open(TINY.parent / "assets" / "demo.png").convert("RGB")
    for settings in (dict(do_normalize=False), dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.25, 0.2])):
        change(tiny, "preprocessor_config.json", **settings)
        (tiny / "video_preprocessor_config.json").unlink(missing_ok=True)
        ours = load_processor(tiny)(user({"image": picture}))["pixel_values"]
        assert_equal("pixels without normalization, or with another", ours, theirs(tiny, picture))
        change(tiny, "preprocessor_config.json", do_normalize=True)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "video_preprocessor_config.json"])
@pytest.mark.parametrize("name, value", [
    ("resample", 2), ("do_rescale", False), ("rescale_factor", 0.1), ("do_resize", False),
    ("do_convert_rgb", False), ("patch_size", 16), ("temporal_patch_size", 1), ("merge_size", 4),
])
def test_preprocessor_setting_is_refused_by_name(file, name, value, tiny):
    change(tiny, file, **{name: value})
    with pytest.raises(ValueError, match=f"/{file}: {name} {value} is not supported"):
        load_processor(tiny)


@pytest.mark.parametrize("name, value", [
    ("do_sample_frames", True), ("fps", 4), ("num_frames", 8), ("min_frames", 8), ("max_frames", 32),
    ("cap_pixels_per_frame", True), ("image_mean", [0.5, 0.5, 0.5]), ("do_normalize", False),
])
def test_video_setting_is_refused_by_name(name, value, tiny):
    change(tiny, "video_preprocessor_config.json", **{name: value})
    with pytest.raises(ValueError, match=f"video_preprocessor_config.json: {name} .* is not supported"):
        load_processor(tiny)


def test_video_settings_that_say_what_is_done_are_accepted(tiny):
    """Bug: the rate, or the numbers of frames, by which an animation is sampled here are refused."""
    change(tiny, "video_preprocessor_config.json", fps=2, min_frames=4, max_frames=768)
    assert load_processor(tiny).video_min_pixels == load_processor(TINY).video_min_pixels


@pytest.mark.parametrize("settings, expected", [
    (dict(min_pixels=3136, max_pixels=25088), (3136, 25088)),                       # by name
    (dict(size=dict(shortest_edge=784, longest_edge=15680)), (784, 15680)),         # as edges
    (dict(size=dict(shortest_edge=784, longest_edge=15680), max_pixels=20000), (784, 20000)),
])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_limits_have_two_forms(settings, expected, kind, tiny):
    """Names come before edges, as for Hugging Face; a video's as a picture's."""
    file = "preprocessor_config.json" if kind == "image" else "video_preprocessor_config.json"
    change(tiny, file, **dict(min_pixels=None, max_pixels=None, size=None) | settings)
    processor = load_processor(tiny)
    limits = (processor.min_pixels, processor.max_pixels)
    if kind == "video":
        limits = (processor.video_min_pixels, processor.video_max_pixels)
    assert limits == expected
    size = Qwen2VLImageProcessorPil.from_pretrained(tiny, image_processor_filename=file).size
    assert (size["shortest_edge"], size["longest_edge"]) == expected


@pytest.mark.parametrize("settings, message", [
    (dict(size=dict(height=112, width=112)), "height 112 is not supported"),
    (dict(size=dict(longest_edge=15680)), "no min_pixels in it"),
    (dict(size=dict(shortest_edge=784)), "no max_pixels in it"),
    (dict(max_pixels=50176.0), "max_pixels cannot be 50176.0; it must be an integer"),
    (dict(image_mean=0.5), "image_mean cannot be 0.5; it must be a list of numbers"),
    (dict(do_normalize="no"), "do_normalize cannot be 'no'; it must be true or false"),
    (dict(image_mean=[0.5]), "image_mean and image_std must be three numbers each"),
    (dict(image_std=[0.5, 0.5]), "image_mean and image_std must be three numbers each"),
    (dict(image_std=[0.2, 0, 0.2]), "image_std's above 0"),
])
def test_limits_are_not_guessed(settings, message, tiny):
    """Half a size, or a number of another kind, was replaced by 16,384 tokens, or a download advised; one
    mean was that of three colors.
    """
    change(tiny, "preprocessor_config.json", min_pixels=None, max_pixels=None)
    change(tiny, "preprocessor_config.json", **settings)
    with pytest.raises(ValueError, match=message) as error:
        load_processor(tiny)
    assert "download" not in str(error.value)


# ---------------------------------------------------------------------------- the tokenizer and its template

def test_truncation_of_a_training_run_is_reset(tiny):
    """Quantized and fine-tuned checkpoints have it; Hugging Face resets it before every call."""
    whole = load_processor(TINY)(user({"text": QUESTION}))["input_ids"]
    change(tiny, "tokenizer.json",
           truncation=dict(direction="Right", max_length=16, strategy="LongestFirst", stride=0),
           padding=dict(strategy=dict(Fixed=128), direction="Right", pad_to_multiple_of=None, pad_id=438,
                        pad_type_id=0, pad_token="<|endoftext|>"))
    ours = load_processor(tiny)
    assert_equal("ids of a truncating tokenizer", ours(user({"text": QUESTION}))["input_ids"], whole)
    theirs = AutoTokenizer.from_pretrained(tiny)(ours.prompt(user({"text": QUESTION})), return_tensors="pt")
    assert_equal("ids of a truncating tokenizer", whole, theirs["input_ids"])


@pytest.mark.parametrize("name", ["image_token_id", "video_token_id"])
def test_placeholders_of_another_vocabulary_are_named(name, tiny):
    """They were counted as missing pictures."""
    change(tiny, "config.json", **{name: 452})
    with pytest.raises(ValueError, match=r"tokenizer.json: placeholders \[450, 451\] are not config.json's"):
        load_processor(tiny)


@pytest.mark.parametrize("token", [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
])
def test_tokenizer_must_have_every_control_token(token, tiny):
    """Bug: it ends in a traceback once a message has a picture."""
    content = (tiny / "tokenizer.json").read_text()
    assert content.count(f'"{token}"') == 1
    (tiny / "tokenizer.json").write_text(content.replace(token, "<|other|>"))
    with pytest.raises(ValueError, match=re.escape(f"tokenizer.json: no {token} in it; is it Qwen2.5-VL's?")):
        load_processor(tiny)


def test_slow_tokenizer_is_told_what_to_do(tiny):
    """vocab.json and merges.txt alone: another download has the same files."""
    (tiny / "tokenizer.json").unlink()
    with pytest.raises(OSError, match="only vocab.json, save the tokenizer with transformers' fast") as error:
        load_processor(tiny)
    assert "download" not in str(error.value)


@pytest.mark.parametrize("name", ["add_prefix_space", "split_special_tokens"])
def test_tokenizer_setting_is_refused_by_name(name, tiny):
    change(tiny, "tokenizer_config.json", **{name: True})
    with pytest.raises(ValueError, match=f"tokenizer_config.json: {name} True is not supported"):
        load_processor(tiny)


def test_tokens_of_the_tokenizer_config_are_in_the_tokenizer(tiny):
    """Hugging Face adds them; here an answer that has one had a hole in its place."""
    settings = json.loads((tiny / "tokenizer_config.json").read_text())
    added = settings["added_tokens_decoder"]
    added["460"] = added["459"] | dict(content="<point>")
    change(tiny, "tokenizer_config.json", added_tokens_decoder=added)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.decode([460]) == "<point>"
    with pytest.raises(ValueError, match="config.json: .<point>. is not token 460 of tokenizer.json"):
        load_processor(tiny)

    # As that tokenizer saves both.
    tokenizer.save_pretrained(tiny)
    assert load_processor(tiny).tokenizer.token_to_id("<point>") == 460


TEMPLATE = json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"]
OTHER = TEMPLATE.replace("system\nYou are a helpful assistant.", "system\n")


PLACES = ["tokenizer_config.json", "chat_template.jinja", "chat_template.json", "processor_config.json"]


@pytest.mark.parametrize("name", PLACES)
def test_another_template_is_said(name, tiny):
    """In any place that counts: of four, Hugging Face takes the last one."""
    def put(name, template):
        if name.endswith(".jinja"):
            (tiny / name).write_text(template)
        else:
            change(tiny, name, chat_template=template)

    def taken():
        processor, _ = Qwen2_5_VLProcessor.get_processor_dict(tiny)
        return processor.get("chat_template") or AutoTokenizer.from_pretrained(tiny).chat_template

    assert OTHER != TEMPLATE
    put(name, OTHER)
    assert taken() == OTHER
    with pytest.warns(UserWarning, match="its chat template is ignored in favor of the published one"):
        load_processor(tiny)

    # What comes before it does not count.
    put(name, TEMPLATE)
    for earlier in PLACES[:PLACES.index(name)]:
        put(earlier, OTHER)
    assert taken() == TEMPLATE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_processor(tiny)
        put(name, TEMPLATE + "\n")
        load_processor(tiny)
