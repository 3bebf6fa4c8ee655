"""The toy world: its scenes, how weights/mini is trained on them, and how it is measured.

Run each part as a module from the root of the repository:

    python -m weights.toy.world sheet out/world.png     scenes with their captions
    python -m weights.toy.recipe vae                    train (then unet, then pack)
    python -m weights.toy.measure                       the table of weights/README.md
    python -m weights.toy.methods                       the training methods compared
    python -m weights.toy.tune_segmentation             the settings of the segmentation compared
"""

from pathlib import Path

WEIGHTS = Path(__file__).parents[1]
