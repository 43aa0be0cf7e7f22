"""A checkpoint's directory becomes a model, a processor and settings: whatever is read from it is read here.

Read from the top: where the checkpoint is, the dialects of its config.json, its settings for sampling, its
processor, and its tensors: mapped into memory, without a copy, and only if every one of them fits. A key that
is missing falls back on the value that the published checkpoints share; what is not computed here is refused
by its name. A first reading can skip this file.

Next: generate.py
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

import processing
from model import Config, Qwen2_5_VL
from processing import Processor
from vision import VisionConfig, eager, sdpa

ATTENTIONS = {"sdpa": sdpa, "eager": eager}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

# What all published checkpoints share, for keys that a config.json leaves out, as the 32B's its window size
# and full blocks. (The defaults of Hugging Face's classes differ.) Sizes have no such value.
SHARED = dict(
    rms_norm_eps=1e-6, rope_theta=1e6, mrope_section=(16, 24, 24), max_position_embeddings=128000,
    tie_word_embeddings=False, image_token_id=151655, video_token_id=151656,
)
SHARED_VISION = dict(
    depth=32, num_heads=16, in_chans=3, patch_size=14, temporal_patch_size=2, spatial_merge_size=2,
    window_size=112, fullatt_block_indexes=(7, 15, 23, 31), tokens_per_second=2,
)


def checkpoint(name: str | Path) -> Path:
    """The directory of a checkpoint: `name` itself, or that of a hub id, downloaded once.

    Downloads only safetensors and JSON files. Raises OSError if the name is neither a directory nor on the
    hub, ValueError for a directory with nothing but a LoRA adapter.
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
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:      # the hub's library lets its transport's own exceptions through
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"{name}: not a directory here, and not available from the hub; check the name and the "
                      f"network ({reason})") from error


# ---------------------------------------------------------------------------- JSON files

