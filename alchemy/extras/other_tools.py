"""What the flags and values of diffusers, kohya's scripts, A1111 and ComfyUI are called here.

A refused flag is answered with its name here; CLI.md prints the table. Names are written with
dashes; with underscores they are the same.
"""

from collections.abc import Collection

CHOSEN = "not needed: what fits into memory is chosen, and the log says what"
ATTENTION = "not needed: PyTorch's own attention is used"
CACHED = "not needed: photos and prompts are encoded once, before the first step"
NO_UPLOAD = "not available: nothing is uploaded"
BY_CHECKPOINT = "not needed: the checkpoint's configuration says it"

# {answer: flags}. An answer that begins with a flag is for the scripts that have this flag; a
# name may stand in several rows, of which the first that applies is the answer.
FLAGS = {
    # Checkpoints and devices
    "--weights": (
        "pretrained-model-name-or-path",
        "ckpt",
        "ckpt-path",
        "checkpoint",
        "base-model",
        "model",
        "model-id",
        "model-path",
    ),
    "--vae": ("pretrained-vae-model-name-or-path", "vae-path"),
    "--dtype": (
        "mixed-precision",
        "precision",
        "fp16",
        "bf16",
        "half",
        "full-bf16",
        "full-fp16",
        "prior-generation-precision",
    ),
    "--device cpu": ("cpu", "use-cpu"),
    "--fp8-base": ("fp8",),
    "--compile": ("torch-compile", "dynamo-backend"),
    "not needed: files named .fp16. are found without it": ("variant",),
    BY_CHECKPOINT: ("v-parameterization", "prediction-type", "zero-terminal-snr", "clip-skip"),
    "not needed: the VAE's configuration says whether it needs float32": ("no-half-vae",),
    CHOSEN: ("lowram", "lowvram", "medvram", "highvram", "enable-model-cpu-offload"),
    ATTENTION: (
        "xformers",
        "sdpa",
        "mem-eff-attn",
        "opt-sdp-attention",
        "enable-xformers-memory-efficient-attention",
    ),
    # Subjects and images
    "the first argument, SUBJECT_DIR": (
        "instance-data-dir",
        "train-data-dir",
        "data-dir",
        "dataset-name",
        "in-json",
    ),
    "--class-folder": ("class-data-dir", "reg-data-dir"),
    "--class-images": ("num-class-images",),
    "--class-word": ("class-prompt", "class-name"),
    "--class-word and --token (or --caption)": ("instance-prompt",),
    "--token": ("placeholder-token", "token-string", "trigger-word", "token-abstraction"),
    "--init-word": ("initializer-token",),
    "--vectors": ("num-vectors", "num-vectors-per-token"),
    "--style": ("learnable-property", "use-style-template"),
    "--captions": ("caption-column", "image-column", "dataset-config", "dataset-config-name"),
    "not needed: .txt and .caption are both read": ("caption-extension",),
    "--caption-dropout": ("caption-dropout-rate", "proportion-empty-prompts"),
    "--mirror": ("flip-aug", "random-flip"),
    "--mask": ("masked-loss", "alpha-mask", "mask-image", "inpaint-mask"),
    "not needed: --captions sorts images into buckets of their shapes": (
        "enable-bucket",
        "bucket-reso-steps",
        "bucket-no-upscale",
        "min-bucket-reso",
        "max-bucket-reso",
    ),
    "not available: photos are scaled and cropped at random": ("center-crop", "random-crop"),
    # Training
    "--learning-rate": ("lr", "unet-lr"),
    "not available: the learning rate is that of all trained parameters": (
        "text-encoder-lr",
        "learning-rate-te",
        "scale-lr",
    ),
    "--schedule": ("lr-scheduler",),
    "--warmup": ("lr-warmup-steps",),
    "--steps": (
        "max-train-steps",
        "num-inference-steps",
        "sampling-steps",
        "ddim-steps",
        "num-train-epochs",
        "max-train-epochs",
        "epochs",
    ),
    "--batch": ("batch-size", "train-batch-size"),
    "--accumulation": ("gradient-accumulation-steps",),
    "--checkpointing": ("gradient-checkpointing",),
    "--rank": ("network-dim", "lora-rank"),
    "--alpha": ("network-alpha", "lora-alpha"),
    "--init-lora": ("network-weights",),
    "--method": ("network-module",),
    "--text-encoders": ("train-text-encoder",),
    "not needed: a LoRA is trained on the UNet alone": (
        "network-train-unet-only",
        "cache-text-encoder-outputs",
    ),
    "--prior-weight": ("prior-loss-weight", "with-prior-preservation"),
    "--snr-gamma": ("min-snr-gamma",),
    "not available: AdamW with weight decay 0.01 and gradients of norm 1": (
        "optimizer",
        "optimizer-type",
        "optimizer-args",
        "use-8bit-adam",
        "adam-beta1",
        "adam-beta2",
        "adam-epsilon",
        "adam-weight-decay",
        "max-grad-norm",
    ),
    "not available": ("noise-offset", "network-dropout", "network-args", "use-dora"),
    CACHED: ("cache-latents", "cache-latents-to-disk", "dataloader-num-workers"),
    "not needed: launch it with torchrun": ("local-rank", "multi-gpu", "num-processes"),
    # Results
    "--out": ("output-dir", "output", "outdir", "output-path", "logging-dir"),
    "--out FILE.safetensors": ("output-name",),
    "--save-every": ("checkpointing-steps", "save-every-n-steps", "save-state", "save-steps"),
    "--preview-every": (
        "sample-every-n-steps",
        "sample-every-n-epochs",
        "save-every-n-epochs",
        "validation-epochs",
        "validation-steps",
    ),
    "--preview-prompt": ("validation-prompt", "sample-prompts"),
    "--resume": ("resume-from-checkpoint",),
    "not needed: always .safetensors": ("save-model-as", "use-safetensors"),
    "not needed: a LoRA is written in float32": ("save-precision",),
    "log.csv, which every training run writes": ("report-to", "log-with", "use-wandb"),
    NO_UPLOAD: ("push-to-hub", "hub-model-id", "hub-token"),
    # Generating
    "the first argument, the prompt itself": ("prompt",),
    "--negative-prompt": ("n-prompt", "neg-prompt", "negative", "uncond-prompt"),
    "--prompts": ("from-file", "prompt-file"),
    "--count": (
        "num-images",
        "num-images-per-prompt",
        "images-per-prompt",
        "n-iter",
        "n-samples",
        "num-samples",
        "batch-count",
        "batch-size",
    ),
    "--guidance": ("cfg", "cfg-scale", "guidance-scale", "scale"),
    "--sampler": ("scheduler", "sampler-name"),
    "--size": ("resolution",),
    "--size WIDTHxHEIGHT": ("width", "height", "w", "h"),
    "--lora": ("network-weights", "lora-path", "lora-weights", "lora-model"),
    "--lora FILE:SCALE": ("lora-scale", "lora-weight", "network-mul"),
    "--embedding": ("textual-inversion-embeddings", "embeddings"),
    "--image": ("init-image", "init-img", "image-path", "input"),
    "--strength": ("denoising-strength", "denoise"),
}

