"""Small synthetic SDXL checkpoints with random weights, written in each layout that the loader has to read.

The single-file layout is written here from the other side than alchemy.formats.layout reads it: by walking the blocks in the order in which
the original code (sgm) counts them. Sizes are uneven, so that a tensor in another's place has another shape wherever that can be.
"""

import copy
import json
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alchemy.formats.checkpoint import BUILD, Tokenizer
from alchemy.formats.checkpoint import CONFIGS as KINDS

SHIPPED = Path(__file__).resolve().parents[2] / "weights" / "mini"
UNET = dict(
    _class_name="UNet2DConditionModel",
    in_channels=4,
    out_channels=4,
    block_out_channels=[8, 12, 16],
    layers_per_block=2,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    transformer_layers_per_block=[1, 1, 2],
    attention_head_dim=[1, 2, 4],
    cross_attention_dim=20,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=10 + 6 * 4,
    norm_num_groups=4,
    norm_eps=1e-5,
    sample_size=8,
    use_linear_projection=True,
    flip_sin_to_cos=True,
    freq_shift=0,
    act_fn="silu",
    downsample_padding=1,
    center_input_sample=False,
)
VAE = dict(
    _class_name="AutoencoderKL",
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=[8, 12, 16],
    down_block_types=["DownEncoderBlock2D"] * 3,
    up_block_types=["UpDecoderBlock2D"] * 3,
    act_fn="silu",
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=32,
    scaling_factor=0.2,
    force_upcast=True,
)
TEXT = dict(
    vocab_size=49408,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    hidden_act="quick_gelu",
    max_position_embeddings=77,
    layer_norm_eps=1e-5,
    projection_dim=8,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)
CONFIGS = {
    "unet": UNET,
    "vae": VAE,
    "text_encoder": TEXT | dict(architectures=["CLIPTextModel"]),
    "text_encoder_2": TEXT
    | dict(
        architectures=["CLIPTextModelWithProjection"],
        hidden_size=12,
        num_attention_heads=3,
        num_hidden_layers=3,
        intermediate_size=20,
        hidden_act="gelu",
        projection_dim=10,
    ),
}
SCHEDULER = dict(
    _class_name="EulerDiscreteScheduler",
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    num_train_timesteps=1000,
    prediction_type="epsilon",
    timestep_spacing="leading",
    steps_offset=1,
)
FILE = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
NETWORKS = tuple(CONFIGS)


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
    """In the test files that import it, a vocabulary is read once; each tokenizer is a copy."""
    read = lru_cache(Tokenizer.from_folder)

    def from_folder(*args):
        tokenizer = copy.copy(read(*args))
        for name, value in vars(tokenizer).items():
            if isinstance(value, dict):
                setattr(tokenizer, name, value.copy())
        return tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "from_folder", from_folder)
        yield


def shapes(name, config):
    """{name in the folder layout: shape} of a network."""
    with torch.device("meta"):
        return {
            key: p.shape
            for key, p in BUILD[name](KINDS[name].from_config(config)).state_dict().items()
        }


