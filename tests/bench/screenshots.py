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

WIDTH, HEIGHT = 1280, 1180
# Of the animation: the bar, which stays in view when one scrolls, and the first card of the stages.
BAR, CARDS = (125, 190), (615, 1095)  # rows of pixels
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
    args = parser.parse_args()
    middle = args.steps[len(args.steps) // 2]
    capture(args.page, middle, (WIDTH, HEIGHT)).save(args.out / "page.webp", quality=80, method=6)

    frames, height = [], BAR[1] - BAR[0] + CARDS[1] - CARDS[0]
    for step in args.steps:
        page, frame = capture(args.page, step, (WIDTH, HEIGHT)), Image.new("RGB", (WIDTH, height))
        frame.paste(page.crop((0, BAR[0], WIDTH, BAR[1])), (0, 0))
        frame.paste(page.crop((0, CARDS[0], WIDTH, CARDS[1])), (0, BAR[1] - BAR[0]))
        frames.append(frame.resize((WIDTH * 3 // 4, height * 3 // 4), Image.LANCZOS))
    pauses = [450] * (len(frames) - 1) + [2000]  # milliseconds
    options = dict(save_all=True, duration=pauses, loop=0, quality=60, method=4)
    frames[0].save(args.out / "slider.webp", append_images=frames[1:], **options)


if __name__ == "__main__":
    main()
