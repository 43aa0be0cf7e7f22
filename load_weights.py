"""A checkpoint's directory becomes a model, a processor and settings: whatever is read from it is read here.

Read from the top: where the checkpoint is, the dialects of its config.json, its sampling settings, its
processor, and its tensors: mapped into memory, without a copy, and only if every one of them fits. A key that
is missing falls back on the value that the published checkpoints share; anything a file asks for that is not
computed here is refused by name. A first reading can skip this file.

Next: generate.py
"""

import json
import warnings
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

import processing
from int4 import GROUP, Int4Linear, as_published, pack
from model import Config, Qwen2_5_VL
from processing import Processor
from vision import Attend, VisionConfig, eager, sdpa

ATTENTIONS = {"sdpa": sdpa, "eager": eager}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

# What all published checkpoints share, for keys that a config.json leaves out: the 32B's has no window size
# and no full blocks. (The defaults of Hugging Face's classes differ.) Sizes that vary are not here, except
# the width of the tower's MLP, which transformers 4.49 left out for the 3B and 7B.
SHARED = dict(
    rms_norm_eps=1e-6, rope_theta=1e6, mrope_section=(16, 24, 24), max_position_embeddings=128000,
    tie_word_embeddings=False, image_token_id=151655, video_token_id=151656,
)
SHARED_VISION = dict(
    depth=32, intermediate_size=3420, num_heads=16, in_chans=3, patch_size=14, temporal_patch_size=2,
    spatial_merge_size=2, window_size=112, fullatt_block_indexes=(7, 15, 23, 31),
    tokens_per_second=2,
)
PUBLISHED_TEMPLATE = 3459730853     # CRC-32 of the chat template that processing.py fills in

# The kinds of values, as error messages call them.
KINDS = {
    int: "an integer from 0 up", tuple[int, ...]: "a list of integers from 0 up", dict: "an object",
    float: "a number from 0 up", tuple[float, ...]: "a list of numbers from 0 up", bool: "true or false",
}


def checkpoint(name: str | Path) -> Path:
    """The directory of a checkpoint: `name` itself, or that of a hub id, downloaded once.

    Downloads only safetensors, JSON and the chat template. Raises OSError if the name is neither a directory
    nor on the hub, ValueError for a directory with nothing but a LoRA adapter.
    """
    path = Path(name)
    if name and path.is_dir():
        if (path / "adapter_config.json").exists() and not any(path.glob("model*.safetensors*")):
            raise ValueError(f"{path}: a LoRA adapter only; merge it into its base model and save that")
        return path
    if path.exists() or path.is_absolute() or len(path.parts) != 2 or str(name).startswith("."):
        raise OSError(f"{name}: no such directory; give a checkpoint's directory or a hub id like "
                      "Qwen/Qwen2.5-VL-3B-Instruct")

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json", "*.jinja"]))
    except Exception as error:      # the hub's library lets its transport's own exceptions through
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"{name}: not a directory here, and not available from the hub; check the name and the "
                      f"network ({reason})") from error


# ---------------------------------------------------------------------------- JSON files

