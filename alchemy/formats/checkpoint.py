"""From a checkpoint to the networks: a folder in the Hub layout, a Hub id, or one .safetensors file.

A network is built without memory (on the meta device) and takes the tensors as they are read from the mapped file: no random
initialisation, no second copy.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import torch
from torch.overrides import TorchFunctionMode

from . import layout
from .family import check_family, check_folder
from .hub import config_of, find, weight_files
from .layout import EXTRAS
from .tensors import names_in
from ..schedule import Schedule
from ..sdxl import SDXL
from ..clip import TextConfig, TextEncoder
from ..tokenizer import Tokenizer
from ..unet import UNet, UNetConfig
from ..vae import VAE, VAEConfig

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
BASE = {
    "unet": {},
    "vae": {},
    "text_encoder": {},
    "text_encoder_2": dict(  # where SDXL base differs from the classes' defaults
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
        projection_dim=1280,
    ),
}


@dataclass(frozen=True)
class Reader:
    """SDXL.read of a loaded checkpoint, and what a folder of it has to hold beside the weights (see folder.save_checkpoint)."""

    device: torch.device
    configs: dict  # {network: its configuration}
    files: dict  # {network: its weight files}
    written: dict  # {path in the Hub layout: the JSON object there}, {} for what is not there
    vocabulary: Path  # the folder of tokenizer and tokenizer_2
    ready: Callable = None  # called with each layer of the UNet as it is filled, and with the whole at the end (see optimizations.prepare)

    def __call__(self, name, dtype):
        """The network of that name, filled."""
        network = empty(name, self.configs[name])
        ready = self.ready if name == "unet" else None
        fill(network, name, self.files[name], dtype, self.device, ready)
        if ready:
            ready(network)
        if name == "text_encoder_2":
            check_projection(network)
        return network


def load(source, device="auto", dtype="auto", *, config=None, vae=None, revision=None):
    """The SDXL checkpoint at source: a folder in the Hub layout, a Hub id ("stabilityai/stable-diffusion-xl-base-1.0"), or one
    .safetensors file. Reads configurations only; each network follows when it is first used.

    device, dtype: "auto" or what torch takes (see choose_device). config: a folder whose configurations hold for a single file
    (SDXL base without). vae: a folder, file or Hub id that replaces the VAE. revision: a Hub branch, tag or commit.
    Raises ValueError, in one line, for what is not there, not whole, or of another family.
    """
    device, dtype = choose_device(device, dtype)
    half = dtype.itemsize == 2
    root = find(source, [name for name in BUILD if name != "vae" or not vae], half, revision)
    if config and root.is_dir():
        raise ValueError(
            f"{root}: a folder has configurations of its own; those of {config} are for a single file"
        )
    folder = root if root.is_dir() else find(config) if config else None  # None: SDXL base
    places = dict.fromkeys(BUILD, root) | ({"vae": find(vae, ["vae", ""], half)} if vae else {})
    configs = {name: config_of(folder, f"{name}/config.json") for name in BUILD}
    configs["vae"] = (
        config_of(places["vae"], "vae/config.json", "config.json") or configs["vae"]
    )  # a VAE alone has it at the top
    schedule, index = (
        config_of(folder, "scheduler/scheduler_config.json"),
        config_of(folder, "model_index.json"),
    )
    if folder:
        check_folder(folder, configs, index.get("_class_name"))
    if root.is_file():
        tensors = names_in([root])
        check_family(root, tensors)
        schedule |= {"prediction_type": "v_prediction"} if "v_pred" in tensors else {}
        # From pure noise, where such a model was taught to start, only a trailing grid starts. Lin et al. 2023, 3.3.
        schedule |= (
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            if "ztsnr" in tensors
            else {}
        )
    written = {f"{name}/config.json": config for name, config in configs.items()}
    written |= {"scheduler/scheduler_config.json": schedule, "model_index.json": index}
    configs = {
        name: kind.from_config(configs[name] or BASE[name]) for name, kind in CONFIGS.items()
    }
    files = {
        name: [place] if place.is_file() else weight_files(place, name, half)
        for name, place in places.items()
    }
    # A single file brings no vocabulary; it is the same for all SDXL, and the one that ships serves.
    words = folder if folder and (folder / "tokenizer").is_dir() else VOCABULARY
    tokenizers = tuple(Tokenizer.from_folder(words / name) for name in ("tokenizer", "tokenizer_2"))
    read = Reader(device, configs, files, written, words)
    return SDXL(
        str(source),
        read,
        configs,
        tokenizers,
        Schedule.from_config(schedule),
        device,
        dtype,
        zeros_for_none=index.get("force_zeros_for_empty_prompt", True),
    )


def empty(name, config):
    """The network of that name without weights: names and shapes alone."""
    with torch.device("meta"), Blank():
        return BUILD[name](config)


class Blank(
    TorchFunctionMode
):  # inside, torch.nn.init does nothing: on the meta device it would import a compiler (3 s, 70 MB)
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (
            func(*args, **(kwargs or {}))
            if getattr(func, "__module__", None) != "torch.nn.init"
            else None
        )


def fill(network, name, paths, dtype, device, ready=None):
    """Give each parameter of a meta-device network its tensor. Strict: one missing, left over or of another shape is a ValueError.

    ready(layer) is called when a layer has got one more."""
    tensors, keys = names_in(paths), list(network.state_dict())
    single = {key: layout.single_file_name(name, key, network.config) for key in keys}
    prefixed = {key: layout.PREFIX[name] + single[key] for key in keys}
    shorter = {
        key: key.removeprefix("text_model.") for key in keys
    }  # transformers 5 writes the first encoder so
    wanted = max(
        prefixed,
        dict(zip(keys, keys)),
        single,
        shorter,
        key=lambda names: sum(n in tensors for n in names.values()),
    )
    prefix, is_single = (
        layout.PREFIX[name] if wanted is prefixed else "",
        wanted is prefixed or wanted is single,
    )
    missing = [key for key, stored in wanted.items() if stored not in tensors]
    extra = sorted(
        {k for k in tensors if k.startswith(prefix) and not EXTRAS.search(k)} - set(wanted.values())
    )
    if missing or extra:
        first = ", ".join((missing + extra)[:3])
        raise ValueError(
            f"{paths[0]}: {name}: {len(missing)} tensors missing, {len(extra)} left over: {first}"
        )
    for key, parameter in list(network.named_parameters()):
        tensor = tensors[wanted[key]].get_tensor(wanted[key])
        tensor = layout.adapt(name, key, tensor) if is_single else tensor
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{paths[0]}: {name}: {key} is {tuple(tensor.shape)}, and {tuple(parameter.shape)} by its configuration"
            )
        owner, _, leaf = key.rpartition(".")
        # Convolutions are faster where a place's channels lie together, and everything behind them follows their format.
        form = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        parameter = torch.nn.Parameter(
            tensor.to(device, dtype).contiguous(memory_format=form), requires_grad=False
        )
        setattr(network.get_submodule(owner), leaf, parameter)
        if ready:
            ready(network.get_submodule(owner))
    return network.eval()


def check_projection(encoder):
    """Warn where the official encoder's text_projection is not the known one: it is square, so a transposed one raises no error."""
    weight = encoder.text_projection.weight
    if weight.shape == (1280, 1280) and abs(float(weight[0, 1]) + 0.0037) > 5e-4:
        transposed = abs(float(weight[1, 0]) + 0.0037) <= 5e-4
        warnings.warn(
            "text_projection of text encoder 2 is "
            + ("transposed" if transposed else "not that of SDXL base")
            + f" (its [0, 1] is {float(weight[0, 1]):.4f}, officially -0.0037)"
        )


def choose_device(device="auto", dtype="auto"):
    """The policy: cuda, mps, cpu; bfloat16 where it is supported, else float16, float32 on the CPU."""
    available = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    name = (
        next(kind for kind, there in available.items() if there())
        if str(device) == "auto"
        else str(device)
    )
    kind = name.partition(":")[0]
    index = name.partition(":")[2]
    if (
        kind not in available
        or not available[kind]()
        or kind == "cuda"
        and index
        and index not in map(str, range(torch.cuda.device_count()))
    ):
        raise ValueError(f"device is {name}, and torch sees none here; use --device cpu")
    if str(dtype) == "auto":
        half = (
            torch.bfloat16
            if kind != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
        dtype = torch.float32 if kind == "cpu" else half
    known = {kind: getattr(torch, kind) for kind in ("float32", "bfloat16", "float16", "float64")}
    if str(dtype).removeprefix("torch.") not in known:
        raise ValueError(f"dtype is {dtype}; known are auto, {', '.join(known)}")
    return torch.device(name), known[str(dtype).removeprefix("torch.")]
