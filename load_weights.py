"""A checkpoint becomes a model: three dialects of config.json, safetensors, strict names.

Read from the top: where the checkpoint is, what its config.json says, which tensors it holds, and how they
get into the model: mapped into memory, without a copy, and only if every one of them fits. The last file.
"""

from dataclasses import fields
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import Config, Qwen2_5_VL
from processing import read_json, setting
from vision import VisionConfig, eager, sdpa

ATTENTIONS = {"sdpa": sdpa, "eager": eager}
DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

# What all published checkpoints share, for keys that a config.json leaves out: the 32B's has neither a window
# size nor the blocks that are full. (The defaults of Hugging Face's classes differ.) Sizes have no such
# value.
SHARED = dict(
    rms_norm_eps=1e-6, rope_theta=1e6, mrope_section=(16, 24, 24), max_position_embeddings=128000,
    tie_word_embeddings=False, image_token_id=151655, video_token_id=151656,
)
SHARED_VISION = dict(
    depth=32, num_heads=16, in_chans=3, patch_size=14, temporal_patch_size=2, spatial_merge_size=2,
    window_size=112, fullatt_block_indexes=(7, 15, 23, 31), tokens_per_second=2,
)

# In files written from Hugging Face's live module -> published, as save_pretrained writes.
PREFIXES = {"model.language_model.": "model.", "model.visual.": "visual."}


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


# ---------------------------------------------------------------------------- config

def load_config(path: str | Path) -> Config:
    """The config of a checkpoint directory in any dialect: flat, flat and sparse, nested under text_config.

    Raises OSError where it is missing; ValueError where it is broken, where its sizes don't fit together, and
    for what is not computed here: other models and activations, quantisation, sliding windows, scaled rotary.
    """
    path = Path(path) / "config.json"
    top = read_json(path)
    vision = setting(path, top, "vision_config", dict, {})
    text = top | setting(path, top, "text_config", dict, {})
    rope = setting(path, text, "rope_parameters", dict, {}) or setting(path, text, "rope_scaling", dict, {})
    text |= {name: rope[name] for name in ("rope_theta", "mrope_section") if name in rope}
    text["tie_word_embeddings"] = top.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    vision = {"in_chans": vision.get("in_channels")} | vision

    quantised = setting(path, top, "quantization_config", dict, {})
    for refused, what in (
        (top.get("model_type") != "qwen2_5_vl", f"model_type {top.get('model_type')!r}"),
        (quantised, f"quantisation ({quantised.get('quant_method', 'unnamed')})"),
        (text.get("use_sliding_window"), "use_sliding_window"),
        *((kind not in (None, "default", "mrope"), f"rope scaling of type {kind}")
          for kind in (rope.get("rope_type"), rope.get("type"))),
        *((act not in (None, "silu"), f"activation {act}")
          for act in (text.get("hidden_act"), vision.get("hidden_act"))),
    ):
        if refused:
            raise ValueError(f"{path}: {what} is not supported; use a published Qwen2.5-VL checkpoint")

    def build(cls: type, given: dict, shared: dict) -> Config | VisionConfig:
        values = {field.name: setting(path, given, field.name, field.type, shared.get(field.name))
                  for field in fields(cls)}
        return cls(**{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()})

    tower = build(VisionConfig, vision, SHARED_VISION)
    config = build(Config, text | {"vision": tower}, SHARED)
    heads, section = config.num_attention_heads, config.mrope_section
    whole = lambda size, part: size > 0 and part > 0 and size % part == 0
    for right, what in (
        (whole(config.hidden_size, heads), "hidden_size must be a multiple of num_attention_heads"),
        (whole(heads, config.num_key_value_heads),
         "num_attention_heads must be a multiple of num_key_value_heads"),
        (len(section) == 3 and 2 * sum(section) * heads == config.hidden_size,
         "mrope_section must be three numbers that add up to half of a head's channels"),
        (whole(tower.hidden_size, 4 * tower.num_heads),
         "vision hidden_size must be a multiple of 4 x num_heads"),
        (whole(tower.window_size, tower.patch_size * tower.spatial_merge_size),
         "window_size must be a multiple of patch_size x spatial_merge_size"),
        (tower.out_hidden_size == config.hidden_size, "vision out_hidden_size must equal hidden_size"),
    ):
        if not right:
            raise ValueError(f"{path}: {what}; download it again")
    return config


