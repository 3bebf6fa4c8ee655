"""Images of an --inspect page for the README: a screenshot, and an animation of its slider.

    python insert.py --inspect out/page
    python tests/bench/screenshots.py out/page/index.html alchemy/extras/inspect

Writes page.webp and slider.webp into the folder. Needs Chromium.
"""

import argparse
import io
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT, SLIDER_HEIGHT = 1280, 1180, 860
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--virtual-time-budget=8000"),
)


def capture(page: Path, step: int, size: tuple[int, int]) -> Image.Image:
    """The page at a step, as an image of size (width, height)."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("error: no chromium or google-chrome in PATH; install one")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        flags = [f"--user-data-dir={folder}/profile", f"--screenshot={shot}"]
        url = f"{page.resolve().as_uri()}#{step}"
        command = [browser, *FLAGS, *flags, "--window-size={},{}".format(*size), url]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        return Image.open(io.BytesIO(shot.read_bytes())).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="index.html of insert.py --inspect")
    parser.add_argument("out", type=Path, help="folder")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 4, 8, 11, 14, 17, 20, 24, 29])
    parser.add_argument("--top", type=int, default=0, help="first row of the animation, pixels")
    args = parser.parse_args()
    middle = args.steps[len(args.steps) // 2]
    capture(args.page, middle, (WIDTH, HEIGHT)).save(args.out / "page.webp", quality=80, method=6)

    frames = []
    for step in args.steps:
        frame = capture(args.page, step, (WIDTH, args.top + SLIDER_HEIGHT))
        frame = frame.crop((0, args.top, WIDTH, args.top + SLIDER_HEIGHT))
        frames.append(frame.resize((WIDTH * 5 // 8, SLIDER_HEIGHT * 5 // 8), Image.LANCZOS))
    pauses = [450] * (len(frames) - 1) + [2000]  # milliseconds
    options = dict(save_all=True, duration=pauses, loop=0, quality=60, method=4)
    frames[0].save(args.out / "slider.webp", append_images=frames[1:], **options)


if __name__ == "__main__":
    main()
