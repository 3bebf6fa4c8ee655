"""How a run goes: the flags of the savers, and what is said of the loop. Imports no torch, but where a run is under way."""

from .. import cli


def add_flags(p):
    g = p.add_argument_group("fast and small")
    g.add_argument(
        "--fp8-base",
        action=cli.BooleanOptionalAction,
        default=None,
        help="keep the UNet's linear layers in 8 bits: half of bfloat16's memory, up to 1/16 off each weight (default: no)",
    )
    g.add_argument(
        "--compile",
        action=cli.BooleanOptionalAction,
        default=None,
        help="compile the UNet's blocks: quicker steps, after a first one that takes minutes (default: no)",
    )


def prepare(args, sdxl):
    """The savers of the flags, on sdxl, for whenever its UNet is read; returns it."""
    if args.fp8_base or args.compile:
        from ..extras import optimizations

        optimizations.prepare(sdxl, args.fp8_base, args.compile)
    return sdxl


def ready(args, sdxl):
    """The same, and what the device's free memory calls for; of training, more has to be known for that (training.main). Returns it."""
    prepare(args, sdxl)
    if not hasattr(args, "method"):
        from . import fitting

        fitting.settle(args, sdxl)
    return sdxl


def drawing(args, sdxl, steps):
    """The Steps of a picture, keys and values of its prompt computed once; how long compiling took is said."""
    from ..extras import compile, optimizations

    steps = optimizations.cached_steps(sdxl.unet, steps)
    return compile.report_compile_time(steps, cli.say) if args.compile else steps


def ran(schedule, grid, asked):
    """What really runs, in a line: "29 of 50 steps, first t 561 (sigma 3.02)"."""
    t, ab = grid[0][0], schedule.alpha_bar_at(grid[0][0])
    sigma = f"{((1 - ab) / ab) ** 0.5:.2f}" if ab else "infinite"
    return f"{len(grid)} of {asked} steps, first t {t:g} (sigma {sigma})"
