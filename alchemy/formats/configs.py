"""Check the values of a checkpoint's configuration files before a network is built from them.

One table per file gives the range of each number that is read; what is not listed is not read. A
range of two integers accepts integers, one of two floats any finite number.
"""

from collections.abc import Iterator
from pathlib import Path

from .text import shorten

SIZE = (1, 65536)
LEVELS = 8  # most levels of a UNet or VAE
PER_LEVEL = ("block_out_channels", "transformer_layers_per_block", "attention_head_dim")
BLOCK_TYPES = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
UNET = {
    "in_channels": (4, 4),
    "out_channels": (4, 4),
    "block_out_channels": SIZE,
    "layers_per_block": (1, 16),
    "transformer_layers_per_block": (1, 64),
    "attention_head_dim": (1, 1024),
    "cross_attention_dim": SIZE,
    "addition_time_embed_dim": (2, 65536),
    "projection_class_embeddings_input_dim": (1, 1 << 20),
    "norm_num_groups": SIZE,
    "norm_eps": (1e-12, 1.0),
    "sample_size": (1, 1024),
}
VAE = {
    "in_channels": (3, 3),
    "out_channels": (3, 3),
    "latent_channels": (4, 4),
    "block_out_channels": SIZE,
    "layers_per_block": (1, 16),
    "norm_num_groups": SIZE,
    "scaling_factor": (1e-6, 1e6),
    "force_upcast": (False, True),
}
TEXT = {
    "vocab_size": (49408, 1 << 20),  # CLIP's vocabulary has 49408 tokens
    "hidden_size": SIZE,
    "intermediate_size": (1, 1 << 20),
    "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 1024),
    "max_position_embeddings": (77, 65536),  # a prompt has 77 positions
    "layer_norm_eps": (1e-12, 1.0),
    "projection_dim": SIZE,
}
VISION = {  # DINO and CLIP's vision half, of extras/evaluate
    "hidden_size": SIZE,
    "intermediate_size": (1, 1 << 20),
    "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 1024),
    "image_size": (1, 4096),
    "patch_size": (1, 1024),
    "layer_norm_eps": (1e-12, 1.0),
    "projection_dim": SIZE,
}
SCHEDULER = {
    "num_train_timesteps": (50, 100_000),
    "beta_start": (1e-8, 0.999),
    "beta_end": (1e-8, 0.999),
    "steps_offset": (0, 49),
    "rescale_betas_zero_snr": (False, True),
}
INDEX = {"force_zeros_for_empty_prompt": (False, True)}
RANGES = {
    "unet/config.json": UNET,
    "vae/config.json": VAE,
    "text_encoder/config.json": TEXT,
    "text_encoder_2/config.json": TEXT,
    "vision": VISION,
    "scheduler/scheduler_config.json": SCHEDULER,
    "model_index.json": INDEX,
}


def check_value(value: object, low: float, high: float) -> str | None:
    """What is wrong with one value, or None. The type of low is the type that is accepted."""
    if isinstance(low, bool):
        return None if isinstance(value, bool) else "must be true or false"
    accepted = (int,) if isinstance(low, int) else (int, float)
    if type(value) not in accepted:
        return "must be an integer" if accepted == (int,) else "must be a number"
    return None if low <= value <= high else f"must be from {low} to {high}"


def check_config(path: Path, file: str, config: dict) -> dict:
    """The config of `file`, a key of RANGES, without its nulls, which stand for defaults.

    Raises ValueError, with the path, for a value of a wrong type or out of range.
    """
    config = {name: value for name, value in config.items() if value is not None}

    def refuse(name: str, problem: str) -> ValueError:
        return ValueError(f"{path}: {name} is {shorten(repr(config[name]))}; it {problem}")

    for name, (low, high) in RANGES[file].items():
        if name not in config:
            continue
        value = config[name]
        values = value if isinstance(value, list) and name in PER_LEVEL else [value]
        for number in values:
            if problem := check_value(number, low, high):
                raise refuse(name, problem)
    if file.startswith(("text", "vision")):
        heads = config.get("num_attention_heads", 12)
        if config.get("hidden_size", 768) % heads:
            raise refuse("hidden_size", "must be a multiple of num_attention_heads")
    for name, known in BLOCK_TYPES.items():
        types = config.get(name, []) if file.startswith("unet") else []
        if not isinstance(types, list) or any(kind not in known for kind in types):
            raise refuse(name, f"must be a list of {' and '.join(known)}")
    if not isinstance(config.get("block_out_channels", []), list):
        raise refuse("block_out_channels", "must be a list")
    if config.get("beta_start", 0.0) > config.get("beta_end", 0.012):
        raise refuse("beta_start", "must not be above beta_end")
    return config


def check_sizes(source: object, configs: dict) -> None:
    """Raise ValueError if sizes do not match, within a network or from one to the next.

    configs: {network: its config}, with the defaults of what the files leave out.
    """
    unet, first, second = (configs[n] for n in ("unet", "text_encoder", "text_encoder_2"))
    levels = len(unet.block_out_channels)
    for name in (*PER_LEVEL, *BLOCK_TYPES):
        if len(getattr(unet, name)) != levels or not 1 <= levels <= LEVELS:
            raise ValueError(
                f"{source}: unet/config.json: {name} must have 1 to {LEVELS} values, "
                "as many as block_out_channels"
            )
    if not 1 <= len(configs["vae"].block_out_channels) <= LEVELS:
        raise ValueError(
            f"{source}: vae/config.json: block_out_channels must have 1 to {LEVELS} values"
        )
    width = first.hidden_size + second.hidden_size
    pooled = second.projection_dim + 6 * unet.addition_time_embed_dim  # and the six time ids
    for name, value, divisor in divisions(configs):
        if value % divisor:
            raise ValueError(f"{source}: {name}, {value}, must be a multiple of {divisor}")
    if unet.cross_attention_dim != width:
        raise ValueError(
            f"{source}: the UNet's cross_attention_dim is {unet.cross_attention_dim}, "
            f"the text encoders give {width}"
        )
    if unet.projection_class_embeddings_input_dim != pooled:
        raise ValueError(
            f"{source}: the UNet's projection_class_embeddings_input_dim does not match: "
            f"text encoder 2 and the time ids give {pooled}"
        )


def divisions(configs: dict) -> Iterator[tuple[str, int, int]]:
    """(name, value, what must divide it) of all sizes."""
    unet = configs["unet"]
    for channels, heads in zip(unet.block_out_channels, unet.attention_head_dim, strict=True):
        yield "block_out_channels (attention_head_dim)", channels, heads
    for network in ("unet", "vae"):
        for channels in configs[network].block_out_channels:
            groups = configs[network].norm_num_groups
            yield f"{network}/config.json: block_out_channels (norm_num_groups)", channels, groups
    yield "unet/config.json: addition_time_embed_dim", unet.addition_time_embed_dim, 2