@lru_cache
def weights(seed=0):
    """{network: {name in the folder layout: float32 tensor}}, every element drawn."""
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for name, config in CONFIGS.items():
        drawn[name] = {
            key: 0.2 * torch.randn(shape, generator=generator)
            + (len(shape) == 1 and "norm" in key and key.endswith("weight"))
            for key, shape in shapes(name, config).items()
        }
    return drawn


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_weights(folder, name, tensors, dtype=torch.float32, variant="", shards=1, old=False):
    """One network's weight file in its folder, or its shards with their index. old: the variant behind the shard's number."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: t.to(dtype).contiguous() for key, t in tensors.items()}
    if shards == 1:
        return save_file(tensors, folder / f"{FILE[name]}{variant}.safetensors")
    place = {}
    for i in range(shards):
        number = f"-{i + 1:05d}-of-{shards:05d}"
        file = (
            f"{FILE[name]}{number}{variant}.safetensors"
            if old
            else f"{FILE[name]}{variant}{number}.safetensors"
        )
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / file)
        place |= dict.fromkeys(part, file)
    write_json(
        folder / f"{FILE[name]}.safetensors.index{variant}.json",
        {"metadata": {}, "weight_map": place},
    )


def write_folder(
    root, seed=0, configs=CONFIGS, scheduler=SCHEDULER, index=None, vocabulary=False, **how
):
    """A whole checkpoint in the folder layout (how: see write_weights); without a vocabulary, the one that ships serves."""
    root = Path(root)
    standard = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    write_json(root / "model_index.json", standard | (index or {}))
    write_json(root / "scheduler" / "scheduler_config.json", scheduler)
    for name in NETWORKS:
        write_json(root / name / "config.json", configs[name])
        write_weights(root / name, name, weights(seed)[name], **how)
    for name in ("tokenizer", "tokenizer_2") if vocabulary else ():
        shutil.copytree(SHIPPED / name, root / name, dirs_exist_ok=True)
    return root


# The single-file layout


def resnet(theirs, ours):
    return {
        f"{ours}.{b}": f"{theirs}.{a}"
        for a, b in (
            ("in_layers.0", "norm1"),
            ("in_layers.2", "conv1"),
            ("emb_layers.1", "time_emb_proj"),
            ("out_layers.0", "norm2"),
            ("out_layers.3", "conv2"),
            ("skip_connection", "conv_shortcut"),
        )
    }


def unet_modules(config):
    """{module in the folder layout: its name in the single file}; transformers as a whole, they have the same names inside."""
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
    names |= resnet("middle_block.0", "mid_block.resnets.0") | resnet(
        "middle_block.2", "mid_block.resnets.1"
    )
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
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    parts = (
        ("norm1", "norm1"),
        ("conv1", "conv1"),
        ("norm2", "norm2"),
        ("conv2", "conv2"),
        ("conv_shortcut", "nin_shortcut"),
    )
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        names |= {
            f"{side}.conv_in": f"{side}.conv_in",
            f"{side}.conv_out": f"{side}.conv_out",
            f"{side}.conv_norm_out": f"{side}.norm_out",
        }
        for i in range(2):
            names |= {
                f"{side}.mid_block.resnets.{i}.{a}": f"{side}.mid.block_{i + 1}.{b}"
                for a, b in parts
            }
        names |= {
            f"{side}.mid_block.attentions.0.{a}": f"{side}.mid.attn_1.{b}"
            for a, b in (
                ("group_norm", "norm"),
                ("to_q", "q"),
                ("to_k", "k"),
                ("to_v", "v"),
                ("to_out.0", "proj_out"),
            )
        }
    for level in range(levels):
        up = levels - 1 - level
        for i in range(layers):
            names |= {
                f"encoder.down_blocks.{level}.resnets.{i}.{a}": f"encoder.down.{level}.block.{i}.{b}"
                for a, b in parts
            }
        for i in range(layers + 1):
            names |= {
                f"decoder.up_blocks.{up}.resnets.{i}.{a}": f"decoder.up.{level}.block.{i}.{b}"
                for a, b in parts
            }
        names[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = (
            f"encoder.down.{level}.downsample.conv"
        )
        names[f"decoder.up_blocks.{up}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
    return names


def renamed(tensors, modules):
    """Tensors under the names that their modules have in the single file; the module is the longest known beginning of a name."""
    result = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        known = next(n for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in modules)
        result[".".join([modules[".".join(parts[:known])], *parts[known:]])] = tensor
    assert len(result) == len(tensors)
    return result


def ldm_vae(tensors, config=VAE):
    """The VAE as the original code saves it: attention is made of 1 x 1 convolutions."""
    attention = {key for key, t in tensors.items() if ".attentions." in key and t.ndim == 2}
    return renamed(
        {key: t[:, :, None, None] if key in attention else t for key, t in tensors.items()},
        vae_modules(config),
    )


def open_clip(tensors):
    """The second encoder as OpenCLIP saves it: q, k, v stacked in one in_proj, a projection for x @ P."""
    w, layers = (
        dict(tensors),
        1 + max(int(key.split(".")[3]) for key in tensors if ".layers." in key),
    )
    result = {
        "token_embedding.weight": w["text_model.embeddings.token_embedding.weight"],
        "text_projection": w["text_projection.weight"].T,
        "positional_embedding": w["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": w["text_model.final_layer_norm.weight"],
        "ln_final.bias": w["text_model.final_layer_norm.bias"],
    }
    for i in range(layers):
        ours, theirs = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        for leaf in ("weight", "bias"):
            result[f"{theirs}.attn.in_proj_{leaf}"] = torch.cat(
                [w[f"{ours}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            )
            for a, b in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                result[f"{theirs}.{b}.{leaf}"] = w[f"{ours}.{a}.{leaf}"]
    return result


def single_tensors(seed=0):
    """The whole checkpoint under the names of the single-file layout."""
    w = weights(seed)
    parts = {
        "model.diffusion_model.": renamed(w["unet"], unet_modules(UNET)),
        "first_stage_model.": ldm_vae(w["vae"]),
        "conditioner.embedders.0.transformer.": w["text_encoder"],
        "conditioner.embedders.1.model.": open_clip(w["text_encoder_2"]),
    }
    return {prefix + key: t for prefix, tensors in parts.items() for key, t in tensors.items()}


USUAL_EXTRAS = {  # what people's fine-tunes also hold
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[
        None
    ],
    "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids": torch.arange(
        77
    )[None],  # ComfyUI's
    "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
    "model_ema.decay": torch.tensor(0.999),
    "model_ema.num_updates": torch.tensor(1),
    "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(8, 4, 3, 3),
    "denoiser.sigmas": torch.zeros(1000),
    "alphas_cumprod": torch.zeros(1000),
    "denoiser.alphas_cumprod": torch.zeros(1000),
}


def write_single(path, tensors=None, dtype=torch.float32, extras=None):
    tensors = (single_tensors() if tensors is None else tensors) | (extras or {})
    save_file(
        {
            key: (t.to(dtype) if t.is_floating_point() else t).contiguous()
            for key, t in tensors.items()
        },
        path,
    )
    return path


# What tests ask


def same(network, expected, dtype=torch.float32):
    """Every tensor of the network is, to the bit, the expected one in that dtype, and there are no others."""
    state = network.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[key].to(dtype)), key


def all_same(sdxl, seed=0, dtype=torch.float32):
    """All four networks are those that were written."""
    for name in NETWORKS:
        same(sdxl.network(name), weights(seed)[name], dtype)
