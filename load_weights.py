"""A checkpoint becomes a model: three dialects of config.json, safetensors, strict names.

Read from the top: where the checkpoint is, what its config.json says, which tensors it holds, and how they are
put into the model: memory-mapped, without a copy, and only if every one of them fits. This is the last of the six.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import Config, Qwen2_5_VL
from vision import VisionConfig, eager, sdpa

ATTENTIONS = {"sdpa": sdpa, "eager": eager}

# Where a key is missing, the value that all published checkpoints share. (Hugging Face's class defaults differ, and
# the published 32B leaves out its window size and which blocks are full.) Sizes have no such value: they are required.
PUBLISHED_TEXT = dict(
    rms_norm_eps=1e-6, rope_theta=1e6, mrope_section=[16, 24, 24], max_position_embeddings=128000,
    tie_word_embeddings=False, image_token_id=151655, video_token_id=151656,
    vision_start_token_id=151652, vision_end_token_id=151653,
)
PUBLISHED_VISION = dict(
    depth=32, num_heads=16, in_chans=3, patch_size=14, temporal_patch_size=2, spatial_merge_size=2, window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2,
)

# Names in files written from Hugging Face's live module, and the published ones that save_pretrained writes.
LIVE_PREFIXES = {"model.language_model.": "model.", "model.visual.": "visual."}


def checkpoint(name: str | Path) -> Path:
    """The directory of a checkpoint: `name` itself, or a hub id, downloaded once (safetensors and JSON files only).

    Raises OSError where there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise OSError(f"{name}: no such directory; give a checkpoint's directory or a hub id like "
                      "Qwen/Qwen2.5-VL-3B-Instruct")
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"{name}: neither a directory here nor to be had from the hub ({reason}); "
                      "check the name and the network") from error


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises OSError where it is missing, ValueError where it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OSError(f"{path}: no such file; is {path.parent} a complete checkpoint?") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object; download it again")
    return content


def load_config(path: str | Path) -> Config:
    """The config of a checkpoint directory, from any dialect: flat, flat and sparse, or nested under text_config.

    Raises ValueError for what this implementation does not compute: other models, activations, quantised weights,
    sliding windows, scaled rotaries.
    """
    path = Path(path) / "config.json"
    top = read_json(path)
    text, vision = top | top.get("text_config", {}), top.get("vision_config", {})
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}

    def refuse(what: str) -> None:
        raise ValueError(f"{path}: {what} is not supported; use a published Qwen2.5-VL checkpoint in bfloat16")

    if top.get("model_type") != "qwen2_5_vl":
        refuse(f"model_type {top.get('model_type')!r}")
    if "quantization_config" in top:
        refuse(f"quantisation ({top['quantization_config'].get('quant_method', 'unnamed')})")
    if text.get("use_sliding_window"):
        refuse("use_sliding_window")
    for kind in {rope.get("rope_type", "default"), rope.get("type", "default")} - {"default", "mrope"}:
        refuse(f"rope scaling of type {kind!r}")
    for activation in {text.get("hidden_act", "silu"), vision.get("hidden_act", "silu")} - {"silu"}:
        refuse(f"activation {activation!r}")

    vision = {"in_chans": vision["in_channels"]} | vision if "in_channels" in vision else vision
    text = text | {key: rope[key] for key in ("rope_theta", "mrope_section") if key in rope}
    text["tie_word_embeddings"] = top.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)

    def build(cls: type, given: dict, published: dict, **more: VisionConfig):
        fields = {}
        for name in cls.__dataclass_fields__.keys() - more.keys():
            value = given.get(name, published.get(name))
            if value is None:
                raise ValueError(f"{path}: no {name} for {cls.__name__}, and no published value to fall back on")
            fields[name] = tuple(value) if isinstance(value, list) else value
        return cls(**fields, **more)

    config = build(Config, text, PUBLISHED_TEXT, vision=build(VisionConfig, vision, PUBLISHED_VISION))
    check_sizes(config, path)
    return config


