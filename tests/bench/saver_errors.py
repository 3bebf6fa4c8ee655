"""The error of --fp8-base in the miniature's prediction: ‖with − without‖ / ‖without‖, float32.

    python tests/bench/saver_errors.py

By timestep, over two prompts.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
PROMPTS = ["a photo of a dog in a forest", "a photo of a cat on a beach"]


def fp8_errors(timesteps=(1, 200, 400, 600, 800, 981)):
    """{t: error}."""
    import torch

    import alchemy
    from alchemy.extras import optimizations

    sdxl = alchemy.load(ROOT / "weights" / "mini", "cpu", "float32")
    x = alchemy.noise((2, 4, 32, 32), [0, 1])
    inputs = sdxl.encode_prompt(PROMPTS).parts()
    with torch.no_grad():
        before = {t: sdxl.unet(x, t, *inputs) for t in timesteps}
        optimizations.store_fp8(sdxl.unet)
        return {
            t: float((sdxl.unet(x, t, *inputs) - y).norm() / y.norm()) for t, y in before.items()
        }


if __name__ == "__main__":
    for t, off in fp8_errors().items():
        print(f"t {t:>4}: {off:.4f}")
