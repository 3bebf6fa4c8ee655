"""The files of a training run: what is written where, what may be overwritten, what is removed.

Imports no torch, so that a folder that cannot be used is refused at once.
"""

import csv
import json
import os
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import cli
from ..extras import distributed
from ..files import check_no_pipe, remove_leftovers, resolve, save_json

if TYPE_CHECKING:
    from safetensors import safe_open

    from ..sdxl import SDXL
    from ..training import TrainState

STATE, SETTINGS = "state.safetensors", "settings.json"
FILES = (SETTINGS, STATE, "preview.png", "loss.png", "log.csv", "log.jsonl", "previews")
NEW = "new.safetensors"  # the result, until it is whole, where --out is a file
SCORES = ("subject", "class")  # of --validate, in log.csv
INPUTS = ("photos", "weights", "vae", "model_config", "mask", "class_folder", "init_lora")


# Names


def run_folder(args: Namespace) -> Path:
    """The folder of a run: --out, or, where that is a .safetensors file, the one of its name."""
    return Path(args.out.removesuffix(".safetensors"))


def embedding_name(token: str) -> str:
    """A file name for a token: A1111 and ComfyUI call an embedding by it. "<my-dog>": my-dog."""
    name = re.sub(r"[^\w.-]+", "-", token).strip("-._")
    name = name.encode()[:100].decode(errors="ignore") or "embedding"
    return name + "-embedding" if name.lower() in ("lora", "state") else name


def result_path(args: Namespace) -> Path:
    """The file or folder with the trained weights of a run."""
    if args.out.endswith(".safetensors"):
        return Path(args.out)
    if args.method == "lora":
        name = "lora.safetensors"
    elif args.method == "full":
        name = "checkpoint"
    elif args.format == "diffusers":
        name = "embedding"
    else:
        name = f"{embedding_name(str(args.token))}.safetensors"
    return Path(args.out) / name


# What exists


def run_files(args: Namespace, p: cli.Parser) -> list[Path]:
    """All that this run writes or removes, and what an earlier one has left in its folder."""
    out = run_folder(args)
    paths = [out / name for name in FILES] + [result_path(args)]
    if args.out.endswith(".safetensors"):
        paths.append(out / NEW)
    try:
        saved = cli.read_settings(out / SETTINGS, p)
        paths.append(result_path(Namespace(**vars(args) | saved | {"out": str(out)})))
    except ValueError:
        pass  # no settings of a run
    return paths


def check_no_overwrite(args: Namespace, p: cli.Parser) -> None:
    """Raise ValueError where the run would replace or remove files without --overwrite, or, with
    it, an input of its own."""
    paths = run_files(args, p)
    for name in INPUTS:
        value = getattr(args, name)
        given = resolve(value or "")
        removed = [path for path in paths if resolve(path) in (given, *given.parents)]
        if value and removed:
            flag = "SUBJECT_DIR" if name == "photos" else cli.flag_of(name)
            raise ValueError(
                f"{flag} {value}: this run would remove it, as a result of one in "
                f"--out {args.out}; name another --out"
            )
    existing = [path for path in paths if path.exists() or path.is_symlink()]
    if args.overwrite or not existing:
        return
    if (run_folder(args) / SETTINGS).exists() or result_path(args).exists():
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


# The state


def samples_per_step(args: Namespace) -> int:
    return args.batch * args.accumulation * distributed.world()


def open_state(args: Namespace) -> "safe_open | None":
    """The saved state of the run that --resume continues; None without one.

    Sets the number of threads to the state's: the order of additions, and so the last bit,
    depends on it. Raises ValueError where the run is finished or the state is of another kind.
    """
    import torch

    from ..formats.tensors import open_safetensors

    path, result = run_folder(args) / STATE, result_path(args)
    if not args.resume:
        return None
    finished = json.loads(path.with_name(SETTINGS).read_text(encoding="utf-8-sig")).get("finished")
    if result.exists() and (finished == args.steps or not path.exists()):
        remove_unfinished(path.parent)
        more = "--overwrite starts again"
        if path.exists():
            more = f"--steps above {finished} continues it, {more}"
        elif args.method == "lora":
            more = f"--init-lora continues its LoRA in another --out, {more}"
        raise ValueError(f"{args.out}: this run is finished; {more}")
    if not path.exists():
        return None
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
    # More threads than cores would take hours; with fewer, the last bits differ.
    count, cores = int(threads), os.cpu_count() or 1
    if count > cores:
        cli.log(f"warning: the run had {count} threads and has {cores} now; the last bits differ")
    torch.set_num_threads(min(count, cores))
    return saved


