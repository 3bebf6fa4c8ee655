"""The DreamBooth benchmark (Ruiz et al. 2023, section 4.1): evaluate --benchmark FOLDER.

FOLDER is the `dataset` folder of github.com/google/dreambooth, or a part of it: a folder of photos
per subject and prompts_and_classes.txt. Each subject is trained; for each of its 25 prompts and 4
seeds, one image is generated in one stage (text to image) and one in two (Image-Alchemy); both sets
are scored. A scene in which the class was not found is scored as it is, and counted as failed. A
training run that was stopped is resumed, and an image that exists is kept. With torchrun, each
rank takes its share of the subjects.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

import alchemy

from .. import cli, insertion, lora, pipeline
from ..files import save_json
from ..formats import png
from ..formats.checkpoint import choose_device
from ..formats.text import read_text
from ..methods.captions import find_photos
from ..sdxl import SDXL
from . import distributed, evaluate
from .encoders import Clip, Encoder, load_clip, load_dino
from .optimizations import cached_steps

STAGES = ("one", "two")
FIGURES = ("DINO", "CLIP-I", "CLIP-T")
COLUMNS = ("subject", "stages", "images", "failed", *FIGURES, "source")
PAPERS = ("arXiv 2505.10743, abstract", "arXiv 2208.12242, table 1")
PUBLISHED = (  # subject, DINO, CLIP-I, CLIP-T, source
    ("Image-Alchemy on SDXL", 0.789, None, None, PAPERS[0]),
    ("DreamBooth on Stable Diffusion", 0.668, 0.803, 0.305, PAPERS[1]),
    ("DreamBooth on Imagen", 0.696, 0.812, 0.306, PAPERS[1]),
)
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
LIVE = ("cat", "dog")  # classes with the prompts of live subjects; all others are objects
SAME = ("weights", "vae", "model_config", "revision", "dtype", "fp8_base", "token", "train")
SAME += ("steps", "size")


def read_benchmark(folder: Path) -> tuple[dict[str, str], dict[bool, list[str]]]:
    """{subject with a folder: class} and {is it alive: prompts, {0} the token and {1} the class}.

    Raises ValueError where the table or the folders are missing.
    """
    table = folder / "prompts_and_classes.txt"
    text = read_text(table)
    classes = dict(re.findall(r"^(\w+),([\w ]+)$", text, re.MULTILINE))
    classes = {name: word for name, word in classes.items() if (folder / name).is_dir()}
    objects, _, live = text.partition("Live Subject Prompts")
    prompts = {
        False: re.findall(r"'([^']*\{1\}[^']*)'", objects),
        True: re.findall(r"'([^']*\{1\}[^']*)'", live),
    }
    if not classes or not all(prompts.values()):
        raise ValueError(f"{table}: no class of a folder beside it, or no prompts; see --help")
    return classes, prompts


def check_settings(args: argparse.Namespace, out: Path) -> None:
    """Write settings.json; raise ValueError if a subject was trained with other settings."""
    path = out / "settings.json"
    if not path.exists() or not any(out.glob("*/settings.json")):
        if not distributed.rank():
            save_json(cli.settings(args), path)
        return
    saved = cli.read_settings(path, evaluate.parser())
    for name in SAME:
        if saved.get(name) != getattr(args, name):
            raise ValueError(
                f"{path}: this benchmark was begun with --{name.replace('_', '-')} "
                f"{saved.get(name)}; continue with that, or name another --out"
            )


@dataclass(frozen=True)
class Job:
    """An image of the benchmark."""

    stage: str  # one of STAGES
    scene: str  # the prompt with the class word alone
    prompt: str  # with the token before it
    seed: int
    path: Path

    def metadata(self) -> dict[str, str | int]:
        """What identifies the image when it exists already."""
        return {"prompt": self.prompt, "seed": self.seed, "stages": self.stage}


def list_jobs(out: Path, prompts: list[str], token: str, class_word: str, seeds: int) -> list[Job]:
    """All images of a subject; out: its folder."""
    jobs = []
    for stage in STAGES:
        for number, template in enumerate(prompts):
            scene = " ".join(template.format("", class_word).split())
            prompt = template.format(token, class_word)
            for seed in range(seeds):
                path = out / stage / f"{number:02d}-{seed}.png"
                jobs.append(Job(stage, scene, prompt, seed, path))
    return jobs


def train_subject(args: argparse.Namespace, photos: Path, class_word: str, out: Path) -> None:
    """Run train.py in a process of its own, unless its LoRA exists."""
    if (out / "lora.safetensors").exists():
        return
    command = [sys.executable, str(cli.ROOT / "train.py"), str(photos), "--out", str(out)]
    if (out / "settings.json").exists():
        command.append("--resume")
    command += ["--class-word", class_word, "--token", args.token]
    for name in ("weights", "vae", "model_config", "revision", "device", "dtype"):
        if getattr(args, name):
            command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    if args.size:
        command += ["--size", f"{args.size[1]}x{args.size[0]}"]
    # The rank trains alone, on its own GPU.
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    if distributed.launched() and torch.cuda.is_available():
        command += ["--device", f"cuda:{torch.cuda.current_device()}"]
    command += shlex.split(args.train)
    status = run_to_saved_state(command, environment)
    if status:
        raise ValueError(f"{photos}: train.py ended with status {status}; its message is above")


def run_to_saved_state(command: list[str], environment: dict[str, str]) -> int:
    """The exit status of train.py, which is waited for when this process is interrupted.

    In a session of its own it does not see Ctrl-C. It gets one signal, after which it saves its
    state; the next one would end it at once.
    """
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        cli.log("the same command continues the benchmark")
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def generate(
    sdxl: SDXL, job: Job, args: argparse.Namespace, class_word: str
) -> tuple[Image.Image, bool]:
    """The image of a job, the subject's LoRA being on sdxl, and whether the subject is in it."""
    options = {"seed": job.seed, "size": args.size, "steps": args.steps}
    options["progress"] = partial(cached_steps, sdxl.unet)
    if job.stage == "one":
        return pipeline.text_to_image(sdxl, job.prompt, **options), True
    try:
        inserted = insertion.insert(sdxl, job.scene, class_word, args.token, **options)
        return inserted.result, True
    except ValueError as error:  # the class was not found in the scene, which stays as it is
        cli.log(f"{job.path}: {error}")
        with lora.lora_scale(sdxl, 0):
            return pipeline.text_to_image(sdxl, job.scene, **options), False