def check_sizes(config: Config, path: Path) -> None:
    """Raises ValueError for sizes that don't divide."""
    vision = config.vision
    for name, size, by in (
        ("hidden_size by num_attention_heads", config.hidden_size, config.num_attention_heads),
        ("num_attention_heads by num_key_value_heads", config.num_attention_heads, config.num_key_value_heads),
        ("head_dim / 2 by the sum of mrope_section", config.head_dim // 2, sum(config.mrope_section)),
        ("vision hidden_size by 4 x num_heads", vision.hidden_size, 4 * vision.num_heads),
        ("window_size by the side of a merge group", vision.window_size, vision.patch_size * vision.spatial_merge_size),
    ):
        if size % by != 0:
            raise ValueError(f"{path}: {name} must divide evenly, got {size} / {by}")
    if vision.out_hidden_size != config.hidden_size:
        raise ValueError(f"{path}: vision out_hidden_size {vision.out_hidden_size} must equal the decoder's "
                         f"hidden_size {config.hidden_size}")


def load_generation_config(path: str | Path) -> dict:
    """The arguments of `generate` that make it answer as Hugging Face does by default with this checkpoint."""
    config_path = Path(path) / "generation_config.json"
    saved = read_json(config_path) if config_path.exists() else {}
    sampled = saved.get("do_sample") and saved.get("temperature", 1.0) >= 1e-5      # below, sampling is argmax
    settings = dict(
        temperature=saved.get("temperature", 1.0) if sampled else 0.0,
        repetition_penalty=saved.get("repetition_penalty") or 1.0,
        eos_token_id=saved.get("eos_token_id", ()),
        pad_token_id=saved.get("pad_token_id") or 0,
    )
    if sampled:
        settings |= {key: saved[key] for key in ("top_k", "top_p") if saved.get(key) is not None}
    return settings


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index}: names {outside[0]}, which is not a file beside it; download it again")
        if absent := [name for name in names if not (path / name).exists()]:
            raise OSError(f"{path}: the shards {', '.join(absent)} are missing; download them")
        return [path / name for name in names]
    if (path / "adapter_config.json").exists():
        raise ValueError(f"{path}: holds a LoRA adapter only; merge it into its base model and save that")
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt")):
        raise ValueError(f"{path}: has only pickled weights ({pickles[0]}), which can run code when opened; "
                         "convert them to safetensors")
    raise OSError(f"{path}: no model.safetensors and no model.safetensors.index.json; is the download complete?")


def read_weights(path: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a checkpoint under their published names; on the CPU they are views of the mapped files."""
    weights = {}
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():
                    published = name
                    for live, prefix in LIVE_PREFIXES.items():
                        published = prefix + name.removeprefix(live) if name.startswith(live) else published
                    weights[published] = tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error}); download it again") from None
    return weights


def load_model(
    path: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto", attention: str = "sdpa"
) -> Qwen2_5_VL:
    """A checkpoint's model, ready to answer: in eval mode and without gradients.

    path: a directory or hub id. device: "auto" is CUDA where there is one, else the CPU. dtype: "auto" is the
    checkpoint's own, else torch.bfloat16 or torch.float32. attention: "sdpa" or "eager".
    Raises ValueError or OSError, naming every tensor that is missing, left over or of another shape than the config says.
    """
    path = checkpoint(path)
    config = load_config(path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device}: torch knows none of this name; use cuda or cpu") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: this torch finds no CUDA here; use cpu")
    with torch.device("meta"):
        model = Qwen2_5_VL(config, ATTENTIONS[attention])
    weights = read_weights(path, device)

    if config.tie_word_embeddings and "lm_head.weight" in weights:
        if not torch.equal(weights.pop("lm_head.weight"), weights["model.embed_tokens.weight"]):
            raise ValueError(f"{path}: config.json ties the head to the embedding, but lm_head.weight differs from "
                             "model.embed_tokens.weight; set tie_word_embeddings to false or drop lm_head.weight")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for problem, names in (
        ("are missing", sorted(expected.keys() - found.keys())),
        ("are not part of this model", sorted(found.keys() - expected.keys())),
        ("have another shape than config.json says",
         [f"{name} {found[name]} (not {shape})" for name, shape in expected.items() if found.get(name, shape) != shape]),
    ):
        if names:
            raise ValueError(f"{path}: {len(names)} tensors {problem}: {', '.join(names[:5])}"
                             f"{' ...' if len(names) > 5 else ''}")

    dtype = weights["model.embed_tokens.weight"].dtype if dtype == "auto" else dtype
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{dtype} is not supported: float16 overflows in the vision tower; "
                         "use bfloat16 or float32")
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, strict=True, assign=True)
    return model.eval().requires_grad_(False)
