"""DINO ViT-S/16 and CLIP ViT-B/32 at their real sizes against transformers, from saved folders."""

from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import (  # noqa: E402
    CLIPImageProcessorPil,
)

from alchemy.extras import encoders  # noqa: E402

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "dreambooth"
PROMPTS = ["a photo of a dog", "", "a cube shaped teapot on top of a purple rug in a forest"]
DINO = transformers.ViTConfig(
    hidden_size=384, num_attention_heads=6, intermediate_size=1536, layer_norm_eps=1e-12
)


def randomized(model):
    """Weights of a size with which every token and every layer has a say."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise * parameter[0].numel() ** -0.5
        else:
            parameter.data = 0.3 * noise + float("norm" in name and name.endswith("weight"))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """(transformers' model, our encoder read from the folder it was saved to)."""
    model, folder = randomized(transformers.ViTModel(DINO)), tmp_path_factory.mktemp("dino")
    model.save_pretrained(folder)
    return model.double(), encoders.load_dino(str(folder))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    config = transformers.CLIPConfig(projection_dim=512)  # the defaults are those of ViT-B/32
    model, folder = randomized(transformers.CLIPModel(config)), tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return model.double(), encoders.load_clip(str(folder))


@pytest.mark.parametrize("size", [(224, 224), (288, 192)])
def test_dino_features_at_the_real_size(dino, size, close):
    theirs, ours = dino
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    expected = theirs(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    close(ours.network.double()(pixels), expected, 1e-9)
    ours.network.float()


@pytest.mark.parametrize("size", [(224, 224), (288, 192)])
def test_clip_image_embeddings_at_the_real_size(clip, size, close):
    theirs, ours = clip
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    vision = theirs.vision_model(pixels, interpolate_pos_encoding=True).pooler_output
    close(ours.images.network.double()(pixels), theirs.visual_projection(vision), 1e-9)
    ours.images.network.float()


def test_clip_text_embeddings_at_the_real_size(clip, close):
    theirs, ours = clip
    ids = torch.tensor([ours.tokenizer(prompt) for prompt in PROMPTS])
    expected = theirs.text_projection(theirs.text_model(ids).pooler_output)
    close(ours.text_encoder.double()(ids)[1], expected, 1e-9)
    ours.text_encoder.float()


def test_clip_similarities_of_photos_and_prompts(clip, close):
    theirs, ours = clip
    image = Image.effect_mandelbrot((300, 200), (-2, -1, 1, 1), 50).convert("RGB")
    pixels = CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values.double()
    ids = torch.tensor([ours.tokenizer(prompt) for prompt in PROMPTS])
    out = theirs(input_ids=ids, pixel_values=pixels)
    cosines = out.logits_per_image / theirs.logit_scale.exp()
    close(ours.images([image]) @ ours.texts(PROMPTS).T, cosines, 1e-5)


@pytest.mark.parametrize("encoder, resize", [("clip", 224), ("dino", 256)])
@pytest.mark.parametrize("subject", ["dog", "backpack_dog", "teapot"])
def test_pixels_of_real_photos_are_bit_equal(encoder, resize, subject):
    if not PHOTOS.is_dir():
        pytest.skip(f"{PHOTOS} is not here")
    mean, std = encoders.STATISTICS[encoder]
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": resize}, image_mean=list(mean), image_std=list(std)
    )
    for path in sorted((PHOTOS / subject).glob("*.jpg")):
        image = Image.open(path).convert("RGB")
        expected = processor(image, return_tensors="pt").pixel_values[0]
        assert torch.equal(encoders.preprocess(image, resize, 224, mean, std), expected), path
