"""The memory that a run of SDXL takes on a GPU: chooses --checkpointing and --fp8-base by what is
free, and names the flags that would have helped where it was not enough.

The sizes below are of SDXL at 1024 x 1024 in bfloat16, computed on torch's meta device
(tests/helpers/counting.py): every tensor counts from when it is made until nothing refers to it.
Gaps of the caching allocator and workspaces of cuDNN and cuBLAS are not in them (see MARGIN).
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from .. import cli
from . import distributed, optimizations
from .optimizations import missing_for_fp8

GB = 1e9
MARGIN = 0.9  # the share of the free memory that is planned with
PARAMETERS = {"unet": 2.567 * GB, "vae": 0.084 * GB, "text_encoders": 0.818 * GB}
FP8_UNET = 2.908 * GB  # bytes: linear layers in 8 bits, the rest in bfloat16
LORA_PER_RANK = 1_451_520  # parameters of a LoRA of rank 1
GUIDED_UNET, VAE_ENCODE, VAE_DECODE = 0.310 * GB, 1.348 * GB, 1.611 * GB  # activations
# A training step, activations and gradients: (first image, each further image).
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


def estimate(run: Run) -> dict[str, float]:
    """{phase: bytes} of a run of SDXL. The largest decides; see the module's docstring."""
    bytes_each = run.dtype.itemsize
    image = run.size[0] * run.size[1] / 1024**2 * bytes_each / 2  # relative to 1024 x 1024, bf16
    unet = FP8_UNET if run.fp8 else PARAMETERS["unet"] * bytes_each
    vae, encoders = (PARAMETERS[name] * bytes_each for name in ("vae", "text_encoders"))
    decoding = unet + max(GUIDED_UNET * image, vae + VAE_DECODE * image)
    if not run.method:
        return {"prompts": encoders, "sampling": decoding}

    # Trained parameters, their gradients and AdamW's two moments are float32.
    parameters = 0.0
    if run.method == "lora":
        parameters = LORA_PER_RANK * run.rank
    elif run.method == "full":
        unet = 0.0  # its weights are among the trained ones
        parameters = PARAMETERS["unet"]
        parameters += PARAMETERS["text_encoders"] if run.text_encoders else 0
    kept = unet + 3 * 4 * parameters
    if run.method == "textual-inversion":
        kept += encoders
    first, further = STEP[run.method, run.checkpointing]
    gradients = 4 * PARAMETERS["unet"] if run.method == "full" else 0.0
    step = gradients + (first - gradients) * image + further * image * (run.batch - 1)
    step += FULL_TEXT_ENCODERS if run.text_encoders else 0
    phases = {"encoding": vae + encoders + VAE_ENCODE * image, "steps": kept + step}
    if run.previews:
        sampling = max(GUIDED_UNET * image, vae + VAE_DECODE * image)
        phases["previews"] = kept + 4 * parameters + sampling
    return phases


def peak(run: Run) -> float:
    return max(estimate(run).values())


def run_of(args: Namespace, sdxl) -> Run:
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


def can_use_fp8(args: Namespace, sdxl, run: Run) -> bool:
    merged = getattr(args, "merge", False)
    return run.method != "full" and not merged and not missing_for_fp8(sdxl.device, args.compile)


def choose(run: Run, options: list[dict], free: float) -> Run:
    """The first of the run and its changed forms, from fastest to smallest, that fits into `free`
    bytes; the last where none does."""
    candidates = [run]
    for changes in options:
        candidates.append(replace(candidates[-1], **changes))
    for candidate in candidates:
        if peak(candidate) <= MARGIN * free:
            return candidate
    return candidates[-1]


