"""Small synthetic SDXL checkpoints of random weights, written in each layout that is read.

The single-file layout is written here from the other side than alchemy.formats.layout reads it: by
walking the blocks in the order in which the original code (sgm) counts them. Sizes are uneven, so
that a tensor in the wrong place has the wrong shape wherever that can be.
"""

import copy
import json
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alchemy.formats.checkpoint import CONFIGS as CONFIG_CLASSES
from alchemy.formats.checkpoint import Tokenizer, build_on_meta

SHIPPED = Path(__file__).resolve().parents[2] / "weights" / "mini"


def shipped_json(file):
    return json.loads((SHIPPED / file).read_text())


# The miniature's configurations with smaller, uneven sizes.
UNET = shipped_json("unet/config.json") | {
    "block_out_channels": [8, 12, 16],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 2, 4],
    "cross_attention_dim": 20,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 10 + 6 * 4,
    "norm_num_groups": 4,
    "sample_size": 8,
}
VAE = shipped_json("vae/config.json") | {
    "block_out_channels": [8, 12, 16],
    "norm_num_groups": 4,
    "sample_size": 32,
    "scaling_factor": 0.2,
    "force_upcast": True,
}
CONFIGS = {
    "unet": UNET,
    "vae": VAE,
    "text_encoder": shipped_json("text_encoder/config.json")
    | {"hidden_size": 8, "intermediate_size": 12, "projection_dim": 8},
    "text_encoder_2": shipped_json("text_encoder_2/config.json")
    | {
        "hidden_size": 12,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "projection_dim": 10,
    },
}
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
NETWORKS = tuple(CONFIGS)
FILE = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


def refused(action, *words):
    """action raises a ValueError of one line that holds these words; returns the line."""
    with pytest.raises(ValueError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600
    for word in words:
        assert str(word) in line, f"{word!r} is not in: {line}"
    return line


@pytest.fixture(autouse=True, scope="module")
def vocabulary_read_once():
    """In the test files that import it, the shipped vocabulary is read once, and then copied."""
    read = Tokenizer.from_folder
    cached = lru_cache(read)

    def from_folder(folder, **options):
        if not Path(folder).is_relative_to(SHIPPED):
            return read(folder, **options)
        tokenizer = copy.copy(cached(folder, **options))
        for name, value in vars(tokenizer).items():
            if isinstance(value, dict):
                setattr(tokenizer, name, value.copy())
        return tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "from_folder", from_folder)
        yield


def shapes(name, config):
    """{name in the folder layout: shape} of a network."""
    network = build_on_meta(name, CONFIG_CLASSES[name].from_config(config))
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


@lru_cache
def weights(seed=0):
    """{network: {name in the folder layout: random float32 tensor}}."""
    generator, networks = torch.Generator().manual_seed(seed), {}
    for name, config in CONFIGS.items():
        networks[name] = {}
        for key, shape in shapes(name, config).items():
            tensor = 0.2 * torch.randn(shape, generator=generator)
            is_norm = len(shape) == 1 and "norm" in key and key.endswith("weight")
            networks[name][key] = tensor + is_norm
    return networks


