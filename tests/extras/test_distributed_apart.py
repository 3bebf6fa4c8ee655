"""What several ranks do side by side, pictures above all, and how they end when something goes wrong."""

import os
import shutil
import signal
from datetime import timedelta
from pathlib import Path

from alchemy import dataset
from alchemy.extras import distributed
from alchemy.formats import png
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.forking import all_good, called, flags, read_once  # noqa: F401
from helpers.running import call, contents, good, lora_file, pixels, quick, refused, same, tiny  # noqa: F401


def test_class_pictures_are_the_same_files_whoever_draws_them(tiny):
    given = flags(
        tiny,
        "class",
        "--batch",
        1,
        "--class-images",
        5,
        "--class-folder",
        "class",
        "--steps",
        1,
        "--out",
        "run",
    )
    good(call(*given))
    alone, there = contents("class"), Path("class/0001.png")
    for name in alone.keys() - {there.name}:
        Path("class", name).unlink()
    before = there.stat().st_mtime_ns
    run, _ = all_good(called(2, *given, "--overwrite"))
    assert (
        "class images: 2/2" in run.err
        and contents("class") == alone
        and there.stat().st_mtime_ns == before
    )


def test_a_data_set_of_several_ranks_is_that_of_one_also_where_it_goes_on(tiny, lora_file):
    Path("prompts.txt").write_text("a photo of a sks dog\na dog at night\n")
    given = (
        "sample.py",
        "--prompts",
        "prompts.txt",
        "--weights",
        tiny,
        "--lora",
        lora_file,
        "--count",
        2,
        "--seed",
        5,
        "--out",
        "set",
    )
    run, other = all_good(called(2, *given))
    assert (
        run.out.split()
        == ["wrote", "set/00000.png", "wrote", "set/00002.png", "wrote", "set/metadata.jsonl"]
        and other.out.count("wrote") == 2
    )
    drawn = contents("set")
    for name in ("00001.png", "00002.png", "metadata.jsonl"):
        Path("set", name).unlink()
    all_good(called(3, *given))
    assert contents("set") == drawn
    shutil.rmtree("set")
    good(call(*given))
    assert contents("set") == drawn


def test_pictures_of_several_ranks_take_free_names_that_do_not_collide(tiny):
    given = ("sample.py", "a dog", "--weights", tiny, "--count", 3, "--out")
    good(call(*given, "alone"))
    for _ in range(2):
        all_good(called(2, *given, "several"))
    assert sorted(contents("several")) == sorted(
        f"000{k}{again}.png" for k in range(3) for again in ("", "-1")
    )
    assert all(
        same(pixels(f"several/{name}"), pixels(f"alone/{name[:4]}.png"))
        for name in contents("several")
    )


# What goes wrong


def test_a_bad_input_is_said_once_and_ends_all(tiny):
    one, other = called(2, *flags(tiny, "prior", "--size", 30, "--out", "run"))
    assert (
        "30x30" in refused(one)
        and (other.status, other.err) == (2, "")
        and not Path("run").exists()
    )
    for argv, words in (
        (("insert.py", "a dog", "--class-word", "dog"), "one process"),
        (flags(tiny, "prior", "--check"), "one process"),
    ):
        one, other = called(2, *argv)
        assert words in refused(one) and (other.status, other.err) == (2, "")


def test_what_goes_wrong_on_one_rank_is_said_by_it(tiny, monkeypatch):
    def full(rank):
        def save(*_):
            raise OSError("no space for it")

        png.save = save if rank else png.save

    monkeypatch.setattr(distributed, "RANK_0_FIRST", timedelta(seconds=0.5))
    runs = called(
        3, "sample.py", "a dog", "--weights", tiny, "--count", 2, "--out", "set", before=full
    )
    assert [run.status for run in runs] == [2, 2, 2] and sorted(contents("set")) == ["0000.png"]
    assert (
        runs[1].err == "rank 1: error: no space for it\n"
        and "error" not in runs[0].err + runs[2].err
    )


def test_a_killed_rank_ends_the_others_with_a_line(tiny):
    def killed(rank):
        whole = dataset.get_sample

        def batch(*args):
            if rank and args[5] == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args)

        dataset.get_sample = batch

    one, other = called(2, *flags(tiny, "prior", "--save-every", 1, "--out", "run"), before=killed)
    assert (one.status, other.status) == (2, -9) and "Traceback" not in one.err
    assert (
        one.err.splitlines()[-1].startswith("error: another rank has ended")
        and "--resume" in one.err.splitlines()[-1]
    )
    assert "state.safetensors" in contents("run")