def read_json(path: Path, optional: bool = False) -> dict:
    """The object in a JSON file, without its nulls; an empty one for an optional file that is missing.

    Raises OSError if a required one is missing, ValueError if it is broken.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if optional:
            return {}
        raise OSError(f"{path}: no such file; is {path.parent} a complete checkpoint?") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); fix it, or download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object; is it another file?")
    return without_nulls(content)


def without_nulls(content: dict) -> dict:
    """A null says nothing, and must not hide what another level of the file says."""
    return {name: without_nulls(value) if isinstance(value, dict) else value
            for name, value in content.items() if value is not None}


def fits(value: object, kind: type) -> bool:
    """Whether a JSON value is of a kind: a number from 0 up, a list of them for a tuple, or just the type."""
    if kind in (int, float):
        return type(value) in (int, kind) and value >= 0
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(fits(number, get_args(kind)[0]) for number in value)
    return isinstance(value, kind)


def checked(path: Path, content: dict, name: str, kind: type, default: object = None) -> Any:
    """content[name], a list as a tuple, or the default if it is missing. `path` is for the message.

    Raises ValueError if the value is not of the kind (see `fits`), or missing without a default.
    """
    value = content.get(name, default)
    if not fits(value, kind):
        what = f"no {name} in it" if value is None else f"{name} cannot be {value!r:.60}"
        raise ValueError(f"{path}: {what}; it must be {KINDS[kind]}")
    return tuple(value) if isinstance(value, list) else value


def refuse_others(path: Path, settings: dict, supported: dict[str, tuple]) -> None:
    """ValueError for a setting whose value is not among the supported ones; an empty tuple refuses any value.
    `path` is for the message.
    """
    for name, values in supported.items():
        if name in settings and settings[name] not in values:
            raise ValueError(f"{path}: {name} {settings[name]!r:.60} is not supported; use a published "
                             "model, or take it out of the file")


# ---------------------------------------------------------------------------- config.json

# Of the values that a setting may have, those supported here.
SUPPORTED = dict(
    model_type=("qwen2_5_vl",), use_sliding_window=(False,), hidden_act=("silu",),
    rope_type=("default", "mrope"))
SUPPORTED_QUANTIZATION = dict(
    quant_method=("awq",), bits=(4,), group_size=(GROUP,), version=("gemm",), zero_point=(True,))
SUPPORTED_VISION = dict(hidden_act=("silu",), rope_type=("default", "axial"), rope_theta=(10000.0,))


def load_config(path: str | Path) -> Config:
    """The config of a checkpoint, in any dialect. path: a directory or hub id.

    Raises OSError if it is missing; ValueError if it is broken, if its sizes don't fit together, and for what
    is not computed here: other models and activations, other quantization than AWQ's in four bits, sliding
    windows, scaled rotary.
    """
    path = checkpoint(path) / "config.json"
    text, vision = one_dialect(path, read_json(path))
    refuse_others(path, text, SUPPORTED)
    refuse_others(path, checked(path, text, "quantization_config", dict, {}), SUPPORTED_QUANTIZATION)
    refuse_others(path, vision, SUPPORTED_VISION)

    # A tower without an output width, as transformers 4.49 wrote the 7B's, has the decoder's.
    width = checked(path, text, "hidden_size", int)
    tower = build(path, VisionConfig, SHARED_VISION | {"out_hidden_size": width} | vision)
    config = build(path, Config, SHARED | text | {"vision": tower})

    # What can be checked only with the sizes known.
    refuse_others(path, text, dict(layer_types=(["full_attention"] * config.num_hidden_layers,)))
    heads = config.num_attention_heads
    if heads * config.head_dim != config.hidden_size:
        raise ValueError(f"{path}: mrope_section {config.mrope_section} must add up to half of hidden_size / "
                         f"num_attention_heads, {config.hidden_size} / {heads}; is one of them changed?")
    return config


def one_dialect(path: Path, content: dict) -> tuple[dict, dict]:
    """The decoder's and the tower's settings: flat, flat with keys left out, or nested under text_config."""
    # Nested values win, except model_type and tie_word_embeddings, for which the top level is right.
    text = content | checked(path, content, "text_config", dict, {})
    text["model_type"] = content.get("model_type")
    text["tie_word_embeddings"] = (text | content).get("tie_word_embeddings", False)

    # The rotary's settings hold mrope_section, and in nested files rope_theta.
    rope = checked(path, text, "rope_parameters", dict, {}) or checked(path, text, "rope_scaling", dict, {})
    text |= rope
    text["rope_type"] = rope.get("rope_type") or rope.get("type", "default")

    vision = checked(path, content, "vision_config", dict, {})
    vision |= checked(path, vision, "rope_parameters", dict, {})
    if "in_channels" in vision:         # its name in some nested files
        vision = {"in_chans": vision["in_channels"]} | vision
    return text, vision


def build(path: Path, cls: type, values: dict) -> Any:
    """A Config or VisionConfig of the values of its fields, each checked."""
    checked_values = {field.name: checked(path, values, field.name, field.type) for field in fields(cls)}
    try:
        return cls(**checked_values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; compare it with a published config.json") from None


# ---------------------------------------------------------------------------- generation_config.json

# Settings that are not supported, because they change an answer, each with the values that don't.
NEUTRAL = dict(
    num_beams=(1,), num_beam_groups=(1,), num_return_sequences=(1,), penalty_alpha=(), dola_layers=(),
    constraints=(), force_words_ids=(), bad_words_ids=(), suppress_tokens=(), begin_suppress_tokens=(),
    sequence_bias=(), forced_bos_token_id=(), forced_eos_token_id=(), exponential_decay_length_penalty=(),
    no_repeat_ngram_size=(0,), encoder_no_repeat_ngram_size=(0,), encoder_repetition_penalty=(1,),
    min_length=(0,), min_new_tokens=(0,), max_time=(), stop_strings=(), guidance_scale=(1,), top_h=(),
    min_p=(0,), typical_p=(1,), epsilon_cutoff=(0,), eta_cutoff=(0,), token_healing=(False,),
    watermarking_config=())


def load_generation_config(path: str | Path) -> dict:
    """The arguments with which `generate` answers as Hugging Face does by default for this checkpoint.

    The length of an answer is not among them. Raises ValueError for settings that are not supported, such as
    beam search, or of the wrong kind.
    """
    path = checkpoint(path) / "generation_config.json"
    if not path.exists():
        path = path.with_name("config.json")        # Hugging Face then takes the end token from there
    saved = read_json(path)
    saved |= checked(path, saved, "text_config", dict, {})
    refuse_others(path, saved, NEUTRAL)

    kind = int if isinstance(saved.get("eos_token_id"), int) else tuple[int, ...]
    settings = dict(
        temperature=0.0,
        eos_token_id=checked(path, saved, "eos_token_id", kind, ()),
        pad_token_id=checked(path, saved, "pad_token_id", int, 0),
        repetition_penalty=checked(path, saved, "repetition_penalty", float, 1.0),
    )

    # Hugging Face's defaults fill in what the file leaves out.
    if checked(path, saved, "do_sample", bool, False):
        settings["temperature"] = checked(path, saved, "temperature", float, 1.0)
        settings["top_k"] = checked(path, saved, "top_k", int, 50)
        settings["top_p"] = checked(path, saved, "top_p", float, 1.0)
    return settings


# ---------------------------------------------------------------------------- the processor

# The supported values of a preprocessor's and a tokenizer's settings.
PICTURES = dict(
    do_convert_rgb=(True,), do_resize=(True,), resample=(3,), do_rescale=(True,), rescale_factor=(1 / 255,))
VIDEOS = PICTURES | dict(
    do_sample_frames=(False,), num_frames=(), fps=(processing.VIDEO_FPS,), cap_pixels_per_frame=(False,),
    min_frames=(processing.VIDEO_MIN_FRAMES,), max_frames=(processing.VIDEO_MAX_FRAMES,))
TOKENIZER = dict(add_prefix_space=(False,), split_special_tokens=(False,))


def load_processor(
    path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None
) -> Processor:
    """The processor of a checkpoint. path: a directory or hub id. min_pixels and max_pixels override its own.

    Patch and merge sizes come from config.json. Raises OSError or ValueError if a file is missing or broken,
    ValueError for settings that are not supported and limits that make no sense. Warns about a chat template
    that is not the published one.
    """
    path = checkpoint(path)
    config = load_config(path)
    tower = config.vision
    tokenizer = load_tokenizer(path / "tokenizer.json", config)
    check_tokenizer_config(path, tokenizer)
    image_file, image = preprocessor(path, "image_processor", "preprocessor_config.json")
    video_file, video = preprocessor(path, "video_processor", "video_preprocessor_config.json")

    # A video is cut and normalized like a picture.
    mean = checked(image_file, image, "image_mean", tuple[float, ...], processing.IMAGE_MEAN)
    std = checked(image_file, image, "image_std", tuple[float, ...], processing.IMAGE_STD)
    if not len(mean) == len(std) == 3 or 0 in std:
        raise ValueError(f"{image_file}: image_mean and image_std must be three numbers each, for red, green "
                         "and blue, and image_std's above 0")
    normalize = checked(image_file, image, "do_normalize", bool, True)
    same = dict(patch_size=(tower.patch_size,), temporal_patch_size=(tower.temporal_patch_size,),
                merge_size=(tower.spatial_merge_size,), image_mean=(list(mean),), image_std=(list(std),),
                do_normalize=(normalize,))
    refuse_others(image_file, image, PICTURES | same)
    refuse_others(video_file, video, VIDEOS | same)

    # The limits of a picture may be overridden.
    low, high = limits(image_file, image, processing.MIN_PIXELS, processing.MAX_PIXELS)
    low = low if min_pixels is None else min_pixels
    high = high if max_pixels is None else max_pixels
    if not 0 < low <= high:
        raise ValueError(f"max_pixels {high}: must be above 0 and at least min_pixels, {low}")
    video_low, video_high = limits(video_file, video, processing.VIDEO_MIN_PIXELS, 0)

    return Processor(
        tokenizer,
        patch_size=tower.patch_size,
        temporal_patch_size=tower.temporal_patch_size,
        merge_size=tower.spatial_merge_size,
        min_pixels=low, max_pixels=high,
        video_min_pixels=video_low, video_max_pixels=video_high,
        image_mean=mean if normalize else (0.0, 0.0, 0.0),      # pixels stay from 0 to 1
        image_std=std if normalize else (1.0, 1.0, 1.0),
    )


def preprocessor(path: Path, block: str, name: str) -> tuple[Path, dict]:
    """The settings of pictures or videos, and the file they are in: since transformers 5, one for both.

    Only the settings of pictures are required.
    """
    both = path / "processor_config.json"
    settings = checked(both, read_json(both, optional=True), block, dict, {})
    if settings:
        return both, settings
    return path / name, read_json(path / name, optional=block == "video_processor")


def limits(path: Path, settings: dict, low: int, high: int) -> tuple[int, int]:
    """min_pixels and max_pixels. By name, or in a size, whose "edges" are areas, too; names come first."""
    size = checked(path, settings, "size", dict, {"shortest_edge": low, "longest_edge": high})
    refuse_others(path, size, dict(height=(), width=()))
    both = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")} | settings
    return checked(path, both, "min_pixels", int), checked(path, both, "max_pixels", int)


def load_tokenizer(file: Path, config: Config) -> Tokenizer:
    """The tokenizer in a file; ValueError if its placeholders are not the config's."""
    if not file.exists():
        raise OSError(f"{file}: no such file; is the checkpoint complete? Where it has only vocab.json, save "
                      "the tokenizer with transformers' fast class")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:      # the library raises nothing narrower
        raise ValueError(f"{file}: not a tokenizer ({error!s:.60}); download it again") from None

    # Never truncate or pad, whatever a training run has left in the file.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True      # "<|im_end|>" in a run of text is ten characters, not a token

    token_id = tokenizer.token_to_id
    for token in (processing.ENDOFTEXT, processing.IM_START, processing.IM_END, processing.VISION_START,
                  processing.VISION_END, processing.IMAGE_PAD, processing.VIDEO_PAD):
        if token_id(token) is None:
            raise ValueError(f"{file}: no {token} in it; is it Qwen2.5-VL's?")
    pads = [token_id(processing.IMAGE_PAD), token_id(processing.VIDEO_PAD)]
    if pads != [config.image_token_id, config.video_token_id]:
        raise ValueError(f"{file}: placeholders {pads} are not config.json's; take both from one checkpoint")
    return tokenizer


