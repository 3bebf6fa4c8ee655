"""Every default that depends on the checkpoint, in one table: name, miniature, SDXL, and where SDXL's value comes from.

The miniature's values are measured (weights/README.md). None of SDXL's was tried by us on the official weights.
"""

TABLE = (
    ("size", 128, 1024, "what the checkpoint was trained at"),
    ("sampler", "euler", "euler", "scheduler_config.json of SDXL base"),
    ("steps", 30, 30, "customary; between the 25 and 50 of most guides"),
    ("guidance", 5.0, 5.0, "diffusers' StableDiffusionXLPipeline"),
    ("strength", 0.85, 0.6, "Image-Alchemy gives none; chosen on the miniature"),
    ("learning_rate", 2e-3, 1e-4, "diffusers' DreamBooth LoRA recipe for SDXL"),
    ("full_rate", 2e-4, 2e-6, "likewise, of --method full: diffusers' DreamBooth for SDXL"),
    ("word_rate", 5e-3, 5e-4, "likewise, of --method textual-inversion: diffusers' script"),
    ("training_steps", 300, 500, "the same recipe"),
    ("rank", 16, 16, "between the recipes' 4 and 32"),
    ("batch", 4, 1, "the same recipe; 12 GB cards"),
    (
        "look",
        0.2,
        0.2,
        "share of T that a picture is noised by to be segmented; by the sweep on the miniature",
    ),
    (
        "window",
        (0.1, 0.7),
        (0.1, 0.7),
        "timesteps whose attention counts while a scene is drawn, as shares of T; likewise",
    ),
    ("sharpening", 1, 1, "times that self-attention spreads the word's map; likewise"),
    ("threshold", 0.4, 0.4, "of the soft mask; likewise"),
    ("dilate", 0.03, 0.03, "of the shorter side; likewise"),
)


def column(which):
    """{name: value} for "mini" or "sdxl"."""
    return {name: mini if which == "mini" else sdxl for name, mini, sdxl, _ in TABLE}
