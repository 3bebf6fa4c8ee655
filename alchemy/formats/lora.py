"""LoRA files by the names that other tools use.

Reading looks each name up in a table of all spellings of our own layers; nothing is parsed, and what is not in the table is refused.
Written by default are kohya's names with `.alpha`, the one spelling that diffusers, ComfyUI, kohya's scripts and A1111 all read.
"""

import json
import math
import re
from itertools import count
from pathlib import Path

import torch

from .. import lora
from . import layout
from .hub import config_of
from .tensors import EMBEDDING, open_safetensors
from ..files import save_tensors

FACTS = "alchemy."  # our own keys in the header begin so
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
FORMATS = ("kohya", "diffusers", "peft")
# The ends of a pair's names, down and up: kohya's, diffusers', its text encoders', its older processors', PEFT's, and PEFT's with an adapter's name.
PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".down.weight", ".up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
)
DORA = (
    ".dora_scale",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".lora_magnitude_vector.default.weight",
)


def kohya(network, name, config):
    """unet, down_blocks.1.attentions.0.… to lora_unet_input_blocks_4_1_…: dots as underscores, the UNet's blocks by the single file."""
    inner = layout.single_file_name("unet", name, config) if network == "unet" else name
    return KOHYA[network] + inner.replace(".", "_")


def spellings(networks):
    """{what a file calls a layer: our name, with the network's before it} over every layer of networks that can hold an adapter."""
    table = {}
    for network, model in networks.items():
        for name in lora.layers(model):
            # transformers 5 has the shorter name for the first encoder's layers; peft, and diffusers' save_lora_adapter, name no network.
            names = {name, name.removeprefix("text_model.")}
            dotted = [f"{network}.{n}" for n in names] + [name] * (network == "unet")
            old = [re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1_lora", d) for d in dotted]
            joined = [
                kohya(network, name, model.config),
                *(KOHYA[network] + n.replace(".", "_") for n in names),
            ]
            table |= dict.fromkeys(
                [*joined, *dotted, *old, *("base_model.model." + d for d in dotted)],
                f"{network}.{name}",
            )
    return table


def networks_in(keys):
    """The networks that the keys of a file speak of; the UNet where they speak of none."""
    found = [
        name
        for name, prefix in KOHYA.items()
        if any(key.startswith((prefix, f"{name}.", f"base_model.model.{name}.")) for key in keys)
    ]
    return found or ["unet"]


def told_alpha(header, path):
    """What diffusers says of alpha in the header, its names having no place for it, or peft in a file beside: a function of (layer, rank)."""
    beside = (
        config_of(Path(path).parent, "adapter_config.json")
        if Path(path).name == "adapter_model.safetensors"
        else {}
    )
    told = (
        {**json.loads(header["lora_adapter_metadata"])}
        if "lora_adapter_metadata" in header
        else beside
    )

    def alpha(layer, rank):
        network = layer.partition(".")[0]
        pattern, common, root = (
            told.get(f"{network}.{key}", told.get(key))
            for key in ("alpha_pattern", "lora_alpha", "use_rslora")
        )
        own = [a for end, a in {**(pattern or {})}.items() if f".{layer}".endswith(f".{end}")]
        value = (own or [rank if common is None else common])[0]  # without a word: alpha is rank
        if type(value) not in (int, float) or root not in (None, False, True):
            raise TypeError(f"alpha is {value!r}, use_rslora {root!r}")
        return value * (rank**0.5 if root else 1)

    return alpha


def read_pairs(file, table):
    """{our layer: (down, up, alpha or None)} of an open file, by the table of spellings, and the keys that are no part of one."""
    keys, found = set(file.keys()), {}
    for key in sorted(keys):
        for down, up in PAIRS:
            stem = key.removesuffix(down)
            if (
                key.endswith(down)
                and stem + up in keys
                and stem in table
                and table[stem] not in found
            ):
                pair, alpha = (
                    (file.get_tensor(key).float(), file.get_tensor(stem + up).float()),
                    None,
                )
                if stem + ".alpha" in keys and file.get_slice(stem + ".alpha").get_shape() in (
                    [],
                    [1],
                ):
                    alpha = float(file.get_tensor(stem + ".alpha"))
                    keys -= {stem + ".alpha"}
                found[table[stem]] = (*pair, alpha)
                keys -= {key, stem + up}
    return found, keys


def read_lora(path, networks, base):
    """{our layer: (down, up, alpha)} of a file. networks: {name: network}, on any device, meta too; base: what they are called.

    Raises ValueError where a key matches no layer, or a shape does not fit.
    """
    file = open_safetensors(path)
    keys, layers = (
        list(file.keys()),
        {
            f"{network}.{name}": m
            for network, model in networks.items()
            for name, m in lora.layers(model).items()
        },
    )
    if set(keys) == set(EMBEDDING):
        raise ValueError(
            f"{path}: an embedding (a learned word), and no LoRA: sample.py and insert.py take it as --embedding"
        )
    if dora := [key for key in keys if key.endswith(DORA)]:
        raise ValueError(
            f"{path}: a DoRA ({dora[0]}), which splits a weight into length and direction; only plain LoRAs are read"
        )
    found, rest = read_pairs(file, spellings(networks))
    for layer, (down, up, _) in found.items():
        if (
            down.ndim not in (2, 4)
            or up.ndim != down.ndim
            or not len(down)
            or up.shape[1:] != (len(down), *(1 for _ in down.shape[2:]))
        ):
            raise ValueError(
                f"{path}: {layer} has down {tuple(down.shape)} and up {tuple(up.shape)}, which are no pair; the file is damaged, or no plain LoRA"
            )
        ours, theirs = tuple(layers[layer].weight.shape), (len(up), *down.shape[1:])
        if ours != theirs:
            raise ValueError(
                f"{path}: made for another base: {layer} is {ours} in {base}, {theirs} in the file; give its base with --weights"
            )
    if rest or not found:
        which = (
            f"{len(rest)} of its {len(keys)} keys match no layer of {base}: {', '.join(sorted(rest)[:3])}"
            if rest
            else "it is empty"
        )
        raise ValueError(
            f"{path}: {which}; read are LoRAs of UNet and text encoders, whole or not at all"
        )
    try:
        told = told_alpha(file.metadata() or {}, path)
        found = {
            layer: (down, up, told(layer, len(down)) if alpha is None else alpha)
            for layer, (down, up, alpha) in found.items()
        }
        wild = [
            layer
            for layer, (*pair, alpha) in found.items()
            if not (math.isfinite(alpha) and all(t.isfinite().all() for t in pair))
        ]
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{path}: lora_adapter_metadata in its header, or adapter_config.json, is no JSON object with numbers for alpha "
            f"({str(error)[:80]}); the file is damaged"
        ) from None
    if wild:
        raise ValueError(
            f"{path}: {wild[0]} has values or an alpha that are not finite; the file is damaged"
        )
    return found