# {value here: values of other tools}; an answer of several words is printed as it is.
CLOSEST = "not available; the closest is "
VALUES = {
    "ddim": ("ddimscheduler",),
    "ddpm": ("ddpmscheduler",),
    "lcm": ("lcmscheduler",),
    "euler": ("k_euler", "eulerdiscretescheduler"),
    "euler_ancestral": (
        "euler_a",
        "euler-ancestral",
        "k_euler_a",
        "k_euler_ancestral",
        "eulerancestraldiscretescheduler",
    ),
    "dpmpp_2m": (
        "dpm++",
        "dpm++_2m",
        "dpmsolver",
        "dpmsolver++",
        "k_dpmpp_2m",
        "dpmsolvermultistepscheduler",
    ),
    "dpmpp_2m, without Karras's noise levels": ("dpm++_2m_karras", "dpmpp_2m_karras"),
    f"{CLOSEST}dpmpp_2m": (
        "unipc",
        "uni_pc",
        "unipcmultistepscheduler",
        "deis",
        "heun",
        "k_heun",
        "lms",
        "k_lms",
        "dpm2",
        "dpm_2",
        "plms",
        "pndm",
        "ipndm",
        "dpmpp_3m",
    ),
    f"{CLOSEST}euler_ancestral": (
        "dpm2_a",
        "dpm_2_ancestral",
        "dpmpp_2s_ancestral",
        "dpmpp_sde",
        "dpmpp_2m_sde",
        "dpmpp_3m_sde",
        "dpm++_sde",
        "dpm++_sde_karras",
        "dpm++_2m_sde",
        "dpm++_2m_sde_karras",
        "dpm++_3m_sde",
    ),
    "bfloat16": ("bf16",),
    "float16": ("fp16", "half"),
    "float32": ("fp32", "full", "no"),
    "constant, with --warmup N": ("constant_with_warmup",),
    "cosine": ("cosine_with_restarts", "cosine_annealing"),
    f"{CLOSEST}cosine": ("linear", "polynomial"),
    "full": ("dreambooth", "finetune"),
    "textual-inversion": ("textual_inversion", "ti", "embedding"),
}


def flag_here(name: str, known: Collection[str] | None = None) -> str:
    """The answer to another tool's flag, or "".

    known: the flags of a script, such as --size, which the answer has to be among (None: of any).
    """
    for answer, names in FLAGS.items():
        is_flag = answer.startswith("--")
        is_known = known is None or not is_flag or answer.split()[0] in known
        if name in names and is_known:
            return answer
    return ""


def value_here(name: str) -> str:
    """The answer to another tool's value, such as "euler_a", or ""."""
    return next((answer for answer, names in VALUES.items() if name in names), "")
