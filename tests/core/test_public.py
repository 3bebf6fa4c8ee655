"""The public surface: every name resolves, is documented and hinted, and is known to editors."""

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import write_folder
from PIL import Image

import alchemy


def test_editors_see_the_names_that_are_loaded_lazily():
    tree = ast.parse(Path(alchemy.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    hints = {}
    for node in block.body:
        hints |= {alias.name: node.module for alias in node.names}
    assert hints == alchemy.EXPORTS and sorted(dir(alchemy)) == sorted(alchemy.EXPORTS)
    assert (Path(alchemy.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("name", alchemy.EXPORTS)
def test_a_public_name_has_a_docstring_and_type_hints(name):
    value = getattr(alchemy, name)
    assert value.__doc__
    if alchemy.EXPORTS[name].startswith(("formats.", "extras.")) or name == "SDXL":
        return
    for parameter in inspect.signature(value).parameters.values():
        untyped = parameter.annotation is inspect.Parameter.empty
        assert not untyped or parameter.name == "sdxl", f"{name}: {parameter}"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        alchemy.lode  # noqa: B018


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return alchemy.load(write_folder(tmp_path_factory.mktemp("tiny")), "cpu", torch.float32)


IMAGE = Image.new("RGB", (32, 32), "grey")
GENERATE = (
    [("seed", value) for value in (1.5, "1", True, -1, 2**64)]
    + [("size", value) for value in ("128", 0, (1, 2, 3), (32, 32.5))]
    + [("guidance", value) for value in ("5", float("nan"), float("inf"), -1, [5])]
    + [("steps", value) for value in ("30", 0, 1.5, True)]
    + [("negative_prompt", ["a"]), ("sampler", ["euler"]), ("spacing", 5), ("eta", 2)]
)
CALLS = {
    "image_to_image": ("a dog", IMAGE),
    "insert": ("a dog", "dog", "sks"),
    "segment": (IMAGE, "dog"),
    "train_lora": (["a.jpg"], "dog"),
    "load_lora": ("a.safetensors",),
    "add_lora": (),
    "set_lora_scale": (1,),
    "noise": ((1, 4, 8, 8), [0]),
}
OPTIONS = [
    ("image_to_image", "strength", "x"),
    ("image_to_image", "strength", 0),
    ("image_to_image", "mask", 5),
    ("image_to_image", "mask", np.full((32, 32), 255)),
    ("image_to_image", "mask", torch.full((32, 32), float("nan"))),
    ("insert", "threshold", "a"),
    ("insert", "dilate", 2),
    ("insert", "token", ""),
    ("segment", "word", ["dog"]),
    ("segment", "noise_level", 5),
    ("segment", "conditioning", "a dog"),
    ("train_lora", "photos", 5),
    ("train_lora", "photos", [IMAGE]),
    ("train_lora", "learning_rate", "1e-4"),
    ("train_lora", "rank", 0),
    ("load_lora", "scale", "1"),
    ("load_lora", "path", None),
    ("add_lora", "rank", "8"),
    ("add_lora", "alpha", 0),
    ("add_lora", "seed", None),
    ("set_lora_scale", "scale", "a"),
    ("noise", "seeds", 0),
    ("noise", "shape", (1, 4, 8.5, 8)),
]


@pytest.mark.parametrize(
    "name, option, value", [("text_to_image", *row) for row in GENERATE] + OPTIONS
)
def test_a_wrong_argument_is_named_in_one_line(sdxl, name, option, value):
    function = getattr(alchemy, name)
    model = () if name == "noise" else (sdxl,)
    bound = inspect.signature(function).bind(*model, *CALLS.get(name, ("a dog",)))
    with pytest.raises(ValueError, match=f"^(the )?{option} (is|has) .*") as raised:
        function(**bound.arguments | {option: value})
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200


def test_numbers_of_numpy_are_numbers(sdxl):
    options = dict(seed=np.int64(3), steps=np.int32(1), guidance=np.float32(3), size=np.int64(32))
    assert alchemy.text_to_image(sdxl, "a dog", **options).size == (32, 32)
    assert alchemy.noise((1, 4, 8, 8), [np.int64(3)]).shape == (1, 4, 8, 8)


def test_a_path_in_place_of_a_checkpoint_and_a_foreign_argument_are_explained(sdxl):
    with pytest.raises(ValueError, match=r"sdxl is 'weights/mini'; it must be .*alchemy.load"):
        alchemy.text_to_image("weights/mini", "a dog")
    with pytest.raises(TypeError, match="'guidance_scale'; here it is guidance$"):
        alchemy.text_to_image(sdxl, "a dog", guidance_scale=5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'$"):
        alchemy.text_to_image(sdxl, "a dog", foo=5)


@pytest.mark.parametrize("name", ["lora", "pytorch_lora_weights", "adapter_model"])
def test_a_lora_is_loaded_from_the_folder_of_a_run(sdxl, tmp_path, name):
    with pytest.raises(ValueError, match="no LoRA in this folder .*lora.safetensors"):
        alchemy.load_lora(sdxl, tmp_path)
    alchemy.add_lora(sdxl, 2)
    alchemy.save_lora(sdxl, tmp_path / f"{name}.safetensors")
    assert alchemy.load_lora(sdxl, tmp_path, name="loaded") == "loaded"
    assert "LoRAs: default, loaded" in repr(sdxl)
