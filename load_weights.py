"""A checkpoint becomes a model: three dialects of config.json, safetensors, strict names.

Read from the top: where the checkpoint is, what its config.json says, which tensors it holds, and how they
get into the model: mapped into memory, without a copy, and only if every one of them fits. The last file.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import Config, Qwen2_5_VL
from processing import read_json, setting
from vision import VisionConfig, eager, sdpa

ATTENTIONS = {"sdpa": sdpa, "eager": eager}
DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}

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

    Only safetensors and JSON files are asked for. Raises OSError where there is neither, ValueError for a
    directory with nothing but a LoRA adapter.
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
        raise OSError(f"{name}: neither a directory here nor to be had from the hub; check the name and the "
                      f"network ({reason})") from error


def load_config(path: str | Path) -> Config:
    """The config of a checkpoint directory in any dialect: flat, flat and sparse, nested under text_config.

    Raises OSError where it is missing; ValueError where it is broken, where its sizes don't fit together, and
    for what is not computed here: other models and activations, quantisation, sliding windows, scaled rotary.
    """
    path = Path(path) / "config.json"
    top = read_json(path)
    text = top | setting(path, top, "text_config", dict, {})
    rope = setting(path, text, "rope_parameters", dict, {}) or setting(path, text, "rope_scaling", dict, {})
    text |= rope                # which holds mrope_section, and in nested files rope_theta
    text["tie_word_embeddings"] = top.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    vision = setting(path, top, "vision_config", dict, {})
    vision = {"in_chans": vision.get("in_channels")} | vision       # nested files may call it so

    quantised = setting(path, top, "quantization_config", dict, {})
    for name, value, supported in (
        ("model_type", top.get("model_type"), ("qwen2_5_vl",)),
        ("quant_method", quantised.get("quant_method"), (None,)),
        ("use_sliding_window", text.get("use_sliding_window"), (None, False)),
        ("rope_type", rope.get("rope_type", rope.get("type")), (None, "default", "mrope")),
        ("hidden_act", text.get("hidden_act"), (None, "silu")),
        ("vision hidden_act", vision.get("hidden_act"), (None, "silu")),
    ):
        if value not in supported:
            raise ValueError(f"{path}: {name} {value!r} is not supported; use a published bfloat16 model")

    def build(cls: type, given: dict, shared: dict) -> Any:
        values = {field.name: setting(path, given, field.name, field.type, shared.get(field.name))
                  for field in fields(cls)}
        return cls(**{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()})

    tower = build(VisionConfig, vision, SHARED_VISION)
    config = build(Config, text | {"vision": tower}, SHARED)
    heads, section = config.num_attention_heads, config.mrope_section
    multiple = lambda size, part: size > 0 and part > 0 and size % part == 0
    for right, what in (        # what shapes of weights would not show
        (multiple(heads, config.num_key_value_heads),
         "num_attention_heads must be a multiple of num_key_value_heads"),
        (len(section) == 3 and 2 * sum(section) * heads == config.hidden_size,
         "mrope_section must be three numbers that add up to half of hidden_size / num_attention_heads"),
        (multiple(tower.hidden_size, 4 * tower.num_heads),
         "vision hidden_size must be a multiple of 4 x num_heads"),
        (multiple(tower.window_size, tower.patch_size * tower.spatial_merge_size),
         "window_size must be a multiple of patch_size x spatial_merge_size"),
        (tower.out_hidden_size == config.hidden_size, "vision out_hidden_size must equal hidden_size"),
    ):
        if not right:
            raise ValueError(f"{path}: {what}; download it again")
    return config


def load_generation_config(path: str | Path) -> dict:
    """The arguments with which `generate` answers as Hugging Face does by default for this checkpoint."""
    path = checkpoint(path) / "generation_config.json"
    if not path.exists():
        path = path.with_name("config.json")        # Hugging Face then takes the end token from there
    saved = read_json(path)
    saved |= setting(path, saved, "text_config", dict, {})
    kind = int if isinstance(saved.get("eos_token_id"), int) else tuple[int, ...]
    eos = setting(path, saved, "eos_token_id", kind, ())
    defaults = dict(repetition_penalty=1.0, pad_token_id=0)
    if saved.get("do_sample"):
        defaults |= dict(temperature=1.0, top_k=50, top_p=1.0)      # HF's, where the file says nothing
    settings = {name: setting(path, saved, name, type(value), value) for name, value in defaults.items()}
    return dict(temperature=0.0, eos_token_id=eos) | settings


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.exists():
        names = sorted(set(map(str, setting(index, read_json(index), "weight_map", dict).values())))
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index}: {outside[0]} is not a file beside it; download it again")
        if absent := [name for name in names if not (path / name).is_file()]:
            raise OSError(f"{path}: of its shards {', '.join(absent)} are missing; download them")
        return [path / name for name in names]
    if pickles := sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt")):
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
    path: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto",
    attention: str = "sdpa",
) -> Qwen2_5_VL:
    """The model of a checkpoint, ready to answer: in eval mode, without gradients.

    path: a directory or hub id. device: "cpu", "cuda", "cuda:1"; "auto" is CUDA where there is one. dtype:
    torch.bfloat16, torch.float32 or their names; "auto" is the checkpoint's. attention: "sdpa", "eager".
    Raises OSError for files that are missing, ValueError for everything in them that does not fit.
    """
    path = checkpoint(path)
    config = load_config(path)
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = ["cpu", "cuda", *cards] if cards else ["cpu"]
    if device == "auto":
        device = "cuda" if cards else "cpu"
    if str(device) not in devices:
        raise ValueError(f"device {device}: not to be had here; use {' or '.join(devices)}")
    wanted = DTYPES.get(dtype, dtype)
    if wanted not in DTYPES.values():
        raise ValueError(f"dtype {dtype}: use bfloat16 or float32; float16 overflows in the vision tower")
    if attention not in ATTENTIONS:
        raise ValueError(f"attention {attention}: use {' or '.join(ATTENTIONS)}")

    with torch.device("meta"):      # shapes only: the weights themselves come from the files
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
    if wanted is None and embedding.dtype not in DTYPES.values():
        raise ValueError(f"{path}: its weights are {embedding.dtype}; give dtype bfloat16 or float32")
    return model.to(wanted or embedding.dtype).eval().requires_grad_(False)
