"""DINO and CLIP's vision half with random weights, and the pixels of transformers' processors."""

from networks import both, folder, randomize
from storage import draw, write
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIZES = dict(
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=24,
    patch_size=8,
)
PICTURES = {"tall": (61, 38), "wide": (37, 90), "square": (24, 24)}  # height, width
DINO = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def transformer(name, model, feature):
    """Tensors of a model, and its features of a square and of a wide input."""
    config, tensors = folder(randomize(model, name))
    inputs = {
        "square": draw("vision/square", 2, 3, 24, 24),
        "wide": draw("vision/wide", 1, 3, 16, 40),
    }

    def outputs(model, dtype):
        features = {}
        for key, pixels in inputs.items():
            features[key] = feature(model(pixels.to(dtype), interpolate_pos_encoding=True))
        return features

    tensors |= both(model, outputs) | {f"inputs/{key}": value for key, value in inputs.items()}
    return config, tensors


def make_dino(path):
    model = ViTModel(ViTConfig(**SIZES, layer_norm_eps=0.1), add_pooling_layer=False)
    config, tensors = transformer("dino", model, lambda out: out.last_hidden_state[:, 0])
    write(path, tensors, {"config": config})


def make_clip_vision(path):
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**SIZES, projection_dim=10, layer_norm_eps=0.1)
    )
    config, tensors = transformer("clip_vision", model, lambda out: out.image_embeds)
    for key, (height, width) in PICTURES.items():
        picture = (draw(f"vision/{key}", height, width, 3).abs() * 99).clamp(0, 255).byte()
        tensors[f"pictures/{key}"] = picture
        for name, kwargs in (("clip", {}), ("dino", DINO)):
            resize = {"clip": 24, "dino": 27}[name]
            processor = CLIPImageProcessorPil(
                size={"shortest_edge": resize}, crop_size=24, **kwargs
            )
            pixels = processor(picture.numpy(), return_tensors="pt").pixel_values[0]
            tensors[f"pixels/{name}/{key}"] = pixels
    write(path, tensors, {"config": config})
