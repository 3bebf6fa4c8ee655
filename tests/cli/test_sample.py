"""sample.py: what it draws, where it writes it, and that it can be made again to the bit."""

import signal

import pytest
from PIL import Image

from alchemy import cli
from alchemy.formats import png
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import (
    PROMPT,
    STEPS,
    call,
    contents,
    good,
    lora_file,
    picture,
    pictures,
    pixels,
    process,
    quick,
    same,
    tiny,
)  # noqa: F401


@pytest.mark.parametrize(
    "size, shape", [("32", (32, 32)), ("20x36", (36, 20)), ("4x12", (12, 4)), ("44x28", (28, 44))]
)
def test_any_multiple_of_the_factor_is_drawn(pictures, size, shape):
    (image,) = pictures(PROMPT, "--size", size)
    assert image.shape == (*shape, 3) and image.std() > 5


def test_picture_i_of_a_call_is_that_of_seed_plus_i_alone(pictures, tmp_path):
    three = pictures(PROMPT, "--count", 3, "--sampler", "ddpm")  # which draws noise at each step
    for i, image in enumerate(three):
        assert same(pictures(PROMPT, "--seed", i, "--sampler", "ddpm")[0], image)
    assert not same(three[0], three[1])


def test_pictures_take_the_next_free_number(pictures, tmp_path):
    for _ in range(2):
        pictures(PROMPT, "--count", 2, "--seed", 7)
    assert sorted(contents("out/samples")) == ["0007-1.png", "0007.png", "0008-1.png", "0008.png"]
    before = contents("out/samples")
    for _ in range(3):
        pictures(PROMPT, "--out", "here/beach.png")
    pictures(PROMPT, "--out", "here/beach.png", "--count", 2)
    pictures(PROMPT, "--out", "v1.5")
    assert sorted(contents("here")) == [
        "beach-0.png",
        "beach-1-1.png",
        "beach-1.png",
        "beach-2.png",
        "beach.png",
    ]
    assert contents("out/samples") == before and sorted(contents("v1.5")) == ["0000.png"]


def test_a_picture_tells_how_it_was_made_and_like_makes_it_again(
    pictures, tiny, lora_file, tmp_path
):
    picture(30, 50).save(tmp_path / "start.png")
    flags = [
        PROMPT,
        "--count",
        2,
        "--seed",
        3,
        "--size",
        "36x28",
        "--sampler",
        "euler_ancestral",
        "--timestep-spacing",
        "trailing",
        "--eta",
        0.5,
        "--steps",
        4,
        "--guidance",
        2.5,
        "--negative-prompt",
        "é “ugly”",
        "--lora",
        f"{lora_file}:0.5",
        "--lora",
        f"{lora_file}:0.25",
        "--image",
        "start.png",
        "--strength",
        0.8,
    ]
    first = pictures(*flags)
    facts = png.facts_of("out/samples/0004.png")
    assert (
        facts["prompt"] == PROMPT
        and facts["seed"] == 4
        and facts["size"] == [28, 36]
        and facts["lora"] == [[str(lora_file), 0.5], [str(lora_file), 0.25]]
    )
    assert (
        facts["weights"] == str(tiny)
        and facts["negative_prompt"] == "é “ugly”"
        and facts["count"] == 1
    )
    run = good(call("sample.py", "--like", "out/samples/0004.png", "--out", "again.png"))
    assert [p.name for p in run.wrote] == ["again.png"] and same(pixels("again.png"), first[1])
    assert png.facts_of("again.png") == facts and {"out", "like", "prompts"}.isdisjoint(
        facts
    )  # where it lies is no part of it
    png.save(
        Image.open("again.png"), "again.png", facts | {"out": "elsewhere", "like": "b.png"}
    )  # as files of before have it
    good(call("sample.py", "--like", "again.png", "--out", "once-more.png"))
    assert same(pixels("once-more.png"), first[1])


