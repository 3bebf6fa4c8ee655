"""The files of a training run: what is written where, what may be overwritten, what is removed.

Imports no torch, so that a folder that cannot be used is refused at once.
"""

import csv
import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

from .. import cli
from ..extras import distributed
from ..files import remove_leftovers

STATE, SETTINGS = "state.safetensors", "settings.json"
FILES = (SETTINGS, STATE, "preview.png", "loss.png", "log.csv", "log.jsonl", "previews")
SCORES = ("subject", "class")  # of --validate, in log.csv
INPUTS = ("photos", "weights", "vae", "model_config", "mask", "class_folder", "init_lora")


def embedding_name(token: str) -> str:
    """A file name for a token: A1111 and ComfyUI call an embedding by it. "<my-dog>": my-dog."""
    name = re.sub(r"[^\w.-]+", "-", token).strip("-._")
    name = name.encode()[:100].decode(errors="ignore") or "embedding"
    return name + "-embedding" if name.lower() in ("lora", "state") else name


def result_path(args: Namespace) -> Path:
    """The file or folder with the trained weights of a run."""
    out = Path(args.out)
    if args.method == "lora":
        return out / "lora.safetensors"
    if args.method == "full":
        return out / ("checkpoint.safetensors" if args.single_file else "checkpoint")
    if args.format == "diffusers":
        return out / "embedding"
    return out / f"{embedding_name(str(args.token))}.safetensors"


def run_files(args: Namespace, p: cli.Parser) -> list[Path]:
    """All that this run writes or removes in --out, and what an earlier one has left there."""
    out = Path(args.out)
    paths = [out / name for name in FILES] + [result_path(args)]
    try:
        saved = cli.read_settings(out / SETTINGS, p)
        paths.append(result_path(Namespace(**vars(args) | saved | {"out": args.out})))
    except ValueError:
        pass  # no settings of a run
    return paths


def check_no_overwrite(args: Namespace, p: cli.Parser) -> None:
    """Raise ValueError where the run would replace or remove files without --overwrite, or, with
    it, an input of its own."""
    paths = run_files(args, p)
    for name in INPUTS:
        if not getattr(args, name):
            continue
        given = Path(getattr(args, name)).expanduser().resolve()
        for path in paths:
            if path.resolve() in (given, *given.parents):
                flag = "SUBJECT_DIR" if name == "photos" else f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{flag} {getattr(args, name)}: this run would remove it, as a result of one "
                    f"in --out {args.out}; name another --out"
                )
    existing = [path for path in paths if path.exists() or path.is_symlink()]
    if args.overwrite or not existing:
        return
    if (Path(args.out) / SETTINGS).exists() or result_path(args).exists():
        raise ValueError(
            f"{args.out} holds a run already: --resume continues it, --overwrite starts again, "
            "--out names another folder"
        )
    raise ValueError(
        f"{existing[0]} exists, and this run would replace it; "
        "name another --out, or use --overwrite"
    )


def remove_old(args: Namespace, p: cli.Parser) -> None:
    for path in run_files(args, p):
        remove(path)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(out: Path) -> None:
    """Remove what a killed run left half-written."""
    for folder in (out, out / "previews", out / "class"):
        remove_leftovers(folder)


def metadata_of(args: Namespace, prompt: str) -> dict:
    """What the trained file says of its training."""
    metadata = {"base": Path(args.weights).name, "steps": args.steps, "seed": args.seed}
    metadata["name"] = Path(args.out).name
    if not args.captions:
        metadata |= {"prompt": prompt, "token": args.token}
    if args.class_word:
        metadata["class_word"] = args.class_word
    return metadata


def save_result(args: Namespace, sdxl, path: Path, metadata: dict) -> list[Path]:
    """Write the trained weights; returns the paths. Replaces what this run has written before."""
    import torch

    from .. import lora
    from ..formats.embeddings import save_embedding
    from ..formats.lora import save_lora
    from ..formats.saving import save_checkpoint

    if args.method == "lora":
        metadata = metadata | {"targets": list(lora.ATTENTION)}
        save_lora(sdxl, path, format=args.format, metadata=metadata)
        return [path]
    if args.method == "textual-inversion":
        layout = "diffusers" if args.format == "diffusers" else "kohya"
        return save_embedding(sdxl, path, args.token, layout, metadata)
    remove(path)  # of this run, stopped after it was written and before the state was removed
    header = {f"alchemy.{key}": value for key, value in metadata.items()}
    # bfloat16 would round away most of small steps.
    dtype = torch.float16 if sdxl.dtype.itemsize == 2 else None
    return save_checkpoint(sdxl, path, header, dtype)


def samples_per_step(args: Namespace) -> int:
    return args.batch * args.accumulation * distributed.world()


def open_state(args: Namespace):
    """The state of an interrupted run, an open file, and its header; None and {} without one."""
    from ..formats.tensors import open_safetensors

    path = Path(args.out) / STATE
    if not args.resume or not path.exists():
        return None, {}
    saved = open_safetensors(path, "--overwrite starts again")
    header = saved.metadata() or {}
    if header.get("kind") != args.method:
        raise ValueError(
            f"{path}: the state is of another kind of run ({header.get('kind', 'unknown')}, not "
            f"{args.method}); resume with its settings, or --overwrite it"
        )
    threads = header.get("threads", "")
    if not threads.isdecimal() or not 1 <= int(threads) <= 1024:
        raise ValueError(f"{path}: the state is damaged (its thread count); --overwrite it")
    return saved, header


def restore(args: Namespace, state, saved, header: dict) -> None:
    try:
        state.restore(saved, args.steps)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{Path(args.out) / STATE}: {error}") from None
    cli.log(f"resuming at step {state.step} of {args.steps}")
    before, now = header.get("batch"), str(samples_per_step(args))
    if before != now:
        cli.log(f"warning: a step had {before} samples before and has {now} now; they differ")


class Log:
    """log.csv and log.jsonl of a run: step, loss, learning rate, seconds per step.

    With --validate, also the scores of the previews, empty at the other steps.
    """

    COLUMNS = ("step", "loss", "learning_rate", "seconds")

    def __init__(self, out: Path, step: int, scores: tuple[str, ...] = ()):
        """Continues after `step`: later rows are of steps that are computed again."""
        self.path, self.columns, self.rows = out / "log.csv", (*self.COLUMNS, *scores), []
        found = []
        if step and self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                found = [row for row in csv.DictReader(file) if (row["step"] or "").isdigit()]
        for row in found:
            if int(row["step"]) <= step and row.get("seconds") is not None:
                values = {name: float(row[name]) for name in self.columns if row.get(name)}
                self.rows.append(values | {"step": int(row["step"])})
        self.write()

    def add(self, step: int, loss: float, learning_rate: float, seconds: float) -> None:
        row = (step, loss, learning_rate, seconds)
        self.rows.append(dict(zip(self.COLUMNS, row, strict=True)))
        self.append(self.rows[-1])

    def add_scores(self, step: int, scores: dict[str, float]) -> None:
        """Fill the score columns of the last row, that of `step`; before training there is none."""
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": step})
        self.rows[-1] |= scores
        self.write()

    def write(self) -> None:
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(self.columns)
        self.path.with_suffix(".jsonl").unlink(missing_ok=True)
        for row in self.rows:
            self.append(row)

    def append(self, row: dict) -> None:
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([row.get(name) for name in self.columns])
        values = {name: row.get(name) for name in self.columns}
        if values["loss"] != values["loss"]:  # NaN
            values["loss"] = None
        with open(self.path.with_suffix(".jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
