"""Every default that depends on the checkpoint: name, miniature, SDXL, source of SDXL's value.

The miniature's values are measured (weights/README.md). SDXL's have not been tried by us on the
official weights.
"""

TABLE = (
    ("size", 128, 1024, "the resolution that the checkpoint was trained at"),
    ("sampler", "euler", "euler", "scheduler_config.json of SDXL base"),
    ("steps", 30, 30, "customary; most guides use 25 to 50"),
    ("guidance", 5.0, 5.0, "diffusers' StableDiffusionXLPipeline"),
    ("strength", 0.85, 0.6, "Image-Alchemy gives none; chosen on the miniature"),
    ("learning_rate", 2e-3, 1e-4, "diffusers' DreamBooth LoRA recipe for SDXL"),
    ("full_rate", 2e-4, 2e-6, "for --method full: diffusers' DreamBooth recipe for SDXL"),
    ("word_rate", 5e-3, 5e-4, "for --method textual-inversion: diffusers' script"),
    ("training_steps", 300, 500, "diffusers' DreamBooth LoRA recipe for SDXL"),
    ("rank", 16, 16, "between the recipes' 4 and 32"),
    ("batch", 4, 1, "the same recipe; 12 GB cards"),
    # Segmentation; all chosen by weights/toy/tune_segmentation.py on the miniature.
    ("noise_level", 0.2, 0.2, "how far an image is noised to be segmented, as a share of T"),
    ("window", (0.1, 0.7), (0.1, 0.7), "timesteps of a scene whose attention counts, by T"),
    ("walk_iterations", 1, 1, "steps of the random walk along self-attention"),
    # Attention over uniform, below which a word is called unknown. Of the miniature's 16 classes
    # 15 have at least 7.2 in scenes and 7.1 in images, "book" 3.3 and 6.7; words that it never saw
    # (spaceship, castle, tree, computer, guitar) have at most 4.8 and 6.6.
    ("scene_word_strength", 6.0, 1.0, "1 is uniform attention; not tuned"),
    ("image_word_strength", 6.7, 1.0, "1 is uniform attention; not tuned"),
    ("threshold", 0.4, 0.4, "of the soft mask"),
    ("dilate", 0.03, 0.03, "how far the mask is grown, as a share of the shorter side"),
)


def column(which: str) -> dict:
    """{name: value} for "mini" or "sdxl"."""
    return {name: mini if which == "mini" else sdxl for name, mini, sdxl, _ in TABLE}