def run_subject(args: argparse.Namespace, subject: str, class_word: str, jobs: list[Job]) -> None:
    """Train the subject and generate the images of it that do not exist yet."""
    out = Path(args.out) / subject
    train_subject(args, Path(args.benchmark) / subject, class_word, out)
    missing = []
    for job in jobs:
        if job.path.exists():
            png.check(job.path, job.metadata())
        else:
            missing.append(job)
    if not missing:
        return
    sdxl = cli.load(args)
    alchemy.load_lora(sdxl, out / "lora.safetensors")
    for job in cli.progress(missing, len(missing), subject):
        job.path.parent.mkdir(parents=True, exist_ok=True)
        image, inserted = generate(sdxl, job, args, class_word)
        png.save(image, job.path, job.metadata() | {"inserted": inserted})


def score_subject(
    args: argparse.Namespace, subject: str, jobs: list[Job], dino: Encoder, clip: Clip
) -> list[dict]:
    """The mean figures of the subject's images in one stage and in two."""
    photos, _ = find_photos(Path(args.benchmark) / subject)
    rows = []
    for stage in STAGES:
        chosen = [job for job in jobs if job.stage == stage]
        paths = [job.path for job in chosen]
        prompts = {job.path.name: job.scene for job in chosen}
        scores, summary = evaluate.score(paths, photos, dino, clip, prompts)
        folder = Path(args.out) / subject / f"{stage}-scores"
        folder.mkdir(exist_ok=True)
        evaluate.write_scores(scores, summary, paths, photos, folder, cli.settings(args))
        failed = [path for path in paths if not png.read_metadata(path)["inserted"]]
        row = {"subject": subject, "stages": stage, "images": len(paths), "failed": len(failed)}
        rows.append(row | {name: summary[name] for name in FIGURES})
    return rows


def run(args: argparse.Namespace) -> None:
    """All of the benchmark; ends in a table beside the published figures."""
    classes, prompts = read_benchmark(Path(args.benchmark))
    jobs = {}
    for subject, word in sorted(classes.items()):
        templates = prompts[word in LIVE]
        folder = Path(args.out) / subject
        jobs[subject] = list_jobs(folder, templates, args.token, word, args.seeds)
    device, _ = choose_device(args.device, args.dtype)
    dino, clip = load_dino(args.dino, device), load_clip(args.clip, device)
    with cli.output_folder(args.out) as out:
        check_settings(args, out)
        for subject in list(jobs)[distributed.rank_slice()]:
            run_subject(args, subject, classes[subject], jobs[subject])
        distributed.barrier()
        if distributed.rank():
            return
        rows = []
        for subject in cli.progress(jobs, len(jobs), "scoring"):
            rows += score_subject(args, subject, jobs[subject], dino, clip)
        rows += summarize(rows)
        print(evaluate.format_table(rows, COLUMNS))
        save_json(rows, out / "benchmark.json")
        cli.log_written(out / "benchmark.json")


def summarize(rows: list[dict]) -> list[dict]:
    """The means over all subjects, and the published figures."""
    added = []
    for stage in STAGES:
        chosen = [row for row in rows if row["stages"] == stage]
        total = {"subject": "all", "stages": stage}
        for name in ("images", "failed"):
            total[name] = sum(row[name] for row in chosen)
        for name in FIGURES:
            total[name] = evaluate.mean([row[name] for row in chosen])
        added.append(total)
    for values in PUBLISHED:
        added.append(dict(zip(("subject", *FIGURES, "source"), values, strict=True)))
    return added