def load_generation_config(path: str | Path) -> dict:
    """The arguments with which `generate` answers as Hugging Face does by default for this checkpoint."""
    path = checkpoint(path) / "generation_config.json"
    saved = read_json(path) if path.exists() else {}
    kind = int if isinstance(saved.get("eos_token_id"), int) else tuple[int, ...]
    settings = dict(
        temperature=0.0, repetition_penalty=setting(path, saved, "repetition_penalty", float, 1.0),
        eos_token_id=setting(path, saved, "eos_token_id", kind, ()),
        pad_token_id=setting(path, saved, "pad_token_id", int, 0),
    )
    if saved.get("do_sample"):
        defaults = dict(temperature=1.0, top_k=50, top_p=1.0)       # HF's, where the file says nothing
        settings |= {name: setting(path, saved, name, type(value), value) for name, value in defaults.items()}
    return settings


# ---------------------------------------------------------------------------- weights

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
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix in PICKLES):
        raise ValueError(f"{path}: only pickled weights ({pickles[0]}), which can run code when opened; "
                         "convert them to safetensors")
    raise OSError(f"{path}: neither model.safetensors nor an index of shards; is the download complete?")


def published_name(name: str) -> str:
    """The name in published files of a parameter that has it, or that of Hugging Face's live module."""
    for live, published in PREFIXES.items():
        if name.startswith(live):
            return published + name.removeprefix(live)
    return name


def read_weights(path: Path, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their published names; on the CPU they are views of the mapped files."""
    weights = {}
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
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

    path: a directory or hub id. device: "cpu", "cuda", "cuda:1"; "auto" is CUDA where there is one.
    dtype: torch.bfloat16, torch.float32 or their names; "auto" is the checkpoint's. attention: "sdpa" or
    "eager".
    Raises OSError for files that are missing, ValueError for everything in them that does not fit.
    """
    path = checkpoint(path)
    config = load_config(path)
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    devices += ["cuda"] if torch.cuda.is_available() else []
    if device == "auto":
        device = devices[-1]
    if str(device) not in devices:
        raise ValueError(f"device {device}: not to be had here; use {' or '.join(devices)}")
    wanted = DTYPES.get(dtype, dtype)
    if wanted not in DTYPES.values():
        raise ValueError(f"dtype {dtype}: use bfloat16 or float32; float16 overflows in the vision tower")
    if attention not in ATTENTIONS:
        raise ValueError(f"attention {attention}: use {' or '.join(ATTENTIONS)}")

    with torch.device("meta"):      # shapes only: the weights themselves come from the files
        model = Qwen2_5_VL(config, ATTENTIONS[attention])
    weights = read_weights(path, torch.device(device))
    tied_head = weights.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    expected = model.state_dict()
    misshapen = [f"{name} {tuple(p.shape)} (not {tuple(expected[name].shape)})"
                 for name, p in weights.items() if name in expected and p.shape != expected[name].shape]
    for names, what in (
        (expected.keys() - weights.keys(), "are missing"),
        (weights.keys() - expected.keys(), "are not part of this model"),
        (misshapen, "have another shape than config.json says"),
        ({name for name, p in weights.items() if not p.is_floating_point()}, "are no floating-point numbers"),
    ):
        if names:
            raise ValueError(f"{path}: {len(names)} tensors {what}: {', '.join(sorted(names)[:5])}; "
                             "are its weights and its config.json of one checkpoint?")
    embedding = weights["model.embed_tokens.weight"]
    if tied_head is not None and not torch.equal(tied_head, embedding):
        raise ValueError(f"{path}: tie_word_embeddings is set, but lm_head.weight differs from "
                         "model.embed_tokens.weight; unset it or drop lm_head.weight")
    own = embedding.dtype
    if wanted is None and own not in DTYPES.values():
        raise ValueError(f"{path}: its weights are {own}; give dtype bfloat16 or float32")
    for name in weights:        # one by one, so that memory never holds all of them twice
        weights[name] = weights[name].to(wanted or own)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval().requires_grad_(False)
