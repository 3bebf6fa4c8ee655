"""The memory that a run of SDXL takes on a GPU: chooses --checkpointing and --fp8-base by what is
free, and names the flags that would have helped where it was not enough.

The sizes are of SDXL at 1024 x 1024 in bfloat16, computed on torch's meta device
(tests/helpers/counting.py). Gaps of the caching allocator and workspaces of cuDNN and cuBLAS are
not in them (see MARGIN).
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .. import cli
from ..sdxl import SDXL
from . import distributed, optimizations

GB = 1e9
MARGIN = 0.9  # the share of the free memory that is planned with
UNET, VAE, TEXT_ENCODERS = 2.567 * GB, 0.084 * GB, 0.818 * GB  # parameters
FP8_UNET = 2.908 * GB  # bytes: linear layers in 8 bits, the rest in bfloat16
LORA_PER_RANK = 1_451_520  # parameters of a LoRA of rank 1
VAE_DECODE = 1.611 * GB  # activations
# Activations and gradients of a training step: (first image, each further image).
STEP = {
    ("lora", False): (5.675 * GB, 5.637 * GB),
    ("lora", True): (0.784 * GB, 0.780 * GB),
    ("textual-inversion", False): (5.419 * GB, 5.419 * GB),
    ("textual-inversion", True): (0.784 * GB, 0.780 * GB),
    ("full", False): (13.159 * GB, 8.717 * GB),
    ("full", True): (10.691 * GB, 0.579 * GB),
}
FULL_TEXT_ENCODERS = 2.822 * GB  # more for the gradients and activations of both text encoders


@dataclass(frozen=True)
class Run:
    """What determines the memory of a run. batch: images through the UNet at once, with those of
    the prior. method: of train.py, or None for sampling."""

    size: tuple[int, int]
    dtype: torch.dtype
    batch: int = 1
    method: str | None = None
    rank: int = 16
    checkpointing: bool = False
    fp8: bool = False
    text_encoders: bool = False
    previews: bool = True


def estimate(run: Run) -> float:
    """The bytes that a run of SDXL needs at most: in a training step, or as it decodes an image."""
    bytes_each = run.dtype.itemsize
    image = run.size[0] * run.size[1] / 1024**2 * bytes_each / 2  # relative to 1024 x 1024, bf16
    kept = FP8_UNET if run.fp8 else UNET * bytes_each
    decoding = VAE * bytes_each + VAE_DECODE * image
    if not run.method:
        return kept + decoding

    trained = gradients = 0.0  # parameters, and bytes that do not depend on the image
    if run.method == "lora":
        trained = LORA_PER_RANK * run.rank
    elif run.method == "textual-inversion":
        kept += TEXT_ENCODERS * bytes_each
    else:
        kept, trained, gradients = 0.0, UNET, 4 * UNET
        trained += TEXT_ENCODERS if run.text_encoders else 0
    kept += 3 * 4 * trained  # with AdamW's two moments, all float32
    first, further = STEP[run.method, run.checkpointing]
    step = gradients + (first - gradients) * image + further * image * (run.batch - 1)
    step += FULL_TEXT_ENCODERS if run.text_encoders else 0
    return kept + max(step, 4 * trained + decoding if run.previews else 0)


def run_of(args: Namespace, sdxl: SDXL) -> Run:
    """The Run of a script's flags."""
    fp8 = bool(args.fp8_base)
    if not hasattr(args, "method"):
        return Run(args.size or sdxl.size, sdxl.dtype, fp8=fp8)
    has_prior = not args.captions and args.method != "textual-inversion" and args.prior_weight
    return Run(
        args.size,
        sdxl.dtype,
        args.batch * (2 if has_prior else 1),
        args.method,
        args.rank or 0,
        bool(args.checkpointing),
        fp8,
        args.text_encoders,
        bool(args.preview_every),
    )


def free_memory(device: torch.device) -> float | None:
    """Bytes that are free on a GPU, of all ranks the least; None on other devices."""
    if device.type != "cuda":
        return None
    return float(-distributed.all_reduce_max(-torch.cuda.mem_get_info(device)[0]))


def can_use_fp8(args: Namespace, sdxl: SDXL, run: Run) -> bool:
    merged = getattr(args, "merge", False)
    missing = optimizations.missing_for_fp8(sdxl.device, args.compile)
    return run.method != "full" and not merged and not missing


