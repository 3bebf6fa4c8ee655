"""DINO and the vision half of CLIP against transformers, by tensors in tests/reference."""

import pytest
import torch
from helpers.vision import save_clip, save_dino
from PIL import Image

from alchemy.extras import encoders
from alchemy.extras.vision import VisionConfig, VisionTransformer, dino_name

NAMES = ("dino", "clip_vision")


def network(stored, name, dtype=torch.float64):
    model = VisionTransformer(VisionConfig.from_config(stored.header["config"]))
    weights = {}
    for key, parameter in model.state_dict().items():
        tensor = stored["weights/" + (dino_name(key) if name == "dino" else key)]
        weights[key] = tensor.reshape(parameter.shape)
    model.load_state_dict(weights)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", ["square", "wide"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 3e-6)])
def test_features_are_those_of_transformers(name, shape, dtype, tolerance, reference, close):
    stored = reference(name)
    features = network(stored, name, dtype)(stored[f"inputs/{shape}"].to(dtype))
    close(features, stored[f"outputs/{shape}"], tolerance)


@pytest.mark.parametrize("encoder", ["clip", "dino"])
@pytest.mark.parametrize("picture", ["tall", "wide", "square"])
def test_preprocessing_is_bit_equal_to_transformers(encoder, picture, reference):
    stored = reference("clip_vision")
    mean, std = encoders.STATISTICS[encoder]
    image = Image.fromarray(stored[f"pictures/{picture}"].numpy())
    resize = {"clip": 24, "dino": 27}[encoder]
    pixels = encoders.preprocess(image, resize, 24, mean, std)
    assert torch.equal(pixels, stored[f"pixels/{encoder}/{picture}"])


def test_dino_is_loaded_from_a_folder_and_gives_unit_features(tmp_path, reference, close):
    stored = reference("dino")
    encode = encoders.load_dino(str(save_dino(tmp_path / "dino", stored)))
    pictures = [Image.new("RGB", (40, 30), "red"), Image.new("RGB", (30, 30), "blue")]
    features = encode(pictures)
    assert encode.resize == 27 and features.shape == (2, 12)
    pixels = encoders.preprocess(pictures[0], 27, 24, *encoders.STATISTICS["dino"])
    expected = network(stored, "dino")(pixels[None].double())[0]
    close(features[0], expected / expected.norm(), 3e-6)


def test_both_halves_of_clip_are_loaded_from_one_folder(tmp_path, reference, close):
    stored = reference("clip_vision")
    clip = encoders.load_clip(str(save_clip(tmp_path, stored)))
    image = Image.new("RGB", (40, 30), "red")
    pixels = encoders.preprocess(image, 24, 24, *encoders.STATISTICS["clip"])
    expected = network(stored, "clip_vision")(pixels[None].double())
    close(clip.images([image]), expected / expected.norm(), 3e-6)
    features = clip.texts(["a dog", "a cat", "a dog"])
    assert features.shape == (3, 10) and torch.equal(features[0], features[2])
    close(features.norm(dim=1).double(), torch.ones(3, dtype=torch.float64), 1e-6)


BAD = {
    "another model": ({"model_type": "bert"}, None, "model_type is 'bert', expected 'vit'"),
    "a pickle alone": ({}, "pytorch_model.bin", "never read"),
    "another size": ({"hidden_size": 24}, None, "size mismatch for vision_model"),
    "no number": ({"patch_size": "8"}, None, "patch_size is '8'; it must be an integer"),
    "another activation": (
        {"hidden_act": "relu"},
        None,
        "hidden_act is 'relu'; it is supported as",
    ),
    "more layers": ({"num_hidden_layers": 3}, None, "Missing key(s) in state_dict: "),
    "fewer layers": ({"num_hidden_layers": 1}, None, "Unexpected key(s) in state_dict: "),
}


@pytest.mark.parametrize("changes, rename, message", BAD.values(), ids=BAD)
def test_a_folder_that_is_not_dino_is_refused(changes, rename, message, tmp_path, reference):
    folder = save_dino(tmp_path, reference("dino"), **changes)
    if rename:
        (folder / "model.safetensors").rename(folder / rename)
    with pytest.raises(ValueError) as caught:
        encoders.load_dino(str(folder))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_weight_file_in_the_place_of_a_folder_is_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"PK")
    with pytest.raises(ValueError, match="give its folder, with config.json and model.safetensors"):
        encoders.load_clip(str(file))


def test_a_hub_id_can_name_its_revision(monkeypatch):
    def find(*args, **options):
        raise LookupError(args, options)

    monkeypatch.setattr(encoders, "find", find)
    with pytest.raises(LookupError) as caught:
        encoders.locate("facebook/dino-vits16@refs/pr/1", ("vit",))
    assert caught.value.args == (("facebook/dino-vits16", [""]), {"revision": "refs/pr/1"})