def check_tokenizer_config(path: Path, tokenizer: Tokenizer) -> None:
    """Refuse tokenizer settings that are not supported here, and warn of a chat template that is not the
    published one, which is what processing.py fills in.
    """
    file = path / "tokenizer_config.json"
    settings = read_json(file, optional=True)
    refuse_others(file, settings, TOKENIZER)
    for number, token in checked(file, settings, "added_tokens_decoder", dict, {}).items():
        content = str(token.get("content")) if isinstance(token, dict) else str(token)
        if str(tokenizer.token_to_id(content)) != number:
            raise ValueError(f"{file}: {content!r:.60} is not token {number:.9} of tokenizer.json; save both "
                             "with one tokenizer")

    # In Hugging Face's order: of four places the last one wins.
    template = settings.get("chat_template")
    if (path / "chat_template.jinja").exists():
        template = (path / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        template = read_json(path / name, optional=True).get("chat_template", template)

    if template is not None and zlib.crc32(str(template).strip().encode()) != PUBLISHED_TEMPLATE:
        warnings.warn(f"{path}: its chat template is ignored in favor of the published one; where "
                      "they differ, answers will, too", stacklevel=3)


# ---------------------------------------------------------------------------- the weights

def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names."""
    single = path / "model.safetensors"
    index = path / "model.safetensors.index.json"
    if single.is_file():
        return [single]

    if index.exists():
        weight_map = checked(index, read_json(index), "weight_map", dict)
        names = sorted(set(map(str, weight_map.values())))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{index}: {outside[0]} is not a file beside it; give bare names")
        absent = [name for name in names if not (path / name).is_file()]
        if absent:
            raise OSError(f"{path}: these shards are missing: {', '.join(absent)}; download them")
        return [path / name for name in names]

    pickles = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise ValueError(f"{path}: only pickled weights ({pickles[0]}), which can run code when opened; "
                         "convert them to safetensors")
    raise OSError(f"{path}: neither model.safetensors nor an index of shards; is the download complete?")


def published_name(name: str) -> str:
    """A parameter's published name; files from FSDP have the names inside Hugging Face's module."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def read_weights(path: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their published names; on the CPU they are views of the mapped files."""
    weights = {}
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt", device=device) as tensors:
                weights |= {published_name(name): tensors.get_tensor(name) for name in tensors.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error}); download it again") from None
    return weights


