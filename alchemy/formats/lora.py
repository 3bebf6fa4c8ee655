"""LoRA files in the names of kohya, diffusers, peft, ComfyUI, OneTrainer and LyCORIS.

A file's keys are split into a layer and a part. Layers are looked up in a table of every known
name of our own layers; nothing is guessed, and a key that is not in the tables is refused.

    kohya              lora_unet_input_blocks_4_1_…_attn1_to_q.lora_down.weight
    diffusers          unet.down_blocks.1.attentions.0.….attn1.to_q.lora.down.weight
    peft               base_model.model.down_blocks.1.….attn1.to_q.lora_A.weight
    ComfyUI            diffusion_model.input_blocks.4.1.….attn1.to_q.lora_A.weight
    OneTrainer         input_blocks.4.1.….attn1.to_q.lora_down.weight
    SimpleTuner        lycoris_down_blocks_1_…_attn1_to_q.lokr_w1

Written by default are kohya's names with `.alpha`, which every tool reads.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import lora
from ..arguments import checked
from ..files import lora_of_run, save_tensors
from ..sdxl import SDXL
from ..unet import UNetConfig
from . import layout
from .configs import read_config
from .embeddings import BUNDLE, KEYS, METADATA, load_bundle
from .tensors import first_names, open_safetensors, read_tensor
from .text import parse_json_object, shorten
from .updates import FullAdapter, build_adapter, split_key

FORMATS = ("kohya", "diffusers", "peft")
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
PEFT = "base_model.model."
# What the dotted names of a network begin with: diffusers, peft, OneTrainer, ComfyUI.
PREFIXES = {
    "unet": ("", "unet.", PEFT, PEFT + "unet.", "lora_unet.", "diffusion_model.")
    + (layout.PREFIX["unet"],),
    "text_encoder": ("text_encoder.", PEFT + "text_encoder.", "lora_te1.", "clip_l.")
    + ("text_encoders.clip_l.transformer.",),
    "text_encoder_2": ("text_encoder_2.", PEFT + "text_encoder_2.", "lora_te2.", "clip_g.")
    + ("text_encoders.clip_g.transformer.",),
}
PEFT_CONFIG = "lora_adapter_metadata"  # in the header, where diffusers writes peft's configuration
# What is named and refused, by a pattern in a key.
UNSUPPORTED = {
    r"\.dora_scale|\.lora_magnitude_vector": "a DoRA",
    r"\.b?oft_": "an OFT",
    r"\.ia3_l|\.on_input": "an IA3",
    r"\.diff_b": "a full update with biases",
    r"\.[wb]_norm": "an update of norm layers",
    r"\.a1\.weight": "a GLoRA",
}
MAX_PATTERNS = 2000  # in alpha_pattern; SDXL has about 800 layers
MAX_QUANTIFIERS = 3  # in one of its regular expressions, so that matching stays fast


# Names


def kohya_name(network: str, name: str, config: UNetConfig) -> str:
    """kohya's name of a layer: the single file's, with underscores for dots."""
    inner = layout.single_file_name("unet", name, config) if network == "unet" else name
    return KOHYA[network] + inner.replace(".", "_")


def key_names(network: str, name: str, config: UNetConfig) -> Iterator[str]:
    """Every name that a file may give a layer."""
    underscored = [KOHYA[network]]
    if network == "unet":
        underscored.append("lycoris_")
        # diffusers before 0.22 kept LoRA in attention processors.
        old = re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1_lora", name)
        inner_names = {name, layout.single_file_name("unet", name, config), old}
    else:
        # transformers 5 omits "text_model." in encoder 1.
        inner_names = {name, name.removeprefix("text_model.")}
    for inner in inner_names:
        for prefix in PREFIXES[network]:
            yield prefix + inner
        for prefix in underscored:
            yield prefix + inner.replace(".", "_")


def known_key_names(networks: dict[str, nn.Module]) -> dict[str, str]:
    """{what a file may call a layer: "network.name"} for every layer that can hold an adapter."""
    table = {}
    for network, model in networks.items():
        for name in lora.layers(model):
            names = key_names(network, name, model.config)
            table |= dict.fromkeys(names, f"{network}.{name}")
    return table


def networks_in(keys: Iterable[str]) -> list[str]:
    """The networks that a file's keys belong to; keys of no text encoder are the UNet's."""
    found = set()
    for key in keys:
        owner = "unet"
        for network in ("text_encoder", "text_encoder_2"):
            if key.startswith((*PREFIXES[network], KOHYA[network])):
                owner = network
        if not key.startswith(BUNDLE):
            found.add(owner)
    return [network for network in KOHYA if network in found] or ["unet"]


# Alpha


def alpha_from_metadata(metadata: dict[str, str], path: Path) -> Callable[[str, int], float]:
    """alpha as a function of (layer, rank), for files whose keys do not hold it.

    diffusers writes peft's configuration into the header, one per network; peft writes it beside
    the file. Without either, alpha is the rank. alpha_pattern maps regular expressions to alphas,
    matched as peft does. Ranks (rank_pattern) are those of the tensors themselves.
    Raises ValueError if the configuration is damaged.
    """
    config = {}
    if PEFT_CONFIG in metadata:
        try:
            config = parse_json_object(metadata[PEFT_CONFIG])
        except ValueError as error:
            raise ValueError(f"{PEFT_CONFIG} in its header: {shorten(error)}") from None
    elif path.name == "adapter_model.safetensors":
        config = read_config(path.with_name("adapter_config.json"))

    def setting(network: str, name: str) -> Any:
        return config.get(f"{network}.{name}", config.get(name))

    patterns = {name: compile_patterns(setting(name, "alpha_pattern") or {}) for name in KOHYA}

    def alpha(layer: str, rank: int) -> float:
        network, _, name = layer.partition(".")
        value = setting(network, "lora_alpha")
        for pattern, pattern_alpha in patterns[network]:
            if pattern.match(name) or pattern.match(name.removeprefix("text_model.")):
                value = pattern_alpha
                break
        value = rank if value is None else value
        rslora = setting(network, "use_rslora")
        known = type(value) in (int, float) and abs(value) < 1e30  # False for NaN
        if not known or rslora not in (None, False, True):
            raise ValueError(
                f"{PEFT_CONFIG} (or adapter_config.json) has alpha {shorten(repr(value))} and "
                f"use_rslora {shorten(rslora)}"
            )
        return float(value) * (rank**0.5 if rslora else 1.0)

    return alpha


def compile_patterns(table: object) -> list[tuple[re.Pattern, object]]:
    """An alpha_pattern; patterns that could take very long to match are refused."""
    if not isinstance(table, dict) or len(table) > MAX_PATTERNS:
        raise ValueError(f"{PEFT_CONFIG} has an alpha_pattern that is no object or too large")
    patterns = []
    for key, alpha in table.items():
        quantifiers = re.findall(r"[*+?{]", key)
        if len(key) > 300 or len(quantifiers) > MAX_QUANTIFIERS or re.search(r"\)[*+{]", key):
            raise ValueError(f"{PEFT_CONFIG} has the pattern {shorten(key)}, which is too complex")
        try:
            patterns.append((re.compile(rf"(.*\.)?({key})$"), alpha))
        except re.error as error:
            raise ValueError(f"{PEFT_CONFIG} has the pattern {shorten(key)}: {error}") from None
    return patterns


# Reading


def split_keys(
    keys: Iterable[str], table: dict[str, str]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """({layer: {part: key}}, keys that match no layer). Raises ValueError for a part twice."""
    layers, rest = {}, []
    for key in sorted(keys):
        name, part = split_key(key) or (None, None)
        if name not in table:
            rest.append(key)
            continue
        layer = table[name]
        if part in layers.setdefault(layer, {}):
            raise ValueError(f"{layer} is in the file twice, as {shorten(key)} and another key")
        layers[layer][part] = key
    return layers, rest


def read_lora(
    path: str | Path, networks: dict[str, nn.Module], base: str
) -> dict[str, lora.Adapter]:
    """{layer: its adapter at scale 1, float32 on the CPU} of a file.

    networks: {name: network}, on the meta device too; base: their checkpoint, for messages.
    Raises ValueError if a key matches no layer, a shape does not fit, or a value is not finite.
    """
    file = open_safetensors(path)
    keys = [key for key in file.keys() if not key.startswith(BUNDLE)]  # noqa: SIM118
    if set(keys) == set(KEYS):
        raise ValueError(
            f"{path}: an embedding, not a LoRA: sample.py and insert.py take it as --embedding"
        )
    for pattern, kind in UNSUPPORTED.items():
        found = [key for key in keys if re.search(pattern, key)]
        if found:
            raise ValueError(f"{path}: {kind} ({first_names(found, 1)}), which is not supported")
    try:
        parts, rest = split_keys(keys, known_key_names(networks))
        alpha_of = alpha_from_metadata(file.metadata() or {}, Path(path))
        adapters = {}
        for layer, part_keys in parts.items():
            network, _, name = layer.partition(".")
            shape = tuple(networks[network].get_submodule(name).weight.shape)
            tensors = {part: read_tensor(file, key) for part, key in part_keys.items()}
            adapters[layer] = build_adapter(layer, tensors, shape, alpha_of, base)
        # After the layers, so that a LoRA for another base is called that.
        if rest or not keys:
            problem = f"{len(rest)} of its {len(keys)} keys match no layer of {base}"
            problem = f"{problem}: {first_names(rest)}" if rest else "it is empty"
            raise ValueError(f"{problem}; only LoRAs of UNet and text encoders are read")
        return adapters
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None


@checked
def load_lora(
    sdxl: SDXL,
    path: str | Path,
    scale: float = 1.0,
    name: str | None = None,
    embeddings: bool = True,
) -> str:
    """Add the LoRA in a file to sdxl, beside any others, and return its name.

    path: the file, or the folder of a run of train.py, diffusers or peft.
    scale: 0 is off, 1 as trained. name: of the adapter (default: the next free number). Text
    encoders get adapters if the file has such keys; sdxl.free(...) drops them with the network.
    embeddings: add those that OneTrainer has bundled with the LoRA, as tokens.
    Raises ValueError if the file does not fit; then nothing has been added.
    """
    path = lora_of_run(path)
    file = open_safetensors(path)
    networks = {network: sdxl.network(network) for network in networks_in(file.keys())}
    adapters = read_lora(path, networks, sdxl.source)
    layers = lora.layers(sdxl)
    if any(layer.base_weight is not None for layer in layers.values()):
        raise ValueError(f"{path}: adapters are merged; unmerge before another one is added")
    if embeddings:
        load_bundle(sdxl, path)
    taken = set()
    for layer in layers.values():
        taken |= {*layer.lora}
    if name is None:
        name = next(number for number in map(str, count()) if number not in taken)
    for layer, adapter in adapters.items():
        adapter.scale = scale
        layers[layer].lora[name] = adapter.to(layers[layer].weight.device)
    return name


# Writing


@checked
def save_lora(
    sdxl: SDXL,
    path: str | Path,
    name: str = "default",
    format: str = "kohya",
    metadata: dict | None = None,
) -> None:
    """Write the adapter `name` of sdxl to a .safetensors file, float32, without its scale.

    format: "kohya", which every tool reads; "diffusers" or "peft", whose names have no place for
    alpha: it is multiplied into up. metadata: for the header, under "alchemy.".
    Raises ValueError if there is no such adapter or format.
    """
    adapters = {}
    for layer_name, layer in lora.layers(sdxl).items():
        if name in layer.lora:
            adapters[layer_name] = layer.lora[name]
    if not adapters:
        raise ValueError(f"there is no adapter {name!r} to save")
    write_lora(path, adapters, sdxl.configs["unet"], format, metadata)


def write_lora(
    path: str | Path,
    adapters: dict[str, lora.Adapter],
    config: UNetConfig,
    format: str = "kohya",
    metadata: dict | None = None,
) -> None:
    """Write {layer: adapter} to a file; see save_lora. config: the UNet's."""
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; known are {', '.join(FORMATS)}")
    tensors = {}
    for layer, adapter in adapters.items():
        if isinstance(adapter, FullAdapter):
            raise ValueError(
                f"{layer} has an update of full rank (LoHa, LoKr or .diff), which a LoRA file "
                "cannot hold; merge it into a checkpoint instead (--merge)"
            )
        tensors |= named_tensors(layer, adapter, config, format)
    rank = max(len(adapter.down) for adapter in adapters.values())
    alpha = max(adapter.alpha for adapter in adapters.values())
    header = {METADATA + key: value for key, value in (metadata or {}).items()}
    header |= {METADATA + "rank": rank, METADATA + "alpha": alpha, "format": "pt"}
    # What kohya's tools and A1111 show; if layers differ, the largest.
    header |= {
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": "sdxl_base_v1-0",
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path, header)


def named_tensors(
    layer: str, adapter: lora.Adapter, config: UNetConfig, format: str
) -> dict[str, Tensor]:
    """The tensors of one layer's adapter under the names of a format."""
    network, _, name = layer.partition(".")
    if format == "kohya":
        stem = kohya_name(network, name, config)
        return {
            f"{stem}.lora_down.weight": adapter.down,
            f"{stem}.lora_up.weight": adapter.up,
            f"{stem}.alpha": torch.tensor(adapter.alpha),
        }
    up = adapter.up * (adapter.alpha / len(adapter.down))
    if format == "peft":
        return {f"{layer}.lora_A.weight": adapter.down, f"{layer}.lora_B.weight": up}
    inner = "lora" if network == "unet" else "lora_linear_layer"
    return {f"{layer}.{inner}.down.weight": adapter.down, f"{layer}.{inner}.up.weight": up}
