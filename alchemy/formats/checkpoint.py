"""Load a checkpoint: a folder in the Hub layout, a Hub id, or one .safetensors file.

A network is built on the meta device, without memory, and its parameters are replaced by the
tensors as they are read from the mapped file: no random initialization, no second copy.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..arguments import checked
from ..clip import TextConfig, TextEncoder
from ..schedule import Schedule
from ..sdxl import SDXL
from ..tokenizer import Tokenizer
from ..unet import UNet, UNetConfig
from ..vae import VAE, VAEConfig
from . import layout
from .configs import check_config, check_sizes, read_config, without_nulls
from .family import check_family, check_folder
from .hub import find, weight_files
from .tensors import first_names, names_in
from .text import shorten

VOCABULARY = Path(__file__).resolve().parents[2] / "weights" / "mini"
CONFIGS = {
    "unet": UNetConfig,
    "vae": VAEConfig,
    "text_encoder": TextConfig,
    "text_encoder_2": TextConfig,
}
BUILD = {
    "unet": UNet,
    "vae": VAE,
    "text_encoder": TextEncoder,
    "text_encoder_2": partial(TextEncoder, projection=True),
}
# SDXL base, where it differs from the defaults of the config classes.
OPEN_CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
BASE = {"unet": {}, "vae": {}, "text_encoder": {}, "text_encoder_2": OPEN_CLIP_BIG_G}
SCHEDULER = "scheduler/scheduler_config.json"
INDEX = "model_index.json"
JSON_FILES = (*(f"{name}/config.json" for name in BUILD), SCHEDULER, INDEX)


@dataclass(frozen=True)
class Reader:
    """`SDXL.read` of a loaded checkpoint: reads its networks, and knows its other files.

    configs: {network: its config}. files: {network: its weight files}. json_files: {path in the
    Hub layout: the JSON object there, {} if there is none}. vocabulary: the folder of tokenizer
    and tokenizer_2. ready(module) is called with each module of the UNet as a parameter of it is
    loaded, and at the end with the UNet (see extras.optimizations).
    """

    device: torch.device
    configs: dict[str, Any]
    files: dict[str, list[Path]]
    json_files: dict[str, dict]
    vocabulary: Path
    ready: Callable[[nn.Module], None] | None = None

    def __call__(self, name: str, dtype: torch.dtype) -> nn.Module:
        """The network of that name, with its weights."""
        network = build_on_meta(name, self.configs[name])
        ready = self.ready if name == "unet" else None
        load_weights(network, name, self.files[name], dtype, self.device, ready)
        if ready:
            ready(network)
        if name == "text_encoder_2":
            check_projection(network)
        return network


@checked
def load(
    source: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    config: str | Path | None = None,
    vae: str | Path | None = None,
    revision: str | None = None,
) -> SDXL:
    """Load an SDXL checkpoint; each network is read when it is first used.

    source: a folder in the Hub layout, a Hub id ("stabilityai/stable-diffusion-xl-base-1.0"), or
        one .safetensors file in the original layout.
    device, dtype: "auto" or what torch takes; see choose_device.
    config: for a single file, a folder with its configurations (default: those of SDXL base).
    vae: a folder, file or Hub id that replaces the VAE.
    revision: a branch, tag or commit on the Hub.

    Raises ValueError, in one line, for what is missing, incomplete, or of another family.
    """
    device, dtype = choose_device(device, dtype)
    half = dtype.itemsize == 2
    root = find(source, [name for name in BUILD if name != "vae" or not vae], half, revision)
    if config and root.is_dir():
        raise ValueError(
            f"{root}: a folder has its own configurations; those of {config} are for a single file"
        )
    roots = dict.fromkeys(BUILD, root)
    if vae:
        roots["vae"] = find(vae, ["vae", ""], half)

    # Configurations: the folder's, those of `config`, or, if there are none, SDXL base's.
    folder = root if root.is_dir() else None
    if config:
        folder = find(config)
    json_files = read_json_files(root, folder, roots["vae"])
    configs = {}
    for name, kind in CONFIGS.items():
        configs[name] = kind.from_config(json_files[f"{name}/config.json"] or BASE[name])
    check_sizes(source, configs)

    # A single file has no vocabulary: it is the same in all of SDXL.
    has_vocabulary = folder is not None and (folder / "tokenizer").is_dir()
    vocabulary = folder if has_vocabulary else VOCABULARY
    tokenizers = read_tokenizers(vocabulary, configs)
    files = {name: weight_files(place, name, half) for name, place in roots.items()}
    return SDXL(
        str(source),
        Reader(device, configs, files, json_files, vocabulary),
        configs,
        tokenizers,
        Schedule.from_config(without_nulls(json_files[SCHEDULER])),
        device,
        dtype,
        zeros_for_none=json_files[INDEX].get("force_zeros_for_empty_prompt") is not False,
    )


def read_json_files(root: Path, folder: Path | None, vae: Path) -> dict[str, dict]:
    """{path in the Hub layout: the JSON object there, {} if there is none}, checked.

    root: the checkpoint; folder: that of its configurations, if any; vae: where the VAE is, which
    may be a folder with config.json on top.
    """
    paths = {name: (folder or root) / name for name in JSON_FILES}
    for path in (vae / "config.json", vae / "vae/config.json"):
        if path.is_file():
            paths["vae/config.json"] = path
    json_files = {name: read_config(path) for name, path in paths.items()}
    check_config(paths[INDEX], json_files[INDEX])  # it names the family
    if folder:
        check_folder(folder, json_files)
    if root.is_file():
        tensors = names_in([root])
        check_family(root, tensors)
        json_files[SCHEDULER] |= marked_schedule(tensors)
    for name, path in paths.items():
        check_config(path, json_files[name])
    return json_files


def read_tokenizers(folder: Path, configs: dict[str, Any]) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizers in the sub-folders. Raises ValueError for an id that an encoder lacks."""
    tokenizers = []
    for name in ("tokenizer", "tokenizer_2"):
        encoder = name.replace("tokenizer", "text_encoder")
        tokenizer, size = Tokenizer.from_folder(folder / name), configs[encoder].vocab_size
        last = max(tokenizer.id_to_token)
        if last >= size:
            token = shorten(repr(tokenizer.id_to_token[last]))
            raise ValueError(
                f"{folder / name}: {token} has the id {last}; {encoder} has a vocab_size of {size}"
            )
        tokenizers.append(tokenizer)
    return tuple(tokenizers)