def load_model(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attention: str = "sdpa",
) -> Qwen2_5_VL:
    """The model of a checkpoint, ready to answer: in eval mode, without gradients.

    path: a directory or hub id. device: "cpu", "cuda", "cuda:1", or another that torch supports here; "auto"
    is CUDA if there is any, else the CPU. dtype: torch.bfloat16, torch.float32 or their names; "auto" is the
    checkpoint's (its config.json's, or else its weights'), and bfloat16 for weights in four bits. attention:
    "sdpa", "eager".
    Raises OSError for files that are missing, ValueError for everything in them that does not fit.
    """
    path = checkpoint(path)
    config = load_config(path)
    device, dtype, attend = available(path, device, dtype, attention)
    return ready(read_model(path, config, device, attend), dtype)


def available(
    path: Path, device: str | torch.device, dtype: str | torch.dtype, attention: str
) -> tuple[str, str | torch.dtype, Attend]:
    """What is asked for, checked before anything large is read. ValueError for what is unavailable."""
    # Is there such a device, and does it keep numbers (the meta device has none)?
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:      # each kind of device has its own
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device {device}: not available here ({reason}); use cpu, or "
                         "leave it out") from None

    # As config.json says, under either name; four bits have no dtype of their own, see `ready`.
    saved = read_json(path / "config.json")
    if dtype == "auto" and "quantization_config" not in saved:
        dtype = str(saved.get("dtype", saved.get("torch_dtype", "auto")))
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in ("auto", *DTYPES.values()):
        raise ValueError(f"dtype {dtype}: use bfloat16 or float32; float16 overflows in the vision tower")
    if attention not in ATTENTIONS:
        raise ValueError(f"attention {attention}: use {' or '.join(ATTENTIONS)}")
    return str(device), dtype, ATTENTIONS[attention]


