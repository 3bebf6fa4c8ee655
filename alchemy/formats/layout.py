"""The single-file layout by name: sd_xl_base_1.0.safetensors and most published fine-tunes.

The networks carry the names of the folder layout (diffusers, transformers). The functions here map
such a name to its place in the single file, which has the names of the original code
(Stability-AI/generative-models, OpenCLIP); `adapt` and `to_single_file` convert the few tensors
that are also stored differently.
"""

import re
from typing import Any

import torch
from torch import Tensor

PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
# A tensor that only the original layout has, if the network is in a file of its own.
MARKER = {
    "unet": "input_blocks.0.0.weight",
    "vae": "encoder.down.0.block.0.norm1.weight",
    "text_encoder_2": "token_embedding.weight",
}
# Tensors that checkpoints also hold and that no network here needs.
EXTRAS = re.compile(
    r"position_ids$|logit_scale$|^model_ema\.|^denoiser\.|(^|\.)alphas_cumprod$|^v_pred$|^ztsnr$"
)

BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.([a-z]+)\.(\d+)(.*)")
MIDDLE = re.compile(r"mid_block\.([a-z]+)\.(\d+)(.*)")
UNET_ENDS = (
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
VAE = (
    ("down_blocks", "down"),
    ("resnets", "block"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("group_norm", "norm"),
    ("to_out.0", "proj_out"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
)
OPEN_CLIP = (
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_projection.weight", "text_projection"),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn", "attn"),
)


def replace_all(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """Replace each old part of a name by the new one, in order."""
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def unet(name: str, layers: int = 2) -> str:
    """down_blocks.1.attentions.0.… to input_blocks.4.1.…, for tensors and for modules.

    layers: resnets per level of the down blocks. The original code counts blocks over all levels;
    inside a block, 0 is the resnet, 1 the transformer and 2 the upsampler.
    """
    if match := MIDDLE.match(name):
        kind, index, rest = match[1], int(match[2]), match[3]
        if kind == "attentions":
            return f"middle_block.1{rest}"
        return f"middle_block.{2 * index}{replace_all(rest, RESNET)}"
    match = BLOCK.match(name)
    if not match:
        return replace_all(name, UNET_ENDS)

    side, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "resnets":
        rest = replace_all(rest, RESNET)
    slot = {"resnets": 0, "downsamplers": 0, "attentions": 1, "upsamplers": 2}[kind]
    if side == "down":
        # Block 0 is conv_in; a downsampler is a block of its own after those of its level.
        block = level * (layers + 1) + index + 1
        if kind == "downsamplers":
            block, rest = (level + 1) * (layers + 1), rest.replace(".conv", ".op")
        return f"input_blocks.{block}.{slot}{rest}"
    # An upsampler is in the last block of its level.
    block = level * (layers + 1) + (layers if kind == "upsamplers" else index)
    return f"output_blocks.{block}.{slot}{rest}"


def vae(name: str, levels: int = 4) -> str:
    """decoder.up_blocks.0.… to decoder.up.3.…: there the decoder's finest level is level 0."""
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    return replace_all(name, VAE)


def text_encoder_2(name: str) -> str:
    """The name in OpenCLIP; q_proj, k_proj and v_proj are thirds of one in_proj."""
    return re.sub(r"attn\.[qkv]_proj\.", "attn.in_proj_", replace_all(name, OPEN_CLIP))


def single_file_name(network: str, name: str, config: Any) -> str:
    """The place of a network's tensor or module `name` in the single file, without its PREFIX."""
    if network == "unet":
        return unet(name, config.layers_per_block)
    if network == "vae":
        return vae(name, len(config.block_out_channels))
    if network == "text_encoder_2":
        return text_encoder_2(name)
    return name


def adapt(network: str, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the single file in the form that the folder layout's `name` has."""
    if network == "text_encoder_2":
        third = re.search(r"self_attn\.([qkv])_proj", name)
        if third:
            return tensor.chunk(3)["qkv".index(third[1])]
        if name == "text_projection.weight":
            # Stored for x @ P. It is square, so a forgotten transpose raises no error.
            return tensor.T.contiguous()
    if network == "vae" and ".attentions." in name and tensor.ndim == 4:
        return tensor[:, :, 0, 0]  # 1 x 1 convolutions there, linear layers here
    return tensor


def to_single_file(network: str, tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """All tensors of a network, {name in the folder layout: tensor}, as the single file has them.

    The inverse of `adapt` under the names of `single_file_name`, PREFIX included.
    """
    stored = {}
    for name, tensor in tensors.items():
        is_openclip = network == "text_encoder_2"
        if is_openclip and (".k_proj" in name or ".v_proj" in name):
            continue  # stored with q_proj
        if is_openclip and ".q_proj" in name:
            tensor = torch.cat([tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        elif name == "text_projection.weight":
            tensor = tensor.T
        elif network == "vae" and ".attentions." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        stored[PREFIX[network] + single_file_name(network, name, config)] = tensor
    return stored
