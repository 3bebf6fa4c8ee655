"""The memory that a run of SDXL takes on a GPU: chooses --checkpointing and --fp8-base by what is
free, and names the flags that would have helped where it was not enough.

The sizes are of SDXL at 1024 x 1024 in bfloat16, counted on torch's meta device
(tests/bench/peak_bytes.py). Gaps of the caching allocator and workspaces of cuDNN and cuBLAS are
not in them (see MARGIN).
"""

from argparse import Namespace
from collections.abc import Iterator

import torch

from .. import cli
from ..sdxl import SDXL
from ..vae import STRIPS_ABOVE
from . import distributed, optimizations

GB = 1e9
MARGIN = 0.9  # the share of the free memory that is planned with
UNET, VAE, TEXT_ENCODERS = 2.567 * GB, 0.084 * GB, 0.818 * GB  # parameters
FP8_UNET = 2.908 * GB  # bytes: linear layers in 8 bits, the rest in bfloat16
LORA_PER_RANK = 1_451_520  # parameters of a LoRA of rank 1
VAE_DECODE = 1.611 * GB  # activations; those of the UNet in a sampling are fewer
DECODE_IN_STRIPS = (0.312 * GB, 768)  # of large images: (fixed, bytes of each pixel)
# Activations and gradients of a training step: (first image, each further image).
STEP = {
    ("lora", False): (5.674 * GB, 5.627 * GB),
    ("lora", True): (0.608 * GB, 0.561 * GB),
    ("textual-inversion", False): (5.409 * GB, 5.409 * GB),
    ("textual-inversion", True): (0.703 * GB, 0.703 * GB),
    ("full", False): (13.159 * GB, 8.717 * GB),
    ("full", True): (10.541 * GB, 0.363 * GB),
}
FULL_TEXT_ENCODERS = 2.822 * GB  # more for the gradients and activations of both text encoders


def method_of(args: Namespace) -> str | None:
    """The method of a training run, None of sampling."""
    return getattr(args, "method", None)


def decode_activations(pixels: int) -> float:
    """Bytes that decoding an image takes in bfloat16 (see vae.use_strips)."""
    if pixels > STRIPS_ABOVE:
        fixed, per_pixel = DECODE_IN_STRIPS
        return fixed + per_pixel * pixels
    return VAE_DECODE * pixels / 1024**2


def estimate(args: Namespace, sdxl: SDXL, **changes: object) -> float:
    """The bytes that a run of SDXL needs at most: in a training step, or as it decodes an image.

    changes: of the flags.
    """
    args, bytes_each = Namespace(**vars(args) | changes), sdxl.dtype.itemsize
    height, width = args.size or sdxl.size
    image = height * width / 1024**2 * bytes_each / 2  # relative to 1024 x 1024 in bfloat16
    kept = FP8_UNET if args.fp8_base else UNET * bytes_each
    decoding = VAE * bytes_each + decode_activations(height * width) * bytes_each / 2
    method = method_of(args)
    if not method:
        return kept + decoding

    trained = gradients = 0.0  # parameters, and bytes that do not depend on the image
    if method == "lora":
        trained = LORA_PER_RANK * args.rank
    elif method == "textual-inversion":
        kept += TEXT_ENCODERS * bytes_each
    else:
        kept, trained, gradients = 0.0, UNET, 4 * UNET
        trained += TEXT_ENCODERS if args.text_encoders else 0
    kept += 3 * 4 * trained  # with AdamW's two moments, all float32
    has_prior = not args.captions and method != "textual-inversion" and args.prior_weight
    further_images = args.batch * (2 if has_prior else 1) - 1
    first, further = STEP[method, bool(args.checkpointing)]
    step = gradients + (first - gradients) * image + further * image * further_images
    step += FULL_TEXT_ENCODERS if args.text_encoders else 0
    return kept + max(step, 4 * trained + decoding if args.preview_every else 0)


def free_memory(device: torch.device) -> float | None:
    """Bytes that are free on a GPU, of all ranks the least; None on other devices."""
    if device.type != "cuda":
        return None
    return float(-distributed.all_reduce_max(-torch.cuda.mem_get_info(device)[0]))


def can_use_fp8(args: Namespace, sdxl: SDXL) -> bool:
    merged = getattr(args, "merge", False)
    missing = optimizations.missing_for_fp8(sdxl.device, args.compile)
    return method_of(args) != "full" and not merged and not missing


def choose_memory_mode(args: Namespace, sdxl: SDXL) -> None:
    """Set --checkpointing and --fp8-base where they were not given, by the GPU's free memory.

    Elsewhere, checkpointing is on for SDXL and off for the miniature, and fp8 is off.
    """
    trains, free = bool(method_of(args)), free_memory(sdxl.device)
    is_sdxl = sdxl.defaults["size"] >= 1024
    options = {}  # from the fastest form of the run to the smallest
    if trains and args.checkpointing is None:
        options["checkpointing"] = "checkpointing"
        args.checkpointing = is_sdxl and free is None
    if free is None or not is_sdxl:
        return
    if args.fp8_base is None and can_use_fp8(args, sdxl):
        options["fp8_base"] = "fp8 storage"
    chosen = []
    for name, text in options.items():
        if estimate(args, sdxl) > MARGIN * free:
            setattr(args, name, True)
            chosen.append(text)
    if "fp8 storage" in chosen:
        optimizations.prepare(sdxl, True, args.compile)
    needed, used = estimate(args, sdxl), f": {' and '.join(chosen)} on" if chosen else ""
    cli.log(f"{free / GB:.3g} GB free, {needed / GB:.2g} GB needed by estimate{used}")


def smaller(args: Namespace, sdxl: SDXL) -> Iterator[tuple[str, dict]]:
    """(flag, its value) of all that would need less memory, the cheapest first."""
    if method_of(args) and not args.checkpointing:
        yield "--checkpointing", {"checkpointing": True}
    if method_of(args) and args.batch > 1:
        yield "--batch 1", {"batch": 1}
    if not args.fp8_base and can_use_fp8(args, sdxl):
        yield "--fp8-base", {"fp8_base": True}
    cell = 8 * sdxl.vae_scale_factor
    for share in (0.75, 0.5):
        height, width = (int(side * share) // cell * cell for side in args.size or sdxl.size)
        if height and width:
            yield f"--size {width}x{height}", {"size": (height, width)}


def suggest_flags(args: Namespace, sdxl: SDXL, free: float | None = None) -> str | None:
    """Flags with which a run that was out of memory would have fitted, in a line; None where that
    is not known. free: bytes, of the GPU's whole memory by default."""
    if free is None and sdxl.device.type == "cuda":
        free = float(torch.cuda.mem_get_info(sdxl.device)[1])
    if free is None or sdxl.defaults["size"] < 1024:
        return None
    flags, changes = {}, {}
    for flag, change in smaller(args, sdxl):
        flags[flag.split()[0]] = flag  # one --size
        changes |= change
        needed = estimate(args, sdxl, **changes)
        if needed <= MARGIN * free:
            return (
                f"with {' and '.join(flags.values())} it would need {needed / GB:.2g} GB by "
                f"estimate, not {estimate(args, sdxl) / GB:.2g}, of {free / GB:.3g} GB"
            )
    return None


def log_peak(sdxl: SDXL) -> None:
    """Log how much of a GPU's memory was really used."""
    if sdxl.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(sdxl.device)
        cli.log(f"{used / GB:.2g} GB of GPU memory at most")
