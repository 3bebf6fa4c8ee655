"""What likeness is measured with: DINO and CLIP, each with its preprocessing, as published."""

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .. import images
from ..clip import TextConfig, TextEncoder
from ..formats.checkpoint import VOCABULARY, skip_init
from ..formats.configs import check_config, read_config
from ..formats.hub import find, weight_files
from ..formats.layout import EXTRAS
from ..formats.tensors import names_in
from ..tokenizer import Tokenizer
from .vision import VisionConfig, VisionTransformer, dino_name

# The main branches hold pickles alone; these revisions add safetensors (the Hub's conversion bot).
DINO = "facebook/dino-vits16@refs/pr/1"
CLIP = "openai/clip-vit-base-patch32@refs/pr/15"
STATISTICS = {  # mean and standard deviation of R, G and B: ImageNet's, and those of CLIP's data
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def preprocess(image: Image.Image, resize: int, crop: int, mean: tuple, std: tuple) -> Tensor:
    """An RGB image to normalised pixels (3, crop, crop) float32.

    Bit-equal to transformers' PIL processors: the shorter side becomes `resize` (bicubic; the
    longer side is rounded down), then the centre is cut out. Rescaling is float64, then rounded to
    float32; normalisation is float32.
    """
    width, height = image.size
    if width <= height:
        size = (resize, int(resize * height / width))
    else:
        size = (int(resize * width / height), resize)
    image = image.resize(size, Image.BICUBIC)
    left, top = (size[0] - crop) // 2, (size[1] - crop) // 2
    pixels = np.asarray(image.crop((left, top, left + crop, top + crop)))
    pixels = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    pixels = (pixels - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)


@dataclass(frozen=True)
class Encoder:
    """RGB PIL images to features (N, D) of length 1, float32 on the CPU."""

    network: VisionTransformer
    resize: int  # pixels of the shorter side, before the centre of config.image_size is cut out
    mean: tuple
    std: tuple

    @torch.no_grad()
    def __call__(self, pictures: Iterable[Image.Image]) -> Tensor:
        crop = self.network.config.image_size
        device = next(self.network.parameters()).device
        features = []
        # On CUDA, a convolution would round its input to 10 bits (TF32) by default.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for image in pictures:
                pixels = preprocess(image, self.resize, crop, self.mean, self.std)
                features.append(self.network(pixels[None].to(device)).cpu())
        return F.normalize(torch.cat(features), dim=-1)


@dataclass(frozen=True)
class Clip:
    """Both halves of CLIP: images(...) and texts(...) give features (N, P) of length 1."""

    images: Encoder
    text_encoder: TextEncoder
    tokenizer: Tokenizer

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        device = next(self.text_encoder.parameters()).device
        ids = torch.tensor([self.tokenizer(prompt) for prompt in prompts])
        _, pooled = self.text_encoder(ids.to(device))
        return F.normalize(pooled.cpu(), dim=-1)


def load_toy() -> Callable[[Iterable[Image.Image]], Tensor]:
    """An encoder for images of the miniature's world: the features of its classifier, length 1."""
    from weights.toy import classifier

    network = classifier.load()

    @torch.no_grad()
    def encode(pictures: Iterable[Image.Image]) -> Tensor:
        resized = [image.resize((128, 128), Image.LANCZOS) for image in pictures]
        pixels = torch.cat([images.to_tensor(image) for image in resized])
        return F.normalize(network.features(pixels), dim=-1)

    return encode


def load_weights(
    network: nn.Module,
    files: list[Path],
    device: torch.device,
    name_of: Callable[[str], str] = str,
    ignored: tuple = (),
) -> None:
    """Give each parameter of a network on the meta device its tensor, as float32.

    name_of: a parameter's name to its tensor's; ignored: how the names of tensors begin that are
    not used. Strict: one missing, left over or of another shape is a ValueError.
    """
    keys = {name_of(key): key for key in network.state_dict()}
    weights = {}
    for name, file in names_in(files).items():
        if name.startswith(ignored) or EXTRAS.search(name):
            continue
        tensor = file.get_tensor(name).to(device, torch.float32)
        # DINO's CLS token and positions are batches of one.
        weights[keys.get(name, name)] = tensor.squeeze() if tensor.shape[:1] == (1,) else tensor
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{files[0]} does not fit its config.json: {reason}") from None
    network.eval().requires_grad_(False)


def load_dino(source: str = DINO, device: str = "cpu") -> Encoder:
    """DINO from a folder or a Hub id (ID or ID@REVISION). Raises ValueError for anything else."""
    config, files = locate(source, ("vit",))
    with torch.device("meta"), skip_init():
        network = VisionTransformer(VisionConfig.from_config(config))
    load_weights(network, files, device, dino_name, ignored=("pooler.",))
    # As in DINO's own evaluation (eval_knn.py): resized to 256, of which 224 are cut out.
    resize = round(network.config.image_size * 256 / 224)
    return Encoder(network, resize, *STATISTICS["dino"])


def load_clip(source: str = CLIP, device: str = "cpu") -> Clip:
    """CLIP from a folder or a Hub id (ID or ID@REVISION). Raises ValueError for anything else."""
    config, files = locate(source, ("clip",))
    text_config = config.get("text_config", {}) | {
        "projection_dim": config.get("projection_dim", 512)
    }
    with torch.device("meta"), skip_init():
        network = VisionTransformer(VisionConfig.from_config(config))
        text_encoder = TextEncoder(TextConfig.from_config(text_config), projection=True)
    load_weights(network, files, device, ignored=("text_",))
    load_weights(text_encoder, files, device, ignored=("vision_", "visual_"))
    encoder = Encoder(network, network.config.image_size, *STATISTICS["clip"])
    return Clip(encoder, text_encoder, Tokenizer.from_folder(VOCABULARY / "tokenizer"))


def locate(source: str, kinds: tuple) -> tuple[dict, list[Path]]:
    """The config.json of a folder or Hub id and the safetensors files beside it."""
    name, revision = source, None
    if "@" in source and not Path(source).exists():
        name, _, revision = source.partition("@")
    folder = find(name, [""], revision=revision)
    if folder.is_file():
        raise ValueError(
            f"{source}: a file; give its folder, with config.json and model.safetensors"
        )
    config = read_config(folder / "config.json")
    if config.get("model_type") not in kinds:
        found = config.get("model_type")
        raise ValueError(f"{folder}/config.json: model_type is {found!r}, expected {kinds[0]!r}")
    for part in (config, config.get("vision_config", {}), config.get("text_config", {})):
        check_config(folder / "config.json", part)
    try:
        return config, weight_files(folder, "", half=False)
    except ValueError as error:
        raise ValueError(f"{error}; a Hub id can name a revision that has them: {DINO}") from None
