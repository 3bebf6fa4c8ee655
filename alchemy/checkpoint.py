"""From a checkpoint to the networks: a folder in the Hub layout, a Hub id, or one .safetensors file.

A network is built without memory (on the meta device) and takes the tensors as they are read from the mapped file: no random
initialisation, no second copy.
"""
import json
import re
import warnings
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from . import layout
from .schedule import Schedule
from .sdxl import SDXL
from .text import TextConfig, TextEncoder
from .tokenizer import Tokenizer
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig

SHIPPED = Path(__file__).resolve().parent.parent / "weights" / "mini"
CONFIGS = {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": TextConfig, "text_encoder_2": TextConfig}
BUILD = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder, "text_encoder_2": partial(TextEncoder, projection=True)}
BASE = {"unet": {}, "vae": {}, "text_encoder": {}, "text_encoder_2": dict(  # where SDXL base differs from the classes' defaults
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu", projection_dim=1280)}
EXTRAS = re.compile(r"position_ids$|logit_scale$|^model_ema\.|^denoiser\.|(^|\.)alphas_cumprod$|^v_pred$|^ztsnr$")  # known, of no use here


def load(source, device="auto", dtype="auto", *, config=None, vae=None, revision=None):
    """The SDXL checkpoint at source: a folder in the Hub layout, a Hub id ("stabilityai/stable-diffusion-xl-base-1.0"), or one
    .safetensors file. Reads configurations only; each network follows when it is first used.

    device, dtype: "auto" or what torch takes (see choose_device). config: a folder whose configurations hold for a single file
    (SDXL base without). vae: a folder, file or Hub id that replaces the VAE. revision: a Hub branch, tag or commit.
    Raises ValueError, in one line, for what is not there, not whole, or of another family.
    """
    device, dtype = choose_device(device, dtype)
    half = dtype.itemsize == 2
    root = find(source, half, revision)
    folder = root if root.is_dir() else find(config, half) if config else None  # None: SDXL base
    places = dict.fromkeys(BUILD, root)
    configs = {name: config_of(folder, name) for name in BUILD}
    if vae:
        places["vae"] = find(vae, half)
        configs["vae"] = config_of(places["vae"], "vae") if places["vae"].is_dir() else {}
    schedule = config_of(folder, "scheduler", "scheduler_config.json")
    if root.is_file():
        tensors = Tensors([root])
        check_family(root, tensors)
        schedule |= {"prediction_type": "v_prediction"} if "v_pred" in tensors.files else {}
        schedule |= {"rescale_betas_zero_snr": True} if "ztsnr" in tensors.files else {}
    else:
        check_folder(root, configs["unet"])
    configs = {name: kind.from_config(configs[name] or BASE[name]) for name, kind in CONFIGS.items()}

    def read(name, dtype):
        with torch.device("meta"):
            network = BUILD[name](configs[name])
        place = places[name]
        fill(network, name, Tensors([place] if place.is_file() else weight_files(place, name, half)), dtype, device)
        if name == "text_encoder_2":
            check_projection(network)
        return network

    # A single file brings no vocabulary; it is the same for all SDXL, and the one that ships serves.
    words = folder if folder and (folder / "tokenizer").is_dir() else SHIPPED
    tokenizers = tuple(Tokenizer.from_folder(words / name) for name in ("tokenizer", "tokenizer_2"))
    index = config_of(folder, "", "model_index.json")
    return SDXL(str(source), read, configs, tokenizers, Schedule.from_config(schedule), device, dtype,
                zeros_for_none=index.get("force_zeros_for_empty_prompt", True))


def find(source, half=False, revision=None):
    """The path of a folder or file; a Hub id is fetched (only the files needed) or, offline, taken from the Hub's cache."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or path.parent.exists():
        raise ValueError(f"{source}: no such folder or file, nor is it a Hub id like stabilityai/stable-diffusion-xl-base-1.0")
    import huggingface_hub as hub
    try:
        names = hub.list_repo_files(str(source), revision=revision)
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as error:
        raise ValueError(f"{source}: not on the Hub, or not open to you ({str(error).splitlines()[0]})") from None
    except (hub.errors.OfflineModeIsEnabled, hub.errors.HfHubHTTPError, OSError):
        names = None  # no connection: what is in the cache has to do
    wanted = names and [name for name in names if re.fullmatch(r"(\w+/)?(\w+\.json|merges\.txt)", name)]
    for part in ("unet/", "vae/", "text_encoder/", "text_encoder_2/", ""):
        wanted = wanted and wanted + [part + name for name in choose_weights([n[len(part):] for n in names if n.startswith(part)], half)]
    try:
        return Path(hub.snapshot_download(str(source), revision=revision, allow_patterns=wanted, local_files_only=names is None))
    except hub.errors.LocalEntryNotFoundError:
        raise ValueError(f"{source}: no connection to the Hub, and it is not in the cache; a folder or file works offline") from None


def choose_weights(names, half):
    """Of the file names in a network's folder, those to read: one file or its shards, the .fp16. ones first where half is wanted."""
    for variant in (r"\.fp16", "") if half else ("", r"\.fp16"):
        for shard in ("", r"-\d{5}-of-\d{5}"):
            chosen = sorted(n for n in names if re.fullmatch(rf"(diffusion_pytorch_)?model{variant}{shard}\.safetensors", n))
            if chosen:
                return chosen
    return []


def weight_files(root, name, half):
    """The weight files of one network. Raises ValueError where there are none, or where a shard is missing."""
    folder = root / name if (root / name).is_dir() else root
    names = sorted(p.name for p in folder.iterdir())
    chosen = choose_weights(names, half)
    if not chosen:
        pickles = [n for n in names if n.endswith((".bin", ".ckpt", ".pt"))]
        raise ValueError(f"{folder}: no safetensors weights" + (f", only {pickles[0]}, a pickle, which is never read" if pickles else ""))
    shards = re.search(r"-of-(\d+)", chosen[0])
    if shards and len(chosen) != int(shards[1]):
        raise ValueError(f"{folder}: {len(chosen)} of {int(shards[1])} shards are there; download the others")
    return [folder / n for n in chosen]


def config_of(folder, name, file="config.json"):
    """A configuration as a dict; {} without a folder, or where a checkpoint has no such file. A VAE alone has it at the top."""
    for path in (folder / name / file, folder / file) if folder else ():
        if path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}: not valid JSON ({error})") from None
    return {}


def check_family(path, tensors):
    """Raise ValueError that names what a single file is, where it is not SDXL base or a fine-tune of it."""
    unknown = [k for k in tensors if not k.startswith(tuple(layout.PREFIX.values())) and not EXTRAS.search(k)]
    marks = (("lora_", "a LoRA: give it with --lora"), ("cond_stage_model.", "Stable Diffusion 1 or 2"), ("double_blocks.", "Flux"),
             ("joint_blocks.", "Stable Diffusion 3"), ("conditioner.embedders.0.model.", "the SDXL refiner"))
    for mark, family in marks:
        if any(mark in k for k in unknown):
            raise ValueError(f"{path}: this is {family}, not an SDXL base checkpoint")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    if first not in tensors.files:
        raise ValueError(f"{path}: not an SDXL checkpoint, it has no {first}; its first tensors are {', '.join(list(tensors)[:3])}")
    if tensors.shape(first)[1] != 4:
        raise ValueError(f"{path}: an inpainting or editing model ({tensors.shape(first)[1]} input channels), not an SDXL base checkpoint")
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} tensors of no known network: {', '.join(unknown[:3])}, ...")


