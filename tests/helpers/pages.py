"""What the tests of --inspect share: the data of a page, the frames of its sprite sheets."""

import base64
import io
import json
import re

import numpy as np
import torch
from PIL import Image

HOSTILE = "a dog </script><script>alert(1)</script> <!-- <b> & \"'"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def page_data(text):
    """The data of a page as a browser reads it: up to the first end of a script."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.S)
    return json.loads(found[1])


def cut_frames(sprites):
    """The frames of a sprite sheet."""
    file = io.BytesIO(base64.b64decode(sprites["src"].split(",")[1]))
    sheet, w, h, frames = np.asarray(Image.open(file)), sprites["w"], sprites["h"], []
    for k in range(sprites["n"]):
        top, left = k // sprites["columns"] * h, k % sprites["columns"] * w
        frames.append(sheet[top : top + h, left : left + w])
    return np.stack(frames)