def test_flags_go_over_those_of_like(pictures, lora_file):
    (image,) = pictures(PROMPT, "--lora", lora_file)
    for flags in (["a photo of a car"], ["--seed", 1], ["--lora", f"{lora_file}:0"]):
        run = good(
            call("sample.py", "--like", "out/samples/0000.png", *flags, "--out", "other.png")
        )
        assert not same(pixels(run.wrote[0]), image), flags
    assert png.facts_of(
        good(
            call("sample.py", "--like", "out/samples/0000.png", "--lora", f"{lora_file}:0.5")
        ).wrote[0]
    )["lora"] == [[str(lora_file), 0.5]]


def test_defaults_are_written_out_and_the_same_as_given(pictures):
    (image,) = pictures(PROMPT)
    facts = png.facts_of("out/samples/0000.png")
    assert (facts["sampler"], facts["steps"], facts["guidance"]) == ("euler", STEPS, 5.0)
    assert same(
        pictures(PROMPT, "--sampler", "euler", "--steps", STEPS, "--guidance", 5, "--size", 32)[0],
        image,
    )


def test_a_lora_changes_the_picture_and_at_scale_0_it_is_as_if_there_were_none(pictures, lora_file):
    (none,), (one,), (zero,), (half,) = (
        pictures(PROMPT, *flags)
        for flags in (
            [],
            ["--lora", lora_file],
            ["--lora", f"{lora_file}:0"],
            ["--lora", f"{lora_file}:0.5"],
        )
    )
    assert same(none, zero) and not same(none, one) and not same(one, half)
    assert same(pictures(PROMPT, "--lora", f"{lora_file}:0.5", "--lora", f"{lora_file}:0")[0], half)


def test_the_negative_prompt_counts_and_an_empty_one_is_a_prompt(pictures):
    made = [
        pictures(PROMPT, *flags)[0]
        for flags in ([], ["--negative-prompt", ""], ["--negative-prompt", "ugly"])
    ]
    assert not any(same(made[a], made[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert same(
        *(pictures(PROMPT, "--guidance", 1, *flags)[0] for flags in ([], ["--negative-prompt", ""]))
    )  # without guidance there is no part for it


def test_img2img_starts_from_the_picture_and_strength_says_how_much_of_it_goes(pictures, tmp_path):
    start = picture(48, 64)
    start.save(tmp_path / "start.png")

    def away(strength):
        (image,) = pictures(PROMPT, "--image", "start.png", "--strength", strength, "--steps", 10)
        return image

    a, b, c = away(0.1), away(0.5), away(1)
    assert not same(a, b) and not same(b, c) and same(c, pictures(PROMPT, "--steps", 10)[0])
    run = good(call("sample.py", "--like", "out/samples/0000.png"))
    assert "1 of 10 steps" in run.err and same(pixels(run.wrote[0]), a)


def test_what_really_runs_is_said_and_where_it_went(tiny):
    run = good(call("sample.py", PROMPT, "--weights", tiny, "--steps", 4, "--size", "20x36"))
    assert (
        "euler: 4 of 4 steps, first t 751 (sigma 4.12), 20x36" in run.err
        and "seed 0: 4/4" in run.err
        and run.out == "wrote out/samples/0000.png\n"
    )


def test_words_that_are_lost_are_named(tiny):
    run = good(call("sample.py", "very " * 80 + "green dog", "--weights", tiny))
    assert "warning: prompt too long" in run.err and "green dog" in run.err


def test_an_interrupt_ends_it_with_130_and_no_half_picture(tiny, monkeypatch):
    whole = cli.progress

    def interrupting(steps, *args):
        for i, step in enumerate(whole(steps, *args)):
            yield step
            if i == 1:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli, "progress", interrupting)
    run = call("sample.py", PROMPT, "--weights", tiny)
    assert run.status == 130 and run.err.splitlines()[-1] == "interrupted" and contents("out") == {}


def test_as_a_process_it_is_the_same(pictures, tiny):
    (image,) = pictures(PROMPT, "--steps", 2)
    run = good(process("sample.py", PROMPT, "--steps", 2, "--weights", tiny, "--out", "other"))
    assert same(pixels(run.wrote[0]), image)
