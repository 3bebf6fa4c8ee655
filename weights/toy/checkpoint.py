"""The miniature's sizes, and its folder in the official layout. The same architecture as SDXL base, the same vocabulary."""

import json

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from . import WEIGHTS

LEVELS = dict(
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
)
CONFIGS = {
    "vae": dict(
        _class_name="AutoencoderKL",
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=[16, 32, 64],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        act_fn="silu",
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        force_upcast=False,
    ),
    "unet": dict(
        _class_name="UNet2DConditionModel",
        in_channels=4,
        out_channels=4,
        block_out_channels=[32, 96, 192],
        **LEVELS,
        layers_per_block=1,
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=[1, 3, 6],
        cross_attention_dim=96,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=64 + 6 * 32,
        norm_num_groups=16,
        norm_eps=1e-5,
        sample_size=32,
        use_linear_projection=True,
        flip_sin_to_cos=True,
        freq_shift=0,
        act_fn="silu",
        mid_block_scale_factor=1,
        downsample_padding=1,
        center_input_sample=False,
    ),
    "text_encoder": dict(
        architectures=["CLIPTextModel"],
        model_type="clip_text_model",
        vocab_size=49408,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    ),
}
CONFIGS["text_encoder_2"] = CONFIGS["text_encoder"] | dict(
    architectures=["CLIPTextModelWithProjection"],
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    hidden_act="gelu",
    projection_dim=64,
)
SCHEDULER = dict(
    _class_name="EulerDiscreteScheduler",
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    num_train_timesteps=1000,
    prediction_type="epsilon",
    timestep_spacing="leading",
    steps_offset=1,
    interpolation_type="linear",
    set_alpha_to_one=False,
    clip_sample=False,
)
INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def header_of(path):
    with safe_open(path, "pt") as f:
        return f.metadata()


def pack(work):
    """Write the EMA of the states in work to weights/mini, beside the tokenizers that are there already; a line that says what."""
    for missing in [
        path for path in (work / "unet.safetensors", work / "vae.safetensors") if not path.exists()
    ]:
        raise ValueError(f"{missing}: no such state: train it first, or unpack")
    out, tensors = (
        WEIGHTS / "mini",
        load_file(work / "unet.safetensors") | load_file(work / "vae.safetensors"),
    )
    networks = {
        name: {
            k.removeprefix(f"ema.{name}."): v
            for k, v in tensors.items()
            if k.startswith(f"ema.{name}.")
        }
        for name in CONFIGS
    }
    for name, weights in networks.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        file = (
            "model.fp16.safetensors"
            if name.startswith("text")
            else "diffusion_pytorch_model.fp16.safetensors"
        )
        save_file(
            {k: v.half().contiguous() for k, v in weights.items()},
            out / name / file,
            {"format": "pt"},
        )
        config = CONFIGS[name] | (
            json.loads((work / "scaling.json").read_text()) if name == "vae" else {}
        )
        (out / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    (out / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    return f"packed step {header_of(work / 'unet.safetensors')['step']}, {sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:.1f} MB with the vocabularies"


def unpack(work):
    """The way back: states in work, from which weights/mini is trained on (without the optimizer's moments, which do not ship)."""
    states = {"vae": {}, "unet": {}}
    for there in [
        path for path in (work / f"{name}.safetensors" for name in states) if path.exists()
    ]:
        raise ValueError(f"{there} is there already; --work names another folder")
    for name in CONFIGS:
        (file,) = (WEIGHTS / "mini" / name).glob("*.fp16.safetensors")
        for k, v in load_file(file).items():
            states["vae" if name == "vae" else "unet"] |= {
                f"{kind}.{name}.{k}": v.float() for kind in ("weights", "ema")
            }
    for name, tensors in states.items():
        save_file(
            {k: v.clone() for k, v in tensors.items()},
            work / f"{name}.safetensors",
            {"step": "0", "seconds": "0"},
        )
    scaling = json.loads((WEIGHTS / "mini" / "vae" / "config.json").read_text())["scaling_factor"]
    (work / "scaling.json").write_text(json.dumps({"scaling_factor": scaling}))
    return f"unpacked to {work}"