def restore(args: Namespace, state: "TrainState", saved: "safe_open") -> None:
    from safetensors import SafetensorError

    from ..formats.text import shorten

    path = run_folder(args) / STATE
    try:
        state.restore(saved, args.steps)
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        problem = shorten(f"{type(error).__name__}: {error}")
        raise ValueError(f"{path}: the state is damaged ({problem}); --overwrite it") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    cli.log(f"resuming at step {state.step} of {args.steps}")
    before, now = saved.metadata().get("batch"), str(samples_per_step(args))
    if before != now:
        cli.log(f"warning: a step had {before} samples before and has {now} now; they differ")


# The results


def metadata_of(args: Namespace, prompt: str) -> dict:
    """What the trained file says of its training."""
    metadata = {"base": Path(args.weights).name, "steps": args.steps, "seed": args.seed}
    metadata["name"] = run_folder(args).name
    if not args.captions:
        metadata |= {"prompt": prompt, "token": args.token}
    if args.class_word:
        metadata["class_word"] = args.class_word
    return metadata


def save_result(args: Namespace, sdxl: "SDXL", metadata: dict) -> list[Path]:
    """Write the trained weights; returns the paths. Replaces what this run has written before."""
    import torch

    from .. import lora
    from ..formats.embeddings import save_embedding
    from ..formats.lora import save_lora
    from ..formats.saving import save_checkpoint

    result, new = result_path(args), run_folder(args) / NEW
    one_file = args.out.endswith(".safetensors")
    path = new if one_file else result
    if args.method == "lora":
        metadata = metadata | {"targets": list(lora.ATTENTION)}
        save_lora(sdxl, path, format=args.format, metadata=metadata)
        written = [path]
    elif args.method == "textual-inversion":
        layout = "diffusers" if args.format == "diffusers" else "kohya"
        written = save_embedding(sdxl, path, args.token, layout, metadata)
    else:
        remove(path)  # of this run, stopped after it was written and before the state was removed
        header = {f"alchemy.{key}": value for key, value in metadata.items()}
        # bfloat16 would round away most of small steps.
        dtype = torch.float16 if sdxl.dtype.itemsize == 2 else None
        written = save_checkpoint(sdxl, path, header, dtype)
    if one_file:
        os.replace(new, result)
        return [result]
    return written


def mark_finished(args: Namespace) -> None:
    """The last act of a run. --method full drops its state, of 31 GB for SDXL; others keep it."""
    out = run_folder(args)
    if args.method == "full":
        (out / STATE).unlink(missing_ok=True)
    remove_unfinished(out)
    save_json(cli.settings(args) | {"finished": args.steps}, out / SETTINGS)


class Log:
    """log.csv and log.jsonl of a run: step, loss, learning rate, seconds per step.

    With --validate, also the scores of the previews, empty at the other steps.
    """

    COLUMNS = ("step", "loss", "learning_rate", "seconds")

    def __init__(self, out: Path, step: int, scores: tuple[str, ...] = ()):
        """Continues after `step`: later rows are of steps that are computed again."""
        self.path, self.columns, self.rows = out / "log.csv", (*self.COLUMNS, *scores), []
        check_no_pipe(self.path)
        if step and self.path.exists():
            try:
                self.read(step)
            except (ValueError, KeyError, csv.Error):
                raise ValueError(
                    f"{self.path}: damaged, or not the log of this run; move it away to continue"
                ) from None
        self.write()

    def read(self, step: int) -> None:
        """The rows of the file up to `step`."""
        with open(self.path, newline="", encoding="utf-8") as file:
            found = [row for row in csv.DictReader(file) if (row["step"] or "").isdecimal()]
        for row in found:
            if int(row["step"]) <= step and row.get("seconds") is not None:
                values = {name: float(row[name]) for name in self.columns if row.get(name)}
                self.rows.append(values | {"step": int(row["step"])})

    def add(self, *values: float) -> None:
        """A row with the values of COLUMNS."""
        self.rows.append(dict(zip(self.COLUMNS, values, strict=True)))
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

    def append(self, row: dict[str, float]) -> None:
        values = {name: row.get(name) for name in self.columns}
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(values.values())
        if values["loss"] != values["loss"]:  # NaN
            values["loss"] = None
        with open(self.path.with_suffix(".jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
