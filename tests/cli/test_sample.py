"""sample.py: the images, where they are written, and how they are made again to the bit."""

import json
import shutil
import signal

import pytest
from helpers.running import (
    PROMPT,
    STEPS,
    call,
    contents,
    good,
    nothing_written,
    picture,
    pixels,
    process,
    refused,
    same,
)
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

import sample
from alchemy import cli, pipeline
from alchemy.formats import png


@pytest.mark.parametrize(
    "size, shape", [("32", (32, 32)), ("20x36", (36, 20)), ("4x12", (12, 4)), ("44x28", (28, 44))]
)
def test_any_multiple_of_the_factor_is_a_size(pictures, size, shape):
    (image,) = pictures(PROMPT, "--size", size)
    assert image.shape == (*shape, 3) and image.std() > 5


def test_image_i_of_a_call_is_that_of_seed_plus_i_alone(pictures):
    three = pictures(PROMPT, "--count", 3, "--sampler", "ddpm")  # which adds noise at each step
    for seed, image in enumerate(three):
        assert same(pictures(PROMPT, "--seed", seed, "--sampler", "ddpm")[0], image)
    assert not same(three[0], three[1])


def test_images_take_the_next_free_name(pictures):
    for _ in range(2):
        pictures(PROMPT, "--count", 2, "--seed", 7)
    assert sorted(contents("out/samples")) == ["0007-1.png", "0007.png", "0008-1.png", "0008.png"]
    before = contents("out/samples")
    for _ in range(3):
        pictures(PROMPT, "--out", "here/beach.png")
    pictures(PROMPT, "--out", "here/beach.png", "--count", 2)
    pictures(PROMPT, "--out", "v1.5")
    names = ["beach-0.png", "beach-1-1.png", "beach-1.png", "beach-2.png", "beach.png"]
    assert sorted(contents("here")) == names
    assert contents("out/samples") == before and sorted(contents("v1.5")) == ["0000.png"]


def test_an_image_carries_its_settings_and_like_makes_it_again(pictures, tiny, lora_file, tmp_path):
    picture(30, 50).save(tmp_path / "start.png")
    files = ["--weights", tiny, "--image", "start.png"]
    flags = ["--count", 2, "--seed", 3, "--size", "36x28", "--sampler", "euler_ancestral"]
    flags += ["--timestep-spacing", "trailing", "--eta", 0.5, "--steps", 4, "--guidance", 2.5]
    flags += ["--negative-prompt", "é “ugly”", "--strength", 0.8]
    scaled = ["--lora", f"{lora_file}:0.5", "--lora", f"{lora_file}:0.25"]
    first = pictures(PROMPT, *flags, *scaled, "--image", "start.png")

    metadata = png.read_metadata("out/samples/0004.png")
    expected = {"prompt": PROMPT, "seed": 4, "size": [28, 36], "negative_prompt": "é “ugly”"}
    expected |= {"lora": [[str(lora_file), 0.5], [str(lora_file), 0.25]], "weights": str(tiny)}
    assert expected.items() <= metadata.items() and metadata["count"] == 1

    # The files have to be given; the scales may come from the image.
    like = ["sample.py", "--like", "out/samples/0004.png", *files]
    run = good(call(*like, "--lora", lora_file, "--lora", lora_file, "--out", "again.png"))
    assert same(pixels("again.png"), first[1]) and [p.name for p in run.wrote] == ["again.png"]
    again = png.read_metadata("again.png")
    assert {k for k in again if again[k] != metadata[k]} == set()
    run = good(call(*like, *scaled, "--seed", 3))
    assert same(pixels(run.wrote[0]), first[0])


def test_flags_override_those_of_like(pictures, tiny, lora_file):
    (image,) = pictures(PROMPT, "--lora", lora_file)
    like = ["sample.py", "--like", "out/samples/0000.png", "--weights", tiny, "--lora"]
    for flags in ([lora_file, "--seed", 1], [f"{lora_file}:0"], [lora_file, "a photo of a car"]):
        assert not same(pixels(good(call(*like, *flags)).wrote[0]), image), flags
    metadata = png.read_metadata(good(call(*like, f"{lora_file}:0.5")).wrote[0])
    assert metadata["lora"] == [[str(lora_file), 0.5]]