def choose_memory_mode(args: Namespace, sdxl: SDXL) -> None:
    """Set --checkpointing and --fp8-base where they were not given, by the GPU's free memory.

    Elsewhere, checkpointing is on for SDXL and off for the miniature, and fp8 is off.
    """
    trains, free = hasattr(args, "method"), free_memory(sdxl.device)
    is_sdxl = sdxl.defaults["size"] >= 1024
    options = []
    if trains and args.checkpointing is None:
        options.append("checkpointing")
        args.checkpointing = is_sdxl and free is None
    if free is None or not is_sdxl:
        return
    run = run_of(args, sdxl)
    if args.fp8_base is None and can_use_fp8(args, sdxl, run):
        options.append("fp8")
    chosen = []  # from the fastest form of the run to the smallest
    while options and estimate(run) > MARGIN * free:
        chosen.append(options.pop(0))
        run = replace(run, **{chosen[-1]: True})
    if "checkpointing" in chosen:
        args.checkpointing = True
    if "fp8" in chosen:
        args.fp8_base = True
        optimizations.prepare(sdxl, True, args.compile)
    used = f": {' and '.join(chosen)} on" if chosen else ""
    cli.log(f"{free / GB:.3g} GB free, {estimate(run) / GB:.2g} GB needed by estimate{used}")


def smaller(args: Namespace, sdxl: SDXL, run: Run) -> Iterator[tuple[str, dict]]:
    """(flag, the change in Run) of all that would need less memory, the cheapest first."""
    if run.method and not run.checkpointing:
        yield "--checkpointing", {"checkpointing": True}
    if run.method and args.batch > 1:
        yield "--batch 1", {"batch": run.batch // args.batch}
    if not run.fp8 and can_use_fp8(args, sdxl, run):
        yield "--fp8-base", {"fp8": True}
    if run.dtype == torch.float32:
        yield "--dtype bfloat16", {"dtype": torch.bfloat16}
    cell = 8 * sdxl.vae_scale_factor
    for share in (0.75, 0.5):
        height, width = (int(side * share) // cell * cell for side in run.size)
        if height and width:
            yield f"--size {width}x{height}", {"size": (height, width)}


def suggest_flags(args: Namespace, sdxl: SDXL, free: float | None = None) -> str | None:
    """Flags with which a run that was out of memory would have fitted, in a line; None where that
    is not known. free: bytes, of the GPU's whole memory by default."""
    if free is None and sdxl.device.type == "cuda":
        free = float(torch.cuda.mem_get_info(sdxl.device)[1])
    if free is None or sdxl.defaults["size"] < 1024:
        return None
    run = changed = run_of(args, sdxl)
    flags = {}  # one --size
    for flag, changes in smaller(args, sdxl, run):
        flags[flag.split()[0]] = flag
        changed = replace(changed, **changes)
        if estimate(changed) <= MARGIN * free:
            return (
                f"with {' and '.join(flags.values())} it would need {estimate(changed) / GB:.2g} "
                f"GB by estimate, not {estimate(run) / GB:.2g}, of {free / GB:.3g} GB"
            )
    return None


def log_peak(sdxl: SDXL) -> None:
    """Log how much of a GPU's memory was really used."""
    if sdxl.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(sdxl.device)
        cli.log(f"{used / GB:.2g} GB of GPU memory at most")


def print_table() -> None:
    """The estimates for SDXL at 1024 x 1024, batch 1, as a Markdown table in GB."""
    sampling = Run((1024, 1024), torch.bfloat16)
    training = replace(sampling, batch=2, method="lora")
    checkpointing = replace(training, checkpointing=True)
    rows = {
        "generating an image": sampling,
        "LoRA of rank 16, with prior preservation": training,
        "the same with `--checkpointing`": checkpointing,
        "... and `--prior-weight 0 --preview-every 0`": replace(
            checkpointing, batch=1, previews=False
        ),
    }
    print("| GB, by estimate | bfloat16 | `--fp8-base` |\n|---|---:|---:|")
    for name, run in rows.items():
        fp8 = estimate(replace(run, fp8=True)) / GB
        print(f"| {name} | {estimate(run) / GB:.1f} | {fp8:.1f} |")


if __name__ == "__main__":
    print_table()
