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
from torch.overrides import TorchFunctionMode

from . import layout
from ..schedule import Schedule
from ..sdxl import SDXL
from ..text import TextConfig, TextEncoder
from ..tokenizer import Tokenizer
from ..unet import UNet, UNetConfig
from ..vae import VAE, VAEConfig

VOCABULARY = Path(__file__).resolve().parents[2] / "weights" / "mini"
CONFIGS = {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": TextConfig, "text_encoder_2": TextConfig}
BUILD = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder, "text_encoder_2": partial(TextEncoder, projection=True)}
BASE = {"unet": {}, "vae": {}, "text_encoder": {}, "text_encoder_2": dict(  # where SDXL base differs from the classes' defaults
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu", projection_dim=1280)}
EXTRAS = re.compile(r"position_ids$|logit_scale$|^model_ema\.|^denoiser\.|(^|\.)alphas_cumprod$|^v_pred$|^ztsnr$")  # known, of no use here
FAMILIES = {  # by what stands in some tensor's name
    r"lora[_.]": "a LoRA (give it with --lora)", r"^cond_stage_model\.": "Stable Diffusion 1 or 2", r"joint_blocks\.": "Stable Diffusion 3",
    r"double_blocks\.|single_transformer_blocks\.": "Flux", r"^conditioner\.embedders\.0\.model\.": "the SDXL refiner"}
HUB = {"GatedRepoError": "gated: accept its terms on huggingface.co and log in with hf auth login",
       "RepositoryNotFoundError": "not on the Hub, or private", "RevisionNotFoundError": "no such revision on the Hub"}


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
        raise ValueError(f"{root}: a folder has configurations of its own; those of {config} are for a single file")
    folder = root if root.is_dir() else find(config) if config else None  # None: SDXL base
    places = dict.fromkeys(BUILD, root) | ({"vae": find(vae, ["vae", ""], half)} if vae else {})
    configs = {name: config_of(folder, f"{name}/config.json") for name in BUILD}
    configs["vae"] = config_of(places["vae"], "vae/config.json", "config.json") or configs["vae"]  # a VAE alone has it at the top
    schedule, index = config_of(folder, "scheduler/scheduler_config.json"), config_of(folder, "model_index.json")
    if folder:
        check_folder(folder, configs, index.get("_class_name"))
    if root.is_file():
        tensors = names_in([root])
        check_family(root, tensors)
        schedule |= {"prediction_type": "v_prediction"} if "v_pred" in tensors else {}
        # From pure noise, where such a model was taught to start, only a trailing grid starts. Lin et al. 2023, 3.3.
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in tensors else {}
    configs = {name: kind.from_config(configs[name] or BASE[name]) for name, kind in CONFIGS.items()}
    files = {name: [place] if place.is_file() else weight_files(place, name, half) for name, place in places.items()}

    def read(name, dtype):
        network = empty(name, configs[name])
        fill(network, name, files[name], dtype, device)
        if name == "text_encoder_2":
            check_projection(network)
        return network

    # A single file brings no vocabulary; it is the same for all SDXL, and the one that ships serves.
    words = folder if folder and (folder / "tokenizer").is_dir() else VOCABULARY
    tokenizers = tuple(Tokenizer.from_folder(words / name) for name in ("tokenizer", "tokenizer_2"))
    return SDXL(str(source), read, configs, tokenizers, Schedule.from_config(schedule), device, dtype,
                zeros_for_none=index.get("force_zeros_for_empty_prompt", True))


def empty(name, config):
    """The network of that name without weights: names and shapes alone."""
    with torch.device("meta"), Blank():
        return BUILD[name](config)


def find(source, networks=(), half=False, revision=None):
    """The path of a folder or file; a Hub id is fetched (configurations and those networks' weights) or taken from the Hub's cache."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or path.parent.exists():
        raise ValueError(f"{source}: no such folder or file, nor is it a Hub id like stabilityai/stable-diffusion-xl-base-1.0")
    import huggingface_hub as hub
    from huggingface_hub.errors import HTTPError
    failures = (OSError, HTTPError)  # the second is the HTTP library's, whose connection errors need not be OSErrors
    try:
        names, offline = [file.rfilename for file in hub.model_info(str(source), revision=revision).siblings], None
        wanted = [n for n in names if re.fullmatch(r"((unet|vae|scheduler|text_encoder(_2)?|tokenizer(_2)?)/)?(\w+\.json|merges\.txt)", n)]
        for part in (f"{network}/".lstrip("/") for network in networks):
            wanted += [part + name for name in choose_weights([n[len(part):] for n in names if n.startswith(part)], half)]
    except failures as error:  # what is in the cache has to do; without these two names it would have to be the whole repository
        wanted, offline = ["config.json", "unet/config.json"], error
    try:
        return Path(hub.snapshot_download(str(source), revision=revision, allow_patterns=wanted, local_files_only=offline is not None))
    except failures as error:
        error = offline or error
        words = HUB.get(type(error).__name__, "cannot be fetched, and the Hub's cache does not hold it; a folder or file works offline")
        raise ValueError(f"{source}: {words} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})") from None


def choose_weights(names, half):
    """Of the file names in a network's folder, those to read: one file or its shards, the .fp16. ones first where half is wanted."""
    for variant in (r"\.fp16", "") if half else ("", r"\.fp16"):
        for ending in (variant, rf"{variant}-\d{{5}}-of-\d{{5}}", rf"-\d{{5}}-of-\d{{5}}{variant}"):  # libraries differ
            chosen = sorted(n for n in names if re.fullmatch(rf"(diffusion_pytorch_)?model{ending}\.safetensors", n))
            if chosen:
                return chosen
    return []


def weight_files(root, name, half):
    """The weight files of one network. Raises ValueError where there are none, or where a shard is missing."""
    folder = root / name if (root / name).is_dir() else root
    if not (chosen := choose_weights([p.name for p in folder.iterdir()], half)):
        raise ValueError(f"{folder}: no safetensors weights here (.bin and .ckpt files are pickles, which are never read)")
    shards = re.search(r"-of-(\d+)", chosen[0])
    whole = [re.sub(r"\d{5}-of", f"{i + 1:05d}-of", chosen[0]) for i in range(int(shards[1]))] if shards else chosen
    if lost := [n for n in whole if n not in chosen]:
        raise ValueError(f"{folder}: {len(lost)} of {len(whole)} shards are missing: {', '.join(lost[:3])}")
    return [folder / n for n in chosen]


def config_of(folder, *names):
    """The first of the named files that is there, a JSON object, as a dict; {} where there is none, or no folder."""
    for path in (folder / name for name in names if folder):
        if path.is_file():
            try:
                return {**json.loads(path.read_text(encoding="utf-8"))}
            except (ValueError, TypeError, OSError) as error:
                raise ValueError(f"{path}: not a valid JSON object ({error})") from None
    return {}


def check_family(path, tensors):
    """Raise ValueError that names what a single file is, where it is not SDXL base or a fine-tune of it."""
    for mark, family in FAMILIES.items():
        if any(re.search(mark, k) for k in tensors):
            raise ValueError(f"{path}: this is {family}, not an SDXL base checkpoint")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    if first not in tensors:
        raise ValueError(f"{path}: not an SDXL checkpoint, it has no {first}; its first tensors are {', '.join(list(tensors)[:3])}")
    shape = tensors[first].get_slice(first).get_shape()
    if shape[1:2] != [4]:
        raise ValueError(f"{path}: this is an inpainting or editing model ({first} is {shape}), not an SDXL base checkpoint")
    unknown = [k for k in tensors if not k.startswith(tuple(layout.PREFIX.values())) and not EXTRAS.search(k)]
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} tensors of no known network: {', '.join(unknown[:3])}")


def check_folder(root, configs, pipeline):
    """The same for a folder, by its configurations; pipeline: what class its model_index.json names, if any."""
    unet, family = configs["unet"], None
    if not unet:
        family = "a LoRA (give its file with --lora)" if list(root.glob("*lora*.safetensors")) else pipeline and f"made for {pipeline}"
    elif unet.get("in_channels", 4) != 4:
        family = f"an inpainting or editing model ({unet['in_channels']} input channels)"
    elif unet.get("addition_embed_type") != "text_time":
        family = "Stable Diffusion 1 or 2" if "cross_attention_dim" in unet else "another kind of model"
    elif not configs["text_encoder"]:
        family = "the SDXL refiner"
    if family:
        raise ValueError(f"{root}: this is {family}, not an SDXL base checkpoint")
    for name in (name for name in configs if not configs[name]):
        raise ValueError(f"{root}: not a checkpoint folder, it has no {name}/config.json")


class Blank(TorchFunctionMode):  # inside, torch.nn.init does nothing: on the meta device it would import a compiler (3 s, 70 MB)
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {})) if getattr(func, "__module__", None) != "torch.nn.init" else None