def read_json(path: Path) -> dict:
    """The object in a JSON file, without its nulls. OSError if it is missing, ValueError if it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OSError(f"{path}: no such file; is {path.parent} a complete checkpoint?") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object; download it again")
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
    """content[name], or the default if it is missing. `path` is for the message.

    Raises ValueError if the value is not of the kind (see `fits`), or missing without a default.
    """
    value = content.get(name, default)
    if not fits(value, kind):
        what = f"no {name}" if value is None else f"{name} cannot be {value!r}"
        raise ValueError(f"{path}: {what}; download it again")
    return value


# ---------------------------------------------------------------------------- config.json

def load_config(path: str | Path) -> Config:
    """The config of a checkpoint, a directory or hub id, in any dialect.

    Raises OSError if it is missing; ValueError if it is broken, if its sizes don't fit together, and for what
    is not computed here: other models and activations, quantization, sliding windows, scaled rotary.
    """
    path = checkpoint(path) / "config.json"
    text, vision = one_dialect(path, read_json(path))
    refuse_unsupported(path, text, vision)

    tower = build(path, VisionConfig, SHARED_VISION | vision)
    config = build(path, Config, SHARED | text | {"vision": tower})
    heads = config.num_attention_heads
    if heads * config.head_dim != config.hidden_size:
        raise ValueError(f"{path}: mrope_section {config.mrope_section} must add up to half of hidden_size / "
                         f"num_attention_heads, {config.hidden_size} / {heads}; download it again")
    return config


def one_dialect(path: Path, content: dict) -> tuple[dict, dict]:
    """The decoder's and the tower's settings: flat and full, flat and sparse, or nested under text_config."""
    text = content | checked(path, content, "text_config", dict, {})
    rope = checked(path, text, "rope_parameters", dict, {}) or checked(path, text, "rope_scaling", dict, {})
    text |= rope                        # which holds mrope_section, and in nested files rope_theta
    text["rope_type"] = rope.get("rope_type") or rope.get("type")
    text["model_type"] = content.get("model_type")
    text["tie_word_embeddings"] = (
        content.get("tie_word_embeddings") or text.get("tie_word_embeddings") or False)

    vision = checked(path, content, "vision_config", dict, {})
    if "in_channels" in vision:         # so called in some nested files
        vision = {"in_chans": vision["in_channels"]} | vision
    return text, vision


def refuse_unsupported(path: Path, text: dict, vision: dict) -> None:
    quantized = checked(path, text, "quantization_config", dict, {})
    for name, value, supported in (
        ("model_type", text["model_type"], ("qwen2_5_vl",)),
        ("quant_method", quantized.get("quant_method"), (None,)),
        ("use_sliding_window", text.get("use_sliding_window"), (None, False)),
        ("rope_type", text["rope_type"], (None, "default", "mrope")),
        ("hidden_act", text.get("hidden_act"), (None, "silu")),
        ("vision hidden_act", vision.get("hidden_act"), (None, "silu")),
    ):
        if value not in supported:
            raise ValueError(f"{path}: {name} {value!r} is not supported; use a published bfloat16 model")


def build(path: Path, cls: type, values: dict) -> Any:
    """A Config or VisionConfig of the values of its fields, each checked."""
    checked_values = {}
    for field in fields(cls):
        value = checked(path, values, field.name, field.type)
        checked_values[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**checked_values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; download it again") from None


# ---------------------------------------------------------------------------- generation_config.json

def load_generation_config(path: str | Path) -> dict:
    """The arguments with which `generate` answers as Hugging Face does by default for this checkpoint."""
    path = checkpoint(path) / "generation_config.json"
    if not path.exists():
        path = path.with_name("config.json")        # Hugging Face then takes the end token from there
    saved = read_json(path)
    saved |= checked(path, saved, "text_config", dict, {})

    kind = int if isinstance(saved.get("eos_token_id"), int) else tuple[int, ...]
    settings = dict(
        temperature=0.0,
        eos_token_id=checked(path, saved, "eos_token_id", kind, ()),
        pad_token_id=checked(path, saved, "pad_token_id", int, 0),
        repetition_penalty=checked(path, saved, "repetition_penalty", float, 1.0),
    )
    if saved.get("do_sample"):      # with Hugging Face's defaults for what the file leaves out
        settings["temperature"] = checked(path, saved, "temperature", float, 1.0)
        settings["top_k"] = checked(path, saved, "top_k", int, 50)
        settings["top_p"] = checked(path, saved, "top_p", float, 1.0)
    return settings


# ---------------------------------------------------------------------------- the processor

def load_processor(
    path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None
) -> Processor:
    """The processor of a checkpoint, a directory or hub id; limits of a picture override its own.

    Patch and merge sizes come from config.json. Raises OSError or ValueError if a file is missing or broken,
    ValueError if a preprocessor file cuts other patches, and for limits that make no sense.
    """
    path = checkpoint(path)
    tower = load_config(path).vision

    # Pictures and videos have files of their own, or, from transformers 5 on, one for both.
    both = path / "processor_config.json"
    separate = path / "video_preprocessor_config.json"
    nested = read_json(both) if both.exists() else {}
    image = checked(both, nested, "image_processor", dict, {}) or read_json(path / "preprocessor_config.json")
    video = read_json(separate) if separate.exists() else checked(both, nested, "video_processor", dict, {})
    for name, size in (
        ("patch_size", tower.patch_size),
        ("temporal_patch_size", tower.temporal_patch_size),
        ("merge_size", tower.spatial_merge_size),
    ):
        if image.get(name, size) != size:
            raise ValueError(f"{path}: its preprocessor says {name} {image[name]!r}, its config.json {size}; "
                             "get both again")

    # Limits come in two forms: by name, or as edges of a size.
    size = checked(path, image, "size", dict, {})
    video_size = checked(path, video, "size", dict, {})
    if min_pixels is None:
        default = size.get("shortest_edge", processing.MIN_PIXELS)
        min_pixels = checked(path, image, "min_pixels", int, default)
    if max_pixels is None:
        default = size.get("longest_edge", processing.MAX_PIXELS)
        max_pixels = checked(path, image, "max_pixels", int, default)
    if not 0 < min_pixels <= max_pixels:
        raise ValueError(f"max_pixels {max_pixels}: must be above 0 and at least min_pixels, {min_pixels}")

    return Processor(
        load_tokenizer(path / "tokenizer.json"),
        patch_size=tower.patch_size,
        temporal_patch_size=tower.temporal_patch_size,
        merge_size=tower.spatial_merge_size,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        video_min_pixels=checked(path, video_size, "shortest_edge", int, processing.VIDEO_MIN_PIXELS),
        video_max_pixels=checked(path, video_size, "longest_edge", int, 0),
        image_mean=checked(path, image, "image_mean", tuple[float, ...], processing.IMAGE_MEAN),
        image_std=checked(path, image, "image_std", tuple[float, ...], processing.IMAGE_STD),
    )


def load_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:      # the library raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer ({error}); download it again") from None

    tokenizer.encode_special_tokens = True      # "<|im_end|>" in a run of text is ten characters and no token
    for token in (processing.ENDOFTEXT, processing.IM_START, processing.IM_END, processing.VISION_START,
                  processing.VISION_END, processing.IMAGE_PAD, processing.VIDEO_PAD):
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"{path}: no {token} in it; is it Qwen2.5-VL's?")
    return tokenizer


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
            raise ValueError(f"{index}: {outside[0]} is not a file beside it; download it again")
        absent = [name for name in names if not (path / name).is_file()]
        if absent:
            raise OSError(f"{path}: of its shards {', '.join(absent)} are missing; download them")
        return [path / name for name in names]

    pickles = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise ValueError(f"{path}: only pickled weights ({pickles[0]}), which can run code when opened; "
                         "convert them to safetensors")
    raise OSError(f"{path}: neither model.safetensors nor an index of shards; is the download complete?")


def published_name(name: str) -> str:
    """A parameter's published name, also from its name inside Hugging Face's module (in FSDP's files)."""
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

    path: a directory or hub id. device: "cpu", "cuda", "cuda:1"; "auto" is CUDA if there is any. dtype:
    torch.bfloat16, torch.float32 or their names; "auto" is the checkpoint's. attention: "sdpa", "eager".
    Raises OSError for files that are missing, ValueError for everything in them that does not fit.
    """
    path = checkpoint(path)
    config = load_config(path)

    # What is asked for, before anything large is read.
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = ["cpu", "cuda", *cards] if cards else ["cpu"]
    if device == "auto":
        device = "cuda" if cards else "cpu"
    if str(device) not in devices:
        raise ValueError(f"device {device}: not available here; use {' or '.join(devices)}")
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in ("auto", *DTYPES.values()):
        raise ValueError(f"dtype {dtype}: use bfloat16 or float32; float16 overflows in the vision tower")
    if attention not in ATTENTIONS:
        raise ValueError(f"attention {attention}: use {' or '.join(ATTENTIONS)}")
    torch.backends.cuda.enable_cudnn_sdp(False)     # it makes a plan for each new length, in every window

    # Shapes only: the weights themselves come from the files.
    with torch.device("meta"):
        model = Qwen2_5_VL(config, ATTENTIONS[attention])
    weights = read_weights(path, str(device))
    tied_head = weights.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:       # torch names what is missing, unexpected or of another shape
        reason = " ".join(str(error).split()).partition(": ")[2][:300]
        raise ValueError(f"{path}: {reason}; are weights and config.json of one checkpoint?") from None
    del weights                 # or memory would hold all of them twice while they are converted

    embedding = model.model.embed_tokens.weight
    if tied_head is not None and not torch.equal(tied_head, embedding):
        raise ValueError(f"{path}: tie_word_embeddings is set, but lm_head.weight differs from "
                         "model.embed_tokens.weight; unset it or drop lm_head.weight")
    if dtype == "auto" and embedding.dtype not in DTYPES.values():
        raise ValueError(f"{path}: its weights are {embedding.dtype}; give dtype bfloat16 or float32")
    dtype = embedding.dtype if dtype == "auto" else dtype
    return model.to(dtype).eval().requires_grad_(False)
