"""Make the reference tensors with diffusers, transformers and peft; README.md lists them.

python tests/reference/make.py [NAME ...] [--out DIR]    all of them take about 40 seconds
python tests/reference/make.py [NAME ...] --check        make them elsewhere and compare
"""

import argparse
import os
from pathlib import Path

NETWORKS = ("text_1", "text_2", "vae", "vae_8", "unet_a", "unet_b", "lora")
VISION = ("dino", "clip_vision")
NAMES = (*NETWORKS, *VISION, "schedule", "trajectories", "img2img", "masked", "tokens")


def make(name, out):
    if name == "tokens":
        from tokens import make_tokens

        return make_tokens(out / "tokens.safetensors")
    if name in VISION:
        import vision

        return getattr(vision, "make_" + name)(out / f"{name}.safetensors")
    import networks
    import schedules
    import trajectories

    module = networks if name in NETWORKS else schedules if name == "schedule" else trajectories
    getattr(module, "make_" + name)(out / f"{name}.safetensors")


def differing(made, kept):
    """Names of tensors that differ.

    float64 may differ by 1e-11 of the largest element, float32 by 5e-6, all else not at all.
    """
    from safetensors.torch import load_file

    new, old = load_file(made), load_file(kept)
    tolerance = {"torch.float64": 1e-11, "torch.float32": 5e-6}
    wrong = sorted(new.keys() ^ old.keys())
    for name in new.keys() & old.keys():
        a, b = new[name], old[name]
        if (
            a.shape != b.shape
            or (a.double() - b.double()).abs().max()
            > tolerance.get(str(b.dtype), 0) * b.double().abs().max()
        ):
            wrong.append(name)
    return wrong


def check(names):
    """Make them in a temporary folder and compare; the exit status."""
    import tempfile

    wrong = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            make(name, Path(folder))
            wrong[name] = differing(
                Path(folder) / f"{name}.safetensors", Path(__file__).parent / f"{name}.safetensors"
            )
            print(
                f"{name}: "
                + (f"differs in {', '.join(wrong[name][:5])}" if wrong[name] else "the same")
            )
    return int(any(wrong.values()))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="what to make: " + ", ".join(NAMES) + " (all)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path(__file__).parent,
        help="folder for the files",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, compare with the files that are there"
    )
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        parser.error(f"no reference is called {unknown[0]}; there are {', '.join(NAMES)}")
    os.environ |= {
        "DIFFUSERS_VERBOSITY": "error",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
    }
    import torch

    # the order of additions, and so the last bit, depends on the number of threads
    torch.set_num_threads(1)
    if args.check:
        return check(args.names or NAMES)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or NAMES:
        make(name, args.out)
    files = sorted(args.out.glob("*.safetensors"))
    print(
        f"{args.out}: {', '.join(f'{f.name} {f.stat().st_size / 1e6:.2f}' for f in files)};"
        f" {sum(f.stat().st_size for f in files) / 1e6:.2f} MB in all"
    )


if __name__ == "__main__":
    raise SystemExit(main())