def marked_schedule(tensors: dict) -> dict:
    """What the empty tensors v_pred and ztsnr of a single file say about its schedule."""
    schedule = {}
    if "v_pred" in tensors:
        schedule["prediction_type"] = "v_prediction"
    if "ztsnr" in tensors:
        # Only trailing timesteps start at pure noise, as the training did. Lin et al. 2023, 3.3.
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return schedule


class skip_init(TorchFunctionMode):  # noqa: N801  a context manager
    """Inside, torch.nn.init does nothing; on the meta device it would import a compiler (3 s)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def build_on_meta(name: str, config: Any) -> nn.Module:
    """The network of that name without memory: names and shapes of its parameters only."""
    with torch.device("meta"), skip_init():
        return BUILD[name](config)


def stored_names(
    name: str, keys: list[str], config: Any, tensors: dict
) -> tuple[dict[str, str], str, bool]:
    """({parameter: its name in the file}, the network's prefix there, is it the original layout).

    The layout is recognized by names that only one of them has.
    """
    is_whole = any(key.startswith(tuple(layout.PREFIX.values())) for key in tensors)
    prefix = layout.PREFIX[name] if is_whole else ""
    is_original = is_whole or layout.MARKER.get(name) in tensors
    # transformers 5 saves text encoder 1 without "text_model.".
    is_short = f"{prefix}embeddings.token_embedding.weight" in tensors
    stored = {}
    for key in keys:
        inner = layout.single_file_name(name, key, config) if is_original else key
        stored[key] = prefix + (inner.removeprefix("text_model.") if is_short else inner)
    return stored, prefix, is_original


def load_weights(
    network: nn.Module,
    name: str,
    paths: list[Path],
    dtype: torch.dtype,
    device: torch.device,
    ready: Callable[[nn.Module], None] | None = None,
) -> None:
    """Give each parameter of a network on the meta device its tensor from the files.

    Raises ValueError for a tensor that is missing, left over, or of another shape.
    """
    tensors, source = names_in(paths), f"{paths[0]}: {name}"
    keys = list(network.state_dict())
    stored, prefix, is_original = stored_names(name, keys, network.config, tensors)
    missing = [key for key in keys if stored[key] not in tensors]
    known = {key for key in tensors if key.startswith(prefix) and not layout.EXTRAS.search(key)}
    extra = sorted(known - set(stored.values()))
    if missing or extra:
        hint = "; if it is not of SDXL's size, give --model-config FOLDER" if is_original else ""
        raise ValueError(
            f"{source}: {len(missing)} tensors missing, {len(extra)} left over: "
            f"{first_names(missing + extra)}{hint}"
        )
    for key, parameter in list(network.named_parameters()):
        tensor = tensors[stored[key]].get_tensor(stored[key])
        if is_original:
            tensor = layout.adapt(name, key, tensor)
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{source}: {key} is {tuple(tensor.shape)}, "
                f"and {tuple(parameter.shape)} by its configuration"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{source}: {key} is {tensor.dtype}, not floating point")
        # Convolutions are faster on channels_last weights, and activations follow that format.
        order = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        # First to the device, then to the dtype, so that a GPU casts.
        value = tensor.to(device).to(dtype).contiguous(memory_format=order)
        module_name, _, leaf = key.rpartition(".")
        module = network.get_submodule(module_name)
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        if ready:
            ready(module)
    network.eval()


def check_projection(encoder: nn.Module) -> None:
    """Warn if the official text_projection is not the known one.

    It is square, so a transposed one raises no error: the official [0, 1] is -0.0037.
    """
    weight = encoder.text_projection.weight
    if weight.shape != (1280, 1280) or abs(weight[0, 1].item() + 0.0037) <= 5e-4:
        return
    is_transposed = abs(weight[1, 0].item() + 0.0037) <= 5e-4
    problem = "transposed" if is_transposed else "not that of SDXL base"
    warnings.warn(
        f"text_projection of text encoder 2 is {problem} "
        f"(its [0, 1] is {weight[0, 1].item():.4f}, officially -0.0037)",
        stacklevel=2,
    )


def choose_device(
    device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[torch.device, torch.dtype]:
    """The policy: cuda, mps or cpu; bfloat16 if supported, else float16; float32 on the CPU.

    Raises ValueError for a device that is not there and a dtype that is not known.
    """
    name, chosen = str(device), str(dtype).removeprefix("torch.")
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if is_available(kind))
    elif not is_available(name):
        reason = f"device is {name}, and torch sees none here; use --device cpu"
        if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
            reason = f"device is {name}; known are auto, cpu, mps, cuda and cuda:0, cuda:1, ..."
        if name.startswith("cuda") and torch.version.cuda is None:
            reason = (
                f"device is {name}, and this torch ({torch.__version__}) is built without CUDA; "
                "install the build for your card from pytorch.org, or use --device cpu"
            )
        raise ValueError(reason)
    if chosen == "auto" and name == "cpu":
        chosen = "float32"
    elif chosen == "auto":
        # Emulated bfloat16 is slower than float16.
        emulated = name.startswith("cuda") and not torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        chosen = "float16" if emulated else "bfloat16"
    known = ("float32", "bfloat16", "float16", "float64")
    if chosen not in known:
        raise ValueError(f"dtype is {dtype}; known are auto, {', '.join(known)}")
    return torch.device(name), getattr(torch, chosen)


def is_available(device: str) -> bool:
    """Whether torch has this device: cpu, mps, cuda, or cuda:N."""
    kind, _, index = device.partition(":")
    if kind == "cuda" and torch.cuda.is_available():
        return not index or index in map(str, range(torch.cuda.device_count()))
    return device == "cpu" or (device == "mps" and torch.backends.mps.is_available())
