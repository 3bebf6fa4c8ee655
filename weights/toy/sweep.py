"""Settings of the miniature compared by the classifier: of the sampler, and of train.py.

python -m weights.toy.sweep sampler      sampler x steps x guidance, 128 images each
python -m weights.toy.sweep training     train.py's settings, one at a time, on three subjects

Prints a Markdown table; rows appear as they are measured.
"""

import itertools
import time
from pathlib import Path

import alchemy
from alchemy import cli

from . import WEIGHTS, world
from .measure import Measure, share

SAMPLERS = (("euler", 20), ("euler", 30), ("dpmpp_2m", 15), ("dpmpp_2m", 20), ("ddpm", 50))
GUIDANCE = (2.0, 3.0, 5.0, 7.5)
TRAINING = (  # flags of train.py beside its defaults
    (),
    ("--steps", "200"),
    ("--steps", "450"),
    ("--learning-rate", "1e-3"),
    ("--learning-rate", "4e-3"),
    ("--rank", "4"),
    ("--rank", "64"),
    ("--prior-weight", "0.5"),
    ("--schedule", "cosine"),
)


def compare_samplers(measure: Measure) -> None:
    print("| sampler | steps | guidance | class | background | confident | distance | s/image |")
    print("|---|---|---|---|---|---|---|---|")
    for (sampler, steps), guidance in itertools.product(SAMPLERS, GUIDANCE):
        start = time.process_time()
        measure.prompts(sampler=sampler, steps=steps, guidance=guidance)
        seconds = (time.process_time() - start) / measure.count(500)
        found = measure.found
        figures = [found[key] for key in ("prompt class", "prompt background", "confident")]
        cells = [sampler, str(steps), str(guidance), *(f"{value:.1%}" for value in figures)]
        print(
            "|", " | ".join([*cells, f"{found['distance']:.2f}", f"{seconds:.2f}"]), "|", flush=True
        )


def compare_training(measure: Measure, subjects: tuple) -> None:
    print("| train.py | subject | background | class prompt: not the subject | class right |")
    print("|---|---|---|---|---|")
    for flags in TRAINING:
        hits = {"one 1.0": [], "one background 1.0": [], "prior": [], "prior class": []}
        for n, instance in enumerate(subjects):
            prompts, expected = measure.asked(instance)
            photos, name = WEIGHTS / "subjects" / instance, "".join(flags).strip("-") or "defaults"
            out = measure.out / "sweep" / name / instance
            measure.train_subject(photos, out, "--class-word", expected[0][0], *flags)
            alchemy.load_lora(measure.sdxl, out / "lora.safetensors")
            found = measure.one_stage(instance, prompts, expected, 5000 + 100 * n, (1.0,))
            measure.sdxl.free("unet")  # and the LoRA with it
            for key, values in hits.items():
                values += found[key]
        figures = " | ".join(f"{share(values):.0%}" for values in hits.values())
        print(f"| {' '.join(flags) or 'the defaults'} | {figures} |", flush=True)


def main(argv=None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("what", choices=("sampler", "training"))
    parser.add_argument("--subjects", nargs="+", default=world.HELD_OUT_INSTANCES[:3])
    parser.add_argument("--images", type=cli.COUNT, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("--out", type=Path, default=Path("out/sweep"), metavar="FOLDER")
    parser.add_argument("--weights", default=str(WEIGHTS / "mini"), metavar="FOLDER")
    args = parser.parse_args(argv)
    if args.what == "sampler":
        compare_samplers(Measure(args.out, args.images / 500, args.weights))
    else:
        compare_training(Measure(args.out, 1.0, args.weights), args.subjects)


if __name__ == "__main__":
    cli.run(main)