def load_lora(sdxl, path, scale=1.0, name=None):
    """Put the LoRA of a file on sdxl's UNet and, if it has such keys, on its text encoders, as the adapter `name` (the next free number, if
    None), beside any others; returns the name. What sdxl.free drops loses it.

    Raises ValueError where a key matches no layer, or a shape does not fit: then nothing has been added.
    """
    networks = {
        network: sdxl.network(network) for network in networks_in(open_safetensors(path).keys())
    }
    pairs = read_lora(path, networks, sdxl.source)
    layers = lora.layers(sdxl)
    name = name or next(
        n for n in map(str, count()) if not any(n in layer.lora for layer in layers.values())
    )
    for layer, (down, up, alpha) in pairs.items():
        lora.add_adapter(layers[layer], name, down, up, alpha, scale)
    return name


def save_lora(sdxl, path, name="default", format="kohya", facts=None):
    """Write the adapter `name` of sdxl, float32. format: "kohya", or "diffusers" or "peft", whose names have no place for alpha: there
    alpha/rank is multiplied into up. facts: a dict for the header."""
    adapters = {n: m.lora[name] for n, m in lora.layers(sdxl).items() if name in m.lora}
    if not adapters:
        raise ValueError(f"there is no adapter {name!r} to save")
    write_lora(
        path,
        {n: (a.down, a.up, a.alpha) for n, a in adapters.items()},
        sdxl.configs["unet"],
        format,
        facts,
    )


def write_lora(path, pairs, config, format="kohya", facts=None):
    """{our layer: (down, up, alpha)} to a file, in one of FORMATS (see save_lora). config: the UNet's."""
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; known are {', '.join(FORMATS)}")
    tensors = {}
    for layer, (down, up, alpha) in pairs.items():
        network, _, name = layer.partition(".")
        if format == "kohya":
            stem = kohya(network, name, config)
            tensors |= {
                stem + ".lora_down.weight": down,
                stem + ".lora_up.weight": up,
                stem + ".alpha": torch.tensor(float(alpha)),
            }
        else:
            ends = PAIRS[4] if format == "peft" else PAIRS[1] if network == "unet" else PAIRS[2]
            tensors |= {layer + ends[0]: down, layer + ends[1]: up * (alpha / len(down))}
    ranks, alphas = (
        sorted(values)
        for values in (
            {len(d) for d, _, _ in pairs.values()},
            {float(a) for _, _, a in pairs.values()},
        )
    )
    # Of layers that differ, what stands for the file is the largest.
    header = {FACTS + k: v for k, v in (facts or {}).items()} | {
        FACTS + "rank": ranks[-1],
        FACTS + "alpha": alphas[-1],
        "format": "pt",
        # What kohya's tools and A1111 show of a LoRA:
        "ss_network_dim": str(ranks[-1]),
        "ss_network_alpha": str(alphas[-1]),
        "ss_base_model_version": "sdxl_base_v1-0",
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path, header)