# The folder layout


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_weights(folder, name, tensors, dtype=torch.float32, variant="", shards=1, old=False):
    """One network's weight file in its folder, or its shards with their index.

    old: the variant is behind the shard's number, as older versions of diffusers write it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: t.to(dtype).contiguous() for key, t in tensors.items()}
    if shards == 1:
        return save_file(tensors, folder / f"{FILE[name]}{variant}.safetensors")
    weight_map = {}
    for i in range(shards):
        ending = f"{variant}-{i + 1:05d}-of-{shards:05d}"
        if old:
            ending = f"-{i + 1:05d}-of-{shards:05d}{variant}"
        file = f"{FILE[name]}{ending}.safetensors"
        shard = dict(list(tensors.items())[i::shards])
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = folder / f"{FILE[name]}.safetensors.index{variant}.json"
    write_json(index, {"metadata": {}, "weight_map": weight_map})


def write_folder(
    root, seed=0, configs=CONFIGS, scheduler=SCHEDULER, index=None, vocabulary=False, **options
):
    """A whole checkpoint in the folder layout; options: of write_weights.

    Without a vocabulary, the loader takes the one that ships.
    """
    root = Path(root)
    standard = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    write_json(root / "model_index.json", standard | (index or {}))
    write_json(root / "scheduler" / "scheduler_config.json", scheduler)
    for name in NETWORKS:
        write_json(root / name / "config.json", configs[name])
        write_weights(root / name, name, weights(seed)[name], **options)
    for name in ("tokenizer", "tokenizer_2") if vocabulary else ():
        shutil.copytree(SHIPPED / name, root / name, dirs_exist_ok=True)
    return root


# The single-file layout

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_RESNET = ("norm1", "conv1", "norm2", "conv2")
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def resnet(theirs, ours):
    return {f"{ours}.{b}": f"{theirs}.{a}" for a, b in RESNET.items()}


def unet_modules(config):
    """{module in the folder layout: its name in the single file}.

    Transformers as a whole: they have the same names inside.
    """
    layers, types = config["layers_per_block"], config["down_block_types"]
    levels = len(types)
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
    }
    names |= resnet("middle_block.0", "mid_block.resnets.0")
    names |= resnet("middle_block.2", "mid_block.resnets.1")
    n = 0
    for level in range(levels):
        for i in range(layers):
            n += 1
            names |= resnet(f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{i}")
            if "CrossAttn" in types[level]:
                names[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{n}.1"
        if level < levels - 1:
            n += 1
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
    n = -1
    for up, level in enumerate(reversed(range(levels))):
        for i in range(layers + 1):
            n += 1
            inside = 1
            names |= resnet(f"output_blocks.{n}.0", f"up_blocks.{up}.resnets.{i}")
            if "CrossAttn" in types[level]:
                names[f"up_blocks.{up}.attentions.{i}"] = f"output_blocks.{n}.{inside}"
                inside += 1
        if level:
            names[f"up_blocks.{up}.upsamplers.0.conv"] = f"output_blocks.{n}.{inside}.conv"
    return names


def vae_modules(config):
    """The same for the VAE, whose decoder counts its levels from the finest."""
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

    def add_resnet(theirs, ours):
        names[f"{ours}.conv_shortcut"] = f"{theirs}.nin_shortcut"
        for part in VAE_RESNET:
            names[f"{ours}.{part}"] = f"{theirs}.{part}"

    for side in ("encoder", "decoder"):
        for ours, theirs in (("conv_in",) * 2, ("conv_out",) * 2, ("conv_norm_out", "norm_out")):
            names[f"{side}.{ours}"] = f"{side}.{theirs}"
        for i in (0, 1):
            add_resnet(f"{side}.mid.block_{i + 1}", f"{side}.mid_block.resnets.{i}")
        for ours, theirs in VAE_ATTENTION.items():
            names[f"{side}.mid_block.attentions.0.{ours}"] = f"{side}.mid.attn_1.{theirs}"
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for i in range(layers):
            add_resnet(f"encoder.down.{level}.block.{i}", f"{down}.resnets.{i}")
        for i in range(layers + 1):
            add_resnet(f"decoder.up.{level}.block.{i}", f"{up}.resnets.{i}")
        names[f"{down}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        names[f"{up}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
    return names


def renamed(tensors, modules):
    """Tensors under the names of their modules in the single file.

    A tensor's module is the longest known beginning of its name.
    """
    result = {}
    for key, tensor in tensors.items():
        module = max((m for m in modules if key.startswith(m + ".")), key=len)
        result[modules[module] + key.removeprefix(module)] = tensor
    assert len(result) == len(tensors)
    return result


def ldm_vae(tensors, config=VAE):
    """The VAE as the original code saves it: its attention is made of 1 x 1 convolutions."""
    stored = dict(tensors)
    for key, tensor in tensors.items():
        if ".attentions." in key and tensor.ndim == 2:
            stored[key] = tensor[:, :, None, None]
    return renamed(stored, vae_modules(config))


def open_clip(tensors):
    """The second encoder as OpenCLIP saves it: q, k, v in one in_proj, a projection for x @ P."""
    model = "text_model."
    result = {
        "token_embedding.weight": tensors[model + "embeddings.token_embedding.weight"],
        "text_projection": tensors["text_projection.weight"].T,
        "positional_embedding": tensors[model + "embeddings.position_embedding.weight"],
        "ln_final.weight": tensors[model + "final_layer_norm.weight"],
        "ln_final.bias": tensors[model + "final_layer_norm.bias"],
    }
    for i in range(CONFIGS["text_encoder_2"]["num_hidden_layers"]):
        ours, theirs = f"{model}encoder.layers.{i}", f"transformer.resblocks.{i}"
        for leaf in ("weight", "bias"):
            qkv = [tensors[f"{ours}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            result[f"{theirs}.attn.in_proj_{leaf}"] = torch.cat(qkv)
            for a, b in OPEN_CLIP_LAYER.items():
                result[f"{theirs}.{b}.{leaf}"] = tensors[f"{ours}.{a}.{leaf}"]
    return result


def with_prefix(prefix, tensors):
    return {prefix + key: tensor for key, tensor in tensors.items()}


def single_tensors(seed=0):
    """The whole checkpoint under the names of the single-file layout."""
    w = weights(seed)
    return (
        with_prefix("model.diffusion_model.", renamed(w["unet"], unet_modules(UNET)))
        | with_prefix("first_stage_model.", ldm_vae(w["vae"]))
        | with_prefix("conditioner.embedders.0.transformer.", w["text_encoder"])
        | with_prefix("conditioner.embedders.1.model.", open_clip(w["text_encoder_2"]))
    )


POSITION_IDS = "transformer.text_model.embeddings.position_ids"
USUAL_EXTRAS = {  # what people's fine-tunes also hold
    f"conditioner.embedders.0.{POSITION_IDS}": torch.arange(77)[None],
    f"conditioner.embedders.1.model.{POSITION_IDS}": torch.arange(77)[None],  # ComfyUI's
    "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
    "model_ema.decay": torch.tensor(0.999),
    "model_ema.num_updates": torch.tensor(1),
    "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(8, 4, 3, 3),
    "denoiser.sigmas": torch.zeros(1000),
    "alphas_cumprod": torch.zeros(1000),
    "denoiser.alphas_cumprod": torch.zeros(1000),
}


def write_single(path, tensors=None, dtype=torch.float32, extras=None):
    """A checkpoint in one file, floating-point tensors in this dtype; returns the path."""
    tensors = (single_tensors() if tensors is None else tensors) | (extras or {})
    stored = {}
    for key, tensor in tensors.items():
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        stored[key] = tensor.to(kind).contiguous()
    save_file(stored, path)
    return path


# Comparison


def same(network, expected, dtype=torch.float32):
    """The network's tensors are, to the bit, the expected ones in that dtype, and no others."""
    state = network.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[key].to(dtype)), key


def all_same(sdxl, seed=0, dtype=torch.float32):
    """All four networks are those that were written."""
    for name in NETWORKS:
        same(sdxl.network(name), weights(seed)[name], dtype)
