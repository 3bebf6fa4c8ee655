"""Ranks for the tests: forked from this process, where torch is loaded already, with a store as
torchrun keeps one. Needs fork (Linux, macOS)."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import alchemy
from alchemy import cli
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import MAIN, Run, photos, pixels, tiny  # noqa: F401
from helpers.training import captioned, left_half


@pytest.fixture(autouse=True, scope="module")
def read_once(tiny, vocabulary_read_once):  # noqa: F811
    """What every rank reads, before they are forked."""
    alchemy.load(tiny, "cpu")
    Image.init()


def forked(world, work):
    """Call work(rank) in as many ranks: a Run of each. world 0: in one process without any."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def one(rank):
        if world:
            os.environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
        sys.stdout, sys.stderr = (open(f".{rank}.{name}", "w") for name in ("out", "err"))
        work(rank)

    fork = multiprocessing.get_context("fork").Process
    processes = [fork(target=one, args=(rank,)) for rank in range(world or 1)]
    for process in processes:
        process.start()
    runs = []
    for rank, process in enumerate(processes):
        process.join(120)
        out, err = (Path(f".{rank}.{name}").read_text() for name in ("out", "err"))
        runs.append(Run(process.exitcode, out, err))
        process.kill()
    return runs


def called(world, script, *argv, before=lambda rank: None):
    """A script in as many ranks; before(rank) is called in each, first."""

    def work(rank):
        before(rank)
        cli.run(lambda: MAIN[script]([str(a) for a in argv]))

    return forked(world, work)


def all_good(runs):
    assert [run.status for run in runs] == [0] * len(runs), [run.err for run in runs]
    assert not any(run.err for run in runs[1:])  # rank 0 alone speaks
    return runs


SUBJECT = ("--class-word", "dog")
FULL = ("--method", "full", "--prior-weight", 0)
CLASS = "--class-images 3 --prior-weight 0.5 --mask masks --mirror"
COMMON = "--learning-rate 1e-3 --accumulation 2 --preview-every 0 --steps 2 --save-every 2"
WAYS = {
    "prior": (*SUBJECT, "--rank", 2),
    "class": (*SUBJECT, "--rank", 2, *CLASS.split()),
    "full": (*SUBJECT, *FULL, "--text-encoders"),
    "word": (*SUBJECT, "--method", "textual-inversion"),
    "captions": ("--captions", "--rank", 2, "--caption-dropout", 0.3),
}


def flags(tiny, way, *more):
    folder = Path("photos")
    if not folder.exists():
        photos(folder) if way != "captions" else captioned(folder)
        Path("masks").mkdir()
        for path in folder.glob("*.png"):
            left_half(*pixels(path).shape[:2]).save(Path("masks") / path.name)
    return ("train.py", "photos", *WAYS[way], "--weights", tiny, *COMMON.split(), *more)
