"""Check the values of a checkpoint's configuration files before a network is built from them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..clip import ACTIVATIONS
from .text import read_json_object, shorten

SIZE = (1, 65536)
LEVELS = 8  # most levels of a UNet or VAE
PER_LEVEL = ("block_out_channels", "transformer_layers_per_block", "attention_head_dim")
BLOCK_TYPES = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# {(least, largest): the numbers of the files}. Two integers accept integers, two floats any number.
# What is not named here is not read.
LIMITS = {
    (1, 1024): ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers")
    + ("attention_head_dim", "num_attention_heads", "patch_size", "in_channels", "out_channels"),
    (1, 1 << 16): ("block_out_channels", "cross_attention_dim", "hidden_size", "projection_dim")
    + ("norm_num_groups", "addition_time_embed_dim"),
    (1, 1 << 20): ("intermediate_size", "projection_class_embeddings_input_dim"),
    (1, 8192): ("image_size", "sample_size"),
    (4, 4): ("latent_channels",),
    (77, 1 << 16): ("max_position_embeddings",),  # a prompt has 77 positions
    (49408, 1 << 20): ("vocab_size",),  # CLIP's vocabulary has 49408 tokens
    (50, 100_000): ("num_train_timesteps",),
    (0, 49): ("steps_offset",),
    (1e-12, 1.0): ("layer_norm_eps", "norm_eps"),
    (1e-8, 0.999): ("beta_start", "beta_end"),
    (1e-6, 1e6): ("scaling_factor",),
    (False, True): ("force_upcast", "force_zeros_for_empty_prompt", "rescale_betas_zero_snr"),
}
STRINGS = ("_class_name", "beta_schedule", "hidden_act", "prediction_type", "timestep_spacing")
# What the networks have built in and no tensor shows: any other value would change the results.
BUILT_IN = {
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "downsample_padding": (1,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "hidden_act": tuple(ACTIVATIONS),
    "latents_mean": (),
    "latents_std": (),
    "mid_block_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
}
RANGES = {}
for limits, names in LIMITS.items():
    RANGES |= dict.fromkeys(names, limits)


def problem_of(value: object, low: float, high: float) -> str | None:
    """What is wrong with one value, or None. The type of low is the type that is accepted."""
    if isinstance(low, bool):
        return None if isinstance(value, bool) else "must be true or false"
    accepted = (int,) if isinstance(low, int) else (int, float)
    if type(value) not in accepted:
        return "must be an integer" if accepted == (int,) else "must be a number"
    return None if low <= value <= high else f"must be from {low} to {high}"


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object of a configuration file; {} if there is no such file."""
    return read_json_object(path) if path.is_file() else {}


def without_nulls(config: dict[str, Any]) -> dict[str, Any]:
    """The values that are given; a null stands for the default."""
    return {name: value for name, value in config.items() if value is not None}


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Raise ValueError, with the path, for a value of a wrong type or out of range."""
    config = without_nulls(config)

    def check(name: str, problem: str | None) -> None:
        if problem:
            raise ValueError(f"{path}: {name} is {shorten(repr(config[name]))}; it {problem}")

    for name in sorted(config.keys() & RANGES.keys()):
        value = config[name]
        if name == "block_out_channels" and not isinstance(value, list):
            check(name, "must be a list")
        for number in value if isinstance(value, list) and name in PER_LEVEL else [value]:
            check(name, problem_of(number, *RANGES[name]))
    for name in STRINGS:
        if not isinstance(config.get(name, ""), str) or len(config.get(name, "")) > 100:
            check(name, "must be a short string")
    for name in sorted(config.keys() & BUILT_IN.keys()):
        known = " or ".join(map(repr, BUILT_IN[name])) or "null"
        if config[name] not in BUILT_IN[name]:
            check(name, f"is supported as {known} only")
    if "hidden_size" in config and config["hidden_size"] % config.get("num_attention_heads", 12):
        check("hidden_size", "must be a multiple of num_attention_heads")
    if config.get("beta_start", 0.0) > config.get("beta_end", 0.012):
        check("beta_start", "must not be above beta_end")


def check_sizes(source: object, configs: dict[str, Any]) -> None:
    """Raise ValueError if sizes do not match, within a network or from one to the next.

    configs: {network: its config}, with the defaults of what the files leave out.
    """
    for problem in size_problems(configs):
        raise ValueError(f"{source}: {problem}")


def size_problems(configs: dict[str, Any]) -> Iterator[str]:
    unet, vae = configs["unet"], configs["vae"]
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        yield f"unet/config.json: in_channels and out_channels must be {vae.latent_channels}"
    if not vae.in_channels == vae.out_channels == 3:
        yield "vae/config.json: in_channels and out_channels must be 3"
    first, second = configs["text_encoder"], configs["text_encoder_2"]
    for name, known in BLOCK_TYPES.items():
        types = getattr(unet, name)
        if not isinstance(types, tuple) or any(kind not in known for kind in types):
            yield f"unet/config.json: {name} must be a list of {' and '.join(known)}"
    levels = len(unet.block_out_channels)
    counts = [len(getattr(unet, name)) for name in (*PER_LEVEL, *BLOCK_TYPES)]
    if set(counts) != {levels} or not 1 <= levels <= LEVELS:
        names = ", ".join((*PER_LEVEL, *BLOCK_TYPES))
        yield f"unet/config.json: {names} must have as many values each, 1 to {LEVELS}"
    if not 1 <= len(vae.block_out_channels) <= LEVELS:
        yield f"vae/config.json: block_out_channels must have 1 to {LEVELS} values"

    # What must divide what.
    for channels, heads in zip(unet.block_out_channels, unet.attention_head_dim, strict=True):
        if channels % heads:
            yield f"unet/config.json: {channels} channels do not divide into {heads} heads"
    for name, config in (("unet", unet), ("vae", vae)):
        if any(channels % config.norm_num_groups for channels in config.block_out_channels):
            yield f"{name}/config.json: block_out_channels must be multiples of norm_num_groups"
    if unet.addition_time_embed_dim % 2:
        yield "unet/config.json: addition_time_embed_dim must be even"

    # What one network gives and the next takes.
    width = first.hidden_size + second.hidden_size
    if unet.cross_attention_dim != width:
        given = unet.cross_attention_dim
        yield f"the UNet's cross_attention_dim is {given}, the text encoders give {width}"
    pooled = second.projection_dim + 6 * unet.addition_time_embed_dim  # six time ids
    if unet.projection_class_embeddings_input_dim != pooled:
        yield (
            "the UNet's projection_class_embeddings_input_dim does not match: "
            f"text encoder 2 and the time ids give {pooled}"
        )