def read_model(path: Path, config: Config, device: str, attend: Attend) -> Qwen2_5_VL:
    """The model with its tensors as they are in the files; on the CPU they are views of the mapped files."""
    # Shapes only: the weights themselves come from the files.
    with torch.device("meta"):
        model = Qwen2_5_VL(config, attend)
    weights = read_weights(path, device)
    as_published(model, weights)        # if in four bits (int4.py, optional): swaps in layers for them

    # A tied head may be stored as well, or alone, as safetensors' save_model does.
    tied_head = weights.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    if tied_head is not None:
        weights.setdefault("model.embed_tokens.weight", tied_head)

    # Every tensor has its place, and every place its tensor.
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:       # torch names what is missing, unexpected or of another shape
        reason = " ".join(str(error).split()).partition(": ")[2][:300]
        unknown = sorted(weights.keys() - model.state_dict().keys())
        if unknown:                     # with its prefix, where a wrapper has left one
            reason = f"its {unknown[0]} is not a name in this model"
        raise ValueError(f"{path}: {reason}; are weights and config.json from the same checkpoint?") from None

    embedding = model.model.embed_tokens.weight
    if tied_head is not None and not torch.equal(tied_head, embedding):
        raise ValueError(f"{path}: tie_word_embeddings is set, but lm_head.weight differs from "
                         "model.embed_tokens.weight; unset it or drop lm_head.weight")
    return model


def ready(model: Qwen2_5_VL, dtype: str | torch.dtype) -> Qwen2_5_VL:
    """The model in a dtype, its four-bit layers packed for their kernel, in eval mode, without gradients."""
    if dtype == "auto":
        in_four_bits = any(isinstance(module, Int4Linear) for module in model.modules())
        dtype = torch.bfloat16 if in_four_bits else model.model.embed_tokens.weight.dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"the checkpoint's weights are {dtype}; give dtype bfloat16 or float32")

    model.to(dtype).eval().requires_grad_(False)
    pack(model)
    torch.backends.cuda.enable_cudnn_sdp(False)     # cuDNN plans anew for each length: windows have many
    return model