def check_folder(root, unet):
    """The same for a folder, by the UNet's configuration."""
    if not unet or not (root / "unet").is_dir():
        raise ValueError(f"{root}: not a checkpoint folder, it has no unet/config.json")
    family = None
    if unet.get("in_channels", 4) != 4:
        family = f"an inpainting or editing model ({unet['in_channels']} input channels)"
    elif unet.get("addition_embed_type") != "text_time":
        family = "Stable Diffusion 1 or 2" if "cross_attention_dim" in unet else "another kind of model"
    elif not (root / "text_encoder").is_dir():
        family = "the SDXL refiner"
    if family:
        raise ValueError(f"{root}: this is {family}, not an SDXL base checkpoint")


class Tensors:
    """The tensors of one or several safetensors files, by name, read one at a time."""

    def __init__(self, paths):
        self.files = {}  # tensor name -> open file
        for path in paths:
            file = open_safetensors(path)
            self.files |= dict.fromkeys(file.keys(), file)

    def __iter__(self):
        return iter(self.files)

    def shape(self, name):
        return tuple(self.files[name].get_slice(name).get_shape())

    def __getitem__(self, name):
        return self.files[name].get_tensor(name)


def open_safetensors(path):
    """A safetensors file, open. Raises ValueError that names the file and what is wrong with it: missing, a pickle, truncated."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as f:
        start = f.read(2)
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin", ".pkl") or start == b"PK" or start[:1] == b"\x80" and start[1:] < b"\x06":
        raise ValueError(f"{path}: a pickle, which can run any code when it is read; only safetensors files are read here")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); download it again") from None


def fill(network, name, tensors, dtype, device):
    """Give each parameter of a meta-device network its tensor. Strict: one missing, left over or of another shape is a ValueError."""
    def single(key):
        return layout.single_file_name(name, key, network.config)

    spellings = ((lambda key: layout.PREFIX[name] + single(key), True), (lambda key: key, False), (single, True),
                 (lambda key: key.removeprefix("text_model."), False))  # transformers 5 leaves that out in the first encoder
    spell, is_single = max(spellings, key=lambda s: sum(s[0](key) in tensors.files for key in network.state_dict()))
    wanted = {key: spell(key) for key in network.state_dict()}
    prefix = layout.PREFIX[name] if spell is spellings[0][0] else ""
    missing = [key for key, stored in wanted.items() if stored not in tensors.files]
    extra = sorted({k for k in tensors if k.startswith(prefix) and not EXTRAS.search(k)} - set(wanted.values()))
    if missing or extra:
        raise ValueError(f"{name}: {len(missing)} tensors missing, {len(extra)} left over: {', '.join((missing + extra)[:3])}, ...")
    for key, parameter in list(network.named_parameters()):
        tensor = layout.adapt(name, key, tensors[wanted[key]]) if is_single else tensors[wanted[key]]
        if tensor.shape != parameter.shape:
            raise ValueError(f"{name}: {key} is {tuple(tensor.shape)} in the file and {tuple(parameter.shape)} by its configuration")
        owner, _, leaf = key.rpartition(".")
        setattr(network.get_submodule(owner), leaf, torch.nn.Parameter(tensor.to(device, dtype), requires_grad=False))
    return network.eval()


def check_projection(encoder):
    """Warn where the official encoder's text_projection is not the known one: it is square, so a transposed one raises no error."""
    weight = encoder.text_projection.weight
    if weight.shape == (1280, 1280) and abs(float(weight[0, 1]) + 0.0037) > 5e-4:
        transposed = abs(float(weight[1, 0]) + 0.0037) <= 5e-4
        warnings.warn("text_projection of text encoder 2 is " + ("transposed" if transposed else "not that of SDXL base") +
                      f" (its [0, 1] is {float(weight[0, 1]):.4f}, officially -0.0037)")


def choose_device(device="auto", dtype="auto"):
    """The policy: cuda, mps, cpu; bfloat16 where it is supported, else float16, float32 on the CPU."""
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no CUDA device; use --device cpu")
    if str(dtype) == "auto":
        half = torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        dtype = torch.float32 if device.type == "cpu" else half
    return device, getattr(torch, dtype) if isinstance(dtype, str) else dtype
