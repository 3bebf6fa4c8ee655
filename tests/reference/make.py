"""Make the reference tensors with diffusers, transformers and peft; README.md lists them.

python tests/reference/make.py [NAME ...] [--out DIR]    all of them take about 40 seconds
python tests/reference/make.py [NAME ...] --check        make them elsewhere and compare
"""

import argparse
import os
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
}
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
    tolerances = {"torch.float64": 1e-11, "torch.float32": 5e-6}
    wrong = sorted(new.keys() ^ old.keys())
    for name in new.keys() & old.keys():
        a, b = new[name].double(), old[name].double()
        tolerance = tolerances.get(str(old[name].dtype), 0)
        if a.shape != b.shape or (a - b).abs().max() > tolerance * b.abs().max():
            wrong.append(name)
    return wrong


def check(names):
    """Make them in a temporary folder and compare; the exit status."""
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            make(name, Path(folder))
            file = f"{name}.safetensors"
            wrong = differing(Path(folder) / file, FOLDER / file)
            print(f"{name}: differs in {', '.join(wrong[:5])}" if wrong else f"{name}: the same")
            status |= bool(wrong)
    return status


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    add("--out", type=Path, metavar="DIR", default=FOLDER, help="folder for the files")
    add("--check", action="store_true", help="write nothing, compare with the files there")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in NAMES:
            parser.error(f"no reference is called {name}; there are {', '.join(NAMES)}")
    os.environ |= QUIET
    import torch

    # The order of additions, and so the last bit, depends on the number of threads.
    torch.set_num_threads(1)
    names = args.names or NAMES
    if args.check:
        return check(names)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        make(name, args.out)
        path = args.out / f"{name}.safetensors"
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
