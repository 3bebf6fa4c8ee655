"""The three scripts as the tests run them: on a tiny checkpoint of random weights, in this process
or in one of their own."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import alchemy
import insert
import sample
import train
from alchemy import cli
from alchemy.sdxl import SDXL
from helpers import checkpoints

ROOT = Path(__file__).resolve().parents[2]
MAIN = {"train.py": train.main, "sample.py": sample.main, "insert.py": insert.main}
PROMPT, SCENE = "a photo of a sks dog in a park", "a photo of a dog in a park"
MADE = {}  # what is made once a session; an imported fixture is another one in each file
STEPS = 3  # of an image, where a test does not say otherwise


@dataclass
class Run:
    status: int
    out: str
    err: str

    @property
    def wrote(self):
        """The files that the last line of "wrote" names."""
        lines = [line for line in self.out.splitlines() if line.startswith("wrote ")]
        return [Path(path) for path in lines[-1].split()[1:]]


def call(script, *argv):
    """Run a script's main in this process, as the script does."""
    return call_main(MAIN[script], *argv)


def call_main(main, *argv):
    """Run a command's main function in this process, as the command does."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        try:
            cli.run(lambda: main([str(a) for a in argv]))
            status = 0
        except SystemExit as end:
            status = end.code or 0
    return Run(status, out.getvalue(), err.getvalue())


def process(*argv, before="", **options):
    """Run a script as a process of one thread; before: Python that comes first."""
    code = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = sys.argv[1:]\n"
    code += f"{before}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / argv[0]), *map(str, argv[1:])],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def good(run):
    assert run.status == 0 and "error:" not in run.err, run.err
    return run


def refused(run, *words):
    """The run ended with status 2 and one line, the last, that holds these words; returns it."""
    lines = [line for line in run.err.splitlines() if line.startswith("error:")]
    assert (run.status, len(lines), run.out) == (2, 1, ""), run
    assert run.err.splitlines()[-1] == lines[0] and len(lines[0]) < 400
    assert "Traceback" not in run.err
    for word in words:
        assert str(word) in lines[0], f"{word!r} is not in: {lines[0]}"
    return lines[0]


def contents(folder):
    """{path: bytes} of all files below a folder, hidden ones too."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def picture(height, width, seed=0):
    """Smooth colours, different at each place."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.BICUBIC)


def photos(folder, count=3):
    """A folder of a few small photos; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(24 + 4 * i, 20, i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A checkpoint folder of random weights: 32 x 32 pixels, VAE factor 4."""
    if "tiny" not in MADE:
        MADE["tiny"] = checkpoints.write_folder(tmp_path_factory.mktemp("tiny") / "tiny")
    return MADE["tiny"]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Images of few steps, a folder of its own to run in, and interrupts as at a terminal (in the
    background they may be ignored)."""
    whole, before = SDXL.defaults.fget, signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(SDXL, "defaults", property(lambda self: whole(self) | {"steps": STEPS}))
    monkeypatch.chdir(tmp_path)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def lora_file(tiny, tmp_path_factory):
    """A LoRA file that changes pictures visibly."""
    if "lora" in MADE:
        return MADE["lora"]
    sdxl = alchemy.load(tiny, "cpu")
    alchemy.add_lora(sdxl, 2)
    for i, p in enumerate(p for name, p in sdxl.unet.named_parameters() if ".lora." in name):
        p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    MADE["lora"] = tmp_path_factory.mktemp("lora") / "subject.safetensors"
    alchemy.save_lora(sdxl, MADE["lora"])
    return MADE["lora"]


@pytest.fixture
def taught(tiny, tmp_path):
    """taught(flags): train.py on good photos."""
    base = ("train.py", photos(tmp_path / "photos"), "--class-word", "dog", "--weights", tiny)
    base = (*base, "--steps", 1, "--preview-every", 0)
    return lambda *argv: call(*base, *(() if "--method" in argv else ("--rank", 2)), *argv)


@pytest.fixture
def drawn(tiny):
    return lambda *argv: call("sample.py", "a dog", "--weights", tiny, *argv)


@pytest.fixture
def inserted(tiny, lora_file):
    return lambda *argv: call(
        "insert.py", SCENE, "--class-word", "dog", "--weights", tiny, "--lora", lora_file, *argv
    )


@pytest.fixture
def pictures(tiny):
    """pictures(prompt, flags): the pixels of each picture that sample.py draws."""

    def draw(*argv):
        run = good(call("sample.py", *argv, "--weights", tiny))
        lines = [line for line in run.out.splitlines() if line.startswith("wrote ")]
        return [pixels(line.split(" ", 1)[1]) for line in lines]

    return draw


def nothing_written(folder="."):
    """Whether there is no result and no hidden file below."""
    return not any(name.startswith(("out/", ".")) or "/." in name for name in contents(folder))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).copy()


def same(a, b):
    return a.shape == b.shape and (a == b).all()