def choose_memory_mode(args: Namespace, sdxl) -> None:
    """Set --checkpointing and --fp8-base where they were not given, by the GPU's free memory.

    Elsewhere, checkpointing is on for SDXL and off for the miniature, and fp8 is off.
    """
    trains, free = hasattr(args, "method"), free_memory(sdxl.device)
    is_sdxl = sdxl.defaults["size"] >= 1024
    options = []
    if trains and args.checkpointing is None:
        options.append({"checkpointing": True})
        args.checkpointing = is_sdxl and free is None
    if free is None or not is_sdxl:
        return
    run = run_of(args, sdxl)
    if args.fp8_base is None and can_use_fp8(args, sdxl, run):
        options.append({"fp8": True})
    chosen = choose(run, options, free)
    names = []
    if trains and chosen.checkpointing and not run.checkpointing:
        names.append("checkpointing")
        args.checkpointing = True
    if chosen.fp8 and not run.fp8:
        names.append("fp8 storage")
        args.fp8_base = True

        optimizations.prepare(sdxl, True, args.compile)
    used = f": {' and '.join(names)} on" if names else ""
    cli.log(f"{free / GB:.3g} GB free, {peak(chosen) / GB:.2g} GB needed by estimate{used}")


def smaller(args: Namespace, sdxl, run: Run) -> Iterator[tuple[str, dict]]:
    """(flag, the change in Run) of all that would need less memory, the cheapest first."""
    if run.method and not run.checkpointing:
        yield "--checkpointing", {"checkpointing": True}
    if run.method and args.batch > 1:
        yield "--batch 1", {"batch": run.batch // args.batch}
    if not run.fp8 and can_use_fp8(args, sdxl, run):
        yield "--fp8-base", {"fp8": True}
    cell = 8 * sdxl.vae_scale_factor
    for share in (0.75, 0.5):
        height, width = (int(side * share) // cell * cell for side in run.size)
        if height and width:
            yield f"--size {width}x{height}", {"size": (height, width)}
    if run.dtype == torch.float32:
        yield "--dtype bfloat16", {"dtype": torch.bfloat16}


def suggest_flags(args: Namespace, sdxl, free: float | None = None) -> str | None:
    """The fewest flags with which a run that was out of memory would have fitted, in a line; None
    where that is not known. free: bytes, of the GPU's whole memory by default."""
    if free is None and sdxl.device.type == "cuda":
        free = float(torch.cuda.mem_get_info(sdxl.device)[1])
    if free is None or sdxl.defaults["size"] < 1024:
        return None
    run = run_of(args, sdxl)
    flags = list(smaller(args, sdxl, run))
    for count in range(1, len(flags) + 1):
        for chosen in combinations(flags, count):
            changed = run
            for _, changes in chosen:
                changed = replace(changed, **changes)
            if peak(changed) <= MARGIN * free and peak(changed) < peak(run):
                names = {flag.split()[0]: flag for flag, _ in chosen}  # one --size
                return (
                    f"with {' and '.join(names.values())} it would need "
                    f"{peak(changed) / GB:.2g} GB by estimate, not {peak(run) / GB:.2g}, "
                    f"of {free / GB:.3g} GB"
                )
    return None


def log_peak(sdxl) -> None:
    """Log how much of a GPU's memory was really used."""
    if sdxl.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(sdxl.device)
        cli.log(f"{used / GB:.2g} GB of GPU memory at most")


def table() -> str:
    """The estimates for SDXL at 1024 x 1024, batch 1, as a Markdown table in GB."""
    training = Run((1024, 1024), torch.bfloat16, batch=2, method="lora")
    rows = {
        "generating an image": Run((1024, 1024), torch.bfloat16),
        "LoRA of rank 16, with prior preservation": training,
        "the same with `--checkpointing`": replace(training, checkpointing=True),
        "... and `--prior-weight 0 --preview-every 0`": replace(
            training, checkpointing=True, batch=1, previews=False
        ),
    }
    lines = ["| GB, by estimate | bfloat16 | `--fp8-base` |", "|---|---:|---:|"]
    for name, run in rows.items():
        whole, fp8 = (max(estimate(r).values()) / GB for r in (run, replace(run, fp8=True)))
        lines.append(f"| {name} | {whole:.1f} | {fp8:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
