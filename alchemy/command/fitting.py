"""What a run will take of the device's memory, which savers that calls for, and what to say where it was too much all the same."""

import warnings
from dataclasses import replace

import torch

from .. import cli
from ..extras import memory, optimizations
from ..extras.optimizations import missing_for_fp8
from ..extras import distributed

ROOM = 0.9  # of the free memory is planned with: the rest goes to the allocator's gaps and the workspaces of cuDNN and cuBLAS


def choose(free, options, bytes_of):
    """The first of the options, from the quickest to the leanest, that fits into `free` bytes; the last, where none does."""
    return next((option for option in options if bytes_of(option) <= ROOM * free), options[-1])


def free(device):
    """Bytes that are free on the device now; None of one that keeps them to itself, as the CPU, where other rules hold."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def run_of(args, sdxl):
    """The memory.Run of the flags, of train.py once they are complete, or of sample.py and insert.py."""
    fp8 = bool(getattr(args, "fp8_base", False))
    if not hasattr(args, "method"):
        return memory.Run(args.size or sdxl.size, sdxl.dtype, fp8=fp8)
    of_class = (
        not args.captions and args.method != "textual-inversion" and args.prior_weight
    )  # the class goes through the UNet beside the subject
    return memory.Run(
        args.size,
        sdxl.dtype,
        args.batch * (2 if of_class else 1),
        args.method,
        args.rank or 0,
        bool(args.checkpointing),
        fp8,
        args.accumulation,
        args.text_encoders,
        bool(args.preview_every),
    )


def phases(sdxl, run):
    """{phase: bytes} of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (memory.training if run.method else memory.sampling)(sdxl, run)


def told(parts):
    """A line of what the phases take, and which takes most."""
    name = max(parts, key=parts.get)
    return (
        f"{parts[name] / 1e9:.2g} GB of memory by estimate, most of it in {name} ("
        + ", ".join(f"{k} {v / 1e9:.2g}" for k, v in parts.items())
        + ")"
    )


def takes_fp8(args, sdxl, run):
    """Whether --fp8-base goes with the other flags, and on this device."""
    return (
        hasattr(args, "fp8_base")
        and run.method != "full"
        and not getattr(args, "merge", False)
        and not missing_for_fp8(sdxl.device, args.compile)
    )


def options(args, sdxl, run):
    """The runs that may be chosen, as far as the flags leave it open, from the quickest to the leanest: as it is, checkpointing, fp8 too."""
    found = [run]
    if getattr(args, "checkpointing", True) is None:
        found.append(replace(run, checkpointing=True))
    if getattr(args, "fp8_base", False) is None and takes_fp8(args, sdxl, run):
        found.append(replace(found[-1], fp8=True))
    return found


def settle(args, sdxl, foretell=False):
    """Choose, by the device's free memory, what --checkpointing and --fp8-base leave open; say it, and what the run will take.

    Nothing is chosen for a CPU, and nothing said, but with foretell. What is known then is kept for the line that a run out of memory
    ends in (leaner).
    """
    run, room, known = run_of(args, sdxl), free(sdxl.device), {}
    room = room and -distributed.all_reduce_max(-room)  # all ranks choose alike, by the one that has least

    def most(option):
        known[option] = known.get(option) or phases(sdxl, option)
        return max(known[option].values())

    if room is not None:
        open_to = options(args, sdxl, run)
        # A picture has room enough where all weights have three times, a step where each of its pictures has that of four: by half and
        # more (python -m alchemy.extras.memory). To know it better takes seconds.
        pictures = (4 * run.batch if run.method else 3) * max(
            1, run.size[0] * run.size[1] / (sdxl.size[0] * sdxl.size[1])
        )
        if run.method == "full" or pictures * memory.weights(sdxl) > ROOM * room:
            run = choose(room, open_to, most)
        named = [
            name
            for name, on in (("checkpointing", run.checkpointing), ("fp8 storage", run.fp8))
            if on and len(open_to) > 1
        ]
        cli.say(f"free {room / 1e9:.3g} GB" + (": " + " and ".join(named) + " on" if named else ""))
        cli.LEANER[:] = [lambda: leaner(run, room, open_flags(args, sdxl, run), most)]
        if hasattr(args, "checkpointing"):
            args.checkpointing = run.checkpointing
        if run.fp8 and not args.fp8_base:
            args.fp8_base = True
            optimizations.prepare(sdxl, True, args.compile)
    if foretell or run in known:
        most(run)
        cli.say(told(known[run]))


def measured(sdxl):
    """Say what a GPU's memory really had to hold."""
    if sdxl.device.type == "cuda":
        cli.say(f"{torch.cuda.max_memory_allocated(sdxl.device) / 1e9:.2g} GB of memory at most")


def open_flags(args, sdxl, run):
    """[(flag, what it changes in the run)]: all that would make it leaner, those first that cost least."""
    sides = [
        tuple(
            side * part // 4 // (8 * sdxl.vae_scale_factor) * 8 * sdxl.vae_scale_factor
            for side in run.size
        )
        for part in (3, 2)
    ]
    flags = [("--checkpointing", dict(checkpointing=True))] if run.method else []
    if run.method and args.batch > 1:
        flags.append(("--batch 1", dict(batch=run.batch // args.batch)))
    if takes_fp8(args, sdxl, run):
        flags.append(("--fp8-base", dict(fp8=True)))
    flags += [(f"--size {w}x{h}", dict(size=(h, w))) for h, w in sides if h and w]
    if run.dtype == torch.float32:
        flags.append(("--dtype bfloat16", dict(dtype=torch.bfloat16)))
    return [(flag, change) for flag, change in flags if replace(run, **change) != run]


def leaner(run, room, flags, bytes_of):
    """The first of the flags with which the run would have fitted into `room` bytes, or, where none is enough alone, the first few
    together; None where even all are not enough."""
    several = [flags[:n] for n in range(2, len(flags) + 1)]
    for some in [[flag] for flag in flags] + several:
        option = replace(
            run, **{name: value for _, change in some for name, value in change.items()}
        )
        if bytes_of(option) <= ROOM * room and bytes_of(option) < bytes_of(run):
            names = {
                flag.split()[0]: flag for flag, _ in some
            }.values()  # of two sizes the smaller holds
            return (
                f"with {' and '.join(names)} it would take {bytes_of(option) / 1e9:.2g} GB by estimate, not {bytes_of(run) / 1e9:.2g}, "
                f"of {room / 1e9:.3g} GB that were free"
            )
    return None