def test_a_file_that_has_changed_since_the_image_was_made_is_named(drawn, lora_file):
    shutil.copy(lora_file, "a.safetensors")
    picture(32, 32).save("start.png")
    files = ("--lora", "a.safetensors", "--image", "start.png")
    good(drawn(*files, "--out", "whole.png"))
    metadata = png.read_metadata("whole.png")
    for digests in (None, [], ["0" * 16], "text"):  # of earlier versions, or of anyone
        png.save(picture(32, 32), f"{digests}.png", metadata | {"digests": digests})
    tensors = load_file(lora_file)
    save_file({key: tensor * 0.5 for key, tensor in tensors.items()}, "a.safetensors")
    warned = []
    for image in ("whole.png", "None.png", "[].png", "['0000000000000000'].png", "text.png"):
        run = good(drawn("--like", image, *files))
        warned += [line for line in run.err.splitlines() if "changed" in line]
    assert warned == ["warning: a.safetensors has changed since whole.png was made"]


def like_image(**metadata):
    """An image that claims to be by sample.py, with this metadata."""
    info = PngImagePlugin.PngInfo()
    base = {"script": "sample.py", "prompt": "a", "seed": 1, "weights": cli.MINI}
    info.add_itxt("alchemy", json.dumps(base | metadata))
    Image.new("RGB", (8, 8)).save("hostile.png", pnginfo=info)
    return "hostile.png"


@pytest.mark.parametrize(
    "metadata, word",
    [
        ({"weights": "someone/checkpoint"}, "--weights someone/checkpoint"),
        ({"lora": [["/etc/passwd", 1.0]]}, "--lora /etc/passwd"),
        ({"embedding": ["/etc/passwd"]}, "--embedding /etc/passwd"),
        ({"image": "/etc/passwd"}, "--image /etc/passwd"),
        ({"vae": "/etc/passwd"}, "--vae /etc/passwd"),
        ({"model_config": "/etc"}, "--model-config /etc"),
        ({"seed": -1}, "seed"),
        ({"eta": 7.5}, "eta"),
        ({"guidance": "high"}, "guidance"),
        ({"steps": 10**9}, "steps"),
        ({"sampler": "x" * 5000}, "sampler"),
        ({"sampler": "\x1b[2J"}, "'\\x1b[2J'"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"size": [2**40, 8]}, "size"),
        ({"script": "other"}, "sample.py did not write this image"),
    ],
)
def test_a_hostile_image_is_refused_by_like(metadata, word):
    refused(call("sample.py", "--like", like_image(**metadata)), "hostile.png", word)
    assert nothing_written()


def test_like_takes_nothing_but_the_settings_of_the_image(tmp_path):
    others = {"inspect": "page", "inspect_full": True, "count": 3, "out": "elsewhere", "merge": 1}
    others |= {"device": "cuda", "dtype": "float16", "fp8_base": True, "compile": True}
    args = sample.parse(["--like", like_image(strength=9, **others)])
    assert (args.prompt, args.seed) == ("a", 1)
    plain = sample.parse(["a", "--seed", "1"])
    assert vars(args) == vars(plain) | {"like": "hostile.png"}


def test_defaults_are_the_same_as_given_and_are_written(pictures):
    (image,) = pictures(PROMPT)
    metadata = png.read_metadata("out/samples/0000.png")
    assert [metadata[k] for k in ("sampler", "steps", "guidance")] == ["euler", STEPS, 5.0]
    flags = ["--sampler", "euler", "--steps", STEPS, "--guidance", 5, "--size", 32]
    assert same(pictures(PROMPT, *flags)[0], image)


def test_a_lora_changes_the_image_and_at_scale_0_no_bit_of_it(pictures, lora_file):
    images = []
    for scales in ([], [""], [":0"], [":0.5"], [":0.5", ":0"]):
        flags = [f"--lora={lora_file}{scale}" for scale in scales]
        images += pictures(PROMPT, *flags)
    none, one, zero, half, both = images
    assert same(none, zero) and not same(none, one) and not same(one, half) and same(both, half)