def names_in(paths):
    """{tensor name: the open file that holds it}; a tensor is read by get_tensor, one at a time."""
    return {key: file for file in map(open_safetensors, paths) for key in file.keys()}


def open_safetensors(path):
    """A safetensors file, open. Raises ValueError that names the file and what is wrong with it: missing, a pickle, truncated."""
    try:
        return safe_open(path, "pt")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        with open(path, "rb") as f:
            start = f.read(2)
        if Path(path).suffix in (".ckpt", ".pt", ".pth", ".bin", ".pkl") or start == b"PK" or start[:1] == b"\x80" and start[1:] < b"\x06":
            raise ValueError(f"{path}: a pickle, which can run any code when it is read; only safetensors files are read here") from None
        raise ValueError(f"{path}: not a whole safetensors file ({error}); download it again") from None


def fill(network, name, paths, dtype, device):
    """Give each parameter of a meta-device network its tensor. Strict: one missing, left over or of another shape is a ValueError."""
    tensors, keys = names_in(paths), list(network.state_dict())
    single = {key: layout.single_file_name(name, key, network.config) for key in keys}
    prefixed = {key: layout.PREFIX[name] + single[key] for key in keys}
    shorter = {key: key.removeprefix("text_model.") for key in keys}  # transformers 5 writes the first encoder so
    wanted = max(prefixed, dict(zip(keys, keys)), single, shorter, key=lambda names: sum(n in tensors for n in names.values()))
    prefix, is_single = layout.PREFIX[name] if wanted is prefixed else "", wanted is prefixed or wanted is single
    missing = [key for key, stored in wanted.items() if stored not in tensors]
    extra = sorted({k for k in tensors if k.startswith(prefix) and not EXTRAS.search(k)} - set(wanted.values()))
    if missing or extra:
        first = ", ".join((missing + extra)[:3])
        raise ValueError(f"{paths[0]}: {name}: {len(missing)} tensors missing, {len(extra)} left over: {first}")
    for key, parameter in list(network.named_parameters()):
        tensor = tensors[wanted[key]].get_tensor(wanted[key])
        tensor = layout.adapt(name, key, tensor) if is_single else tensor
        if tensor.shape != parameter.shape:
            raise ValueError(f"{paths[0]}: {name}: {key} is {tuple(tensor.shape)}, and {tuple(parameter.shape)} by its configuration")
        owner, _, leaf = key.rpartition(".")
        # Convolutions are faster where a place's channels lie together, and everything behind them follows their format.
        form = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        parameter = torch.nn.Parameter(tensor.to(device, dtype).contiguous(memory_format=form), requires_grad=False)
        setattr(network.get_submodule(owner), leaf, parameter)
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
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    name = next(kind for kind, there in available.items() if there()) if str(device) == "auto" else str(device)
    kind = name.partition(":")[0]
    if kind not in available or not available[kind]():
        raise ValueError(f"device is {name}, and torch sees none here; use --device cpu")
    if str(dtype) == "auto":
        half = torch.bfloat16 if kind != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        dtype = torch.float32 if kind == "cpu" else half
    known = {kind: getattr(torch, kind) for kind in ("float32", "bfloat16", "float16", "float64")}
    if str(dtype).removeprefix("torch.") not in known:
        raise ValueError(f"dtype is {dtype}; known are auto, {', '.join(known)}")
    return torch.device(name), known[str(dtype).removeprefix("torch.")]
