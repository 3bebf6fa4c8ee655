"""The single-file layout (sd_xl_base_1.0.safetensors, and what people share their fine-tunes in) by name.

The networks carry the names of the folder layout. Each function here gives the place of such a name in the single file. What is
stored differently there, not only named so, is put right in `adapt`.
"""

import re

PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
EXTRAS = re.compile(
    r"position_ids$|logit_scale$|^model_ema\.|^denoiser\.|(^|\.)alphas_cumprod$|^v_pred$|^ztsnr$"
)  # known, of no use here


def replace(name, pairs):
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def unet(name, layers=2):
    """down_blocks.1.attentions.0.… to input_blocks.4.1.…; layers: resnets per level of the way down. Module names work too."""
    name = re.sub(
        r"^down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)",
        lambda m: (
            f"input_blocks.{int(m[1]) * (layers + 1) + int(m[3]) + 1}.{int(m[2] == 'attentions')}"
        ),
        name,
    )
    name = re.sub(
        r"^down_blocks\.(\d+)\.downsamplers\.0\.conv",
        lambda m: f"input_blocks.{(int(m[1]) + 1) * (layers + 1)}.0.op",
        name,
    )
    name = re.sub(
        r"^up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)",
        lambda m: (
            f"output_blocks.{int(m[1]) * (layers + 1) + int(m[3])}.{int(m[2] == 'attentions')}"
        ),
        name,
    )
    # An upsampler stands behind the last resnet and transformer of its level: index 2.
    name = re.sub(
        r"^up_blocks\.(\d+)\.upsamplers\.0",
        lambda m: f"output_blocks.{int(m[1]) * (layers + 1) + layers}.2",
        name,
    )
    name = re.sub(
        r"^mid_block\.(resnets|attentions)\.(\d+)",
        lambda m: f"middle_block.{1 if m[1] == 'attentions' else 2 * int(m[2])}",
        name,
    )
    if re.match(r"(input|output|middle)_block", name) and "transformer_blocks" not in name:
        name = replace(
            name,
            (
                ("norm1", "in_layers.0"),
                ("conv1", "in_layers.2"),
                ("time_emb_proj", "emb_layers.1"),
                ("norm2", "out_layers.0"),
                ("conv2", "out_layers.3"),
                ("conv_shortcut", "skip_connection"),
            ),
        )
    return replace(
        name,
        (
            ("conv_in", "input_blocks.0.0"),
            ("time_embedding.linear_1", "time_embed.0"),
            ("conv_norm_out", "out.0"),
            ("time_embedding.linear_2", "time_embed.2"),
            ("conv_out", "out.2"),
            ("add_embedding.linear_1", "label_emb.0.0"),
            ("add_embedding.linear_2", "label_emb.0.2"),
        ),
    )


def vae(name, levels=4):
    """decoder.up_blocks.0.… to decoder.up.3.…: the single file counts the decoder's levels from the finest."""
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    return replace(
        name,
        (
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
        ),
    )


def text_encoder_2(name):
    """OpenCLIP's names; q_proj, k_proj and v_proj are thirds of one in_proj."""
    name = replace(
        name,
        (
            ("text_model.encoder.layers", "transformer.resblocks"),
            ("text_model.final_layer_norm", "ln_final"),
            ("text_model.embeddings.token_embedding", "token_embedding"),
            ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
            ("text_projection.weight", "text_projection"),
            ("layer_norm", "ln_"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn", "attn"),
        ),
    )
    return re.sub(r"attn\.[qkv]_proj\.", "attn.in_proj_", name)


def single_file_name(network, name, config):
    """Where the folder layout's tensor `name` of a network stands in the single file, without the PREFIX."""
    if network == "unet":
        return unet(name, config.layers_per_block)
    if network == "vae":
        return vae(name, len(config.block_out_channels))
    return text_encoder_2(name) if network == "text_encoder_2" else name


def adapt(network, name, tensor):
    """A tensor of the single file as the folder layout's `name` holds it."""
    if network == "text_encoder_2":
        third = re.search(r"self_attn\.([qkv])_proj", name)
        if third:
            return tensor.chunk(3)["qkv".index(third[1])]
        if name == "text_projection.weight":
            return (
                tensor.T.contiguous()
            )  # stored for x @ P; it is square, so forgetting this raises no error
    if network == "vae" and ".attentions." in name and tensor.ndim == 4:
        return tensor[:, :, 0, 0]  # 1 x 1 convolutions there, linear layers here
    return tensor