def test_the_folder_of_a_run_is_a_lora(pictures, lora_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lora.safetensors").write_bytes(lora_file.read_bytes())
    ours, theirs = (pictures("a", "--lora", f"{file}:0.5") for file in ("run", lora_file))
    assert same(ours[0], theirs[0])
    (tmp_path / "empty").mkdir()
    refused(call("sample.py", "a", "--lora", "empty"), "--lora empty", "no LoRA in this folder")


@pytest.mark.parametrize("written", ["run/checkpoint/model_index.json", "run.safetensors"])
def test_weights_that_are_the_folder_of_a_run_are_answered_with_its_checkpoint(tmp_path, written):
    (tmp_path / "run/checkpoint").mkdir(parents=True)
    (tmp_path / written).touch()
    meant = written.removesuffix("/model_index.json")
    refused(call("sample.py", "a", "--weights", "run"), f"did you mean {meant}?")


def test_an_empty_negative_prompt_is_a_prompt_and_without_guidance_none_matters(pictures):
    negative = ([], ["--negative-prompt", ""], ["--negative-prompt", "ugly"])
    none, empty, ugly = (pictures(PROMPT, *flags)[0] for flags in negative)
    assert not same(none, empty) and not same(none, ugly) and not same(empty, ugly)
    none, empty = (pictures(PROMPT, "--guidance", 1, *flags)[0] for flags in negative[:2])
    assert same(none, empty)


def test_img2img_changes_more_at_higher_strength_and_at_1_ignores_the_image(pictures, tmp_path):
    picture(48, 64).save(tmp_path / "start.png")
    flags = [PROMPT, "--steps", 10]
    start = ["--image", "start.png", "--strength"]
    low, middle, full = (pictures(*flags, *start, strength)[0] for strength in (0.1, 0.5, 1))
    assert not same(low, middle) and not same(middle, full) and same(full, pictures(*flags)[0])


def test_the_first_line_tells_what_runs_and_the_last_what_was_written(tiny):
    flags = ["--weights", tiny, "--steps", 4, "--size", "20x36"]
    run = good(call("sample.py", PROMPT, *flags))
    what = "1 image of 20x36, euler, 4 of 4 steps, first t 751 (sigma 4.12)"
    assert run.err.splitlines()[0] == f"cpu, float32, {tiny}: {what}"
    assert (
        "seed 0: 4/4" in run.err
        and run.out == "wrote out/samples/0000.png\nopen out/samples/0000.png\n"
    )


def test_words_that_are_cut_from_a_prompt_are_named(tiny):
    run = good(call("sample.py", "very " * 80 + "green dog", "--weights", tiny))
    assert "warning: prompt too long" in run.err and "green dog" in run.err


def test_an_interrupt_ends_with_status_130_and_no_half_image(tiny, monkeypatch):
    whole = cli.progress

    def interrupting(steps, *args):
        for i, step in enumerate(whole(steps, *args)):
            yield step
            if i == 1:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli, "progress", interrupting)
    run = call("sample.py", PROMPT, "--weights", tiny)
    assert run.status == 130 and run.err.splitlines()[-1] == "interrupted" and contents("out") == {}


def test_a_process_generates_the_same_image(pictures, tiny):
    (image,) = pictures(PROMPT, "--steps", 2)
    run = good(process("sample.py", PROMPT, "--steps", 2, "--weights", tiny, "--out", "other"))
    assert same(pixels(run.wrote[0]), image)


def test_what_the_vae_cannot_decode_is_an_error_and_no_image(tiny, monkeypatch):
    def infinite(*args, **options):
        raise FloatingPointError("the decoded image became NaN")

    monkeypatch.setattr(pipeline, "sample", infinite)
    refused(call("sample.py", "a", "--weights", tiny), "NaN")
    assert nothing_written()


def test_how_long_a_run_takes_is_logged_once_from_the_steps_after_the_first(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    estimate = cli.Estimate(10, "10 steps", extra=5)

    def steps(*ends):
        for now[0] in ends:
            yield now[0]

    assert [*estimate.follow(steps(60)), *estimate.follow(steps(60.5, 62, 70))] == [
        60,
        60.5,
        62,
        70,
    ]
    # 62 s so far, 7 steps of 1 s, and 5 s; the first, of 60 s, is not typical.
    assert capsys.readouterr().err == "about 74 s in all, for 10 steps\n"
