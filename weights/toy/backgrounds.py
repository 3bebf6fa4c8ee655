"""The backgrounds of the toy world, each drawn by numpy at the size asked for.

Lengths are in units of the shorter side, so that a sun is round at every aspect ratio. Textures are
soft: no autoencoder keeps per-pixel noise, which would drown the edges of the objects in the loss.
"""

import numpy as np
from PIL import Image


class Canvas:
    """An image painted from back to front: rgb (3, H, W), coordinates y (H, 1) and x (1, W)."""

    def __init__(self, rng, size):
        height, width = size
        self.rng, self.m = rng, min(size)  # m: pixels per unit
        self.h, self.w = height / self.m, width / self.m
        self.y = ((np.arange(height, dtype=np.float32) + 0.5) / self.m)[:, None]
        self.x = ((np.arange(width, dtype=np.float32) + 0.5) / self.m)[None, :]
        # Planar: numpy is 5 times faster on it than on (H, W, 3).
        self.rgb = np.zeros((3, height, width), np.float32)

    def colour(self, red, green, blue, spread=9):
        """A jittered colour, (3, 1, 1) in [0, 1]; most of the jitter keeps the hue."""
        jitter = self.rng.uniform(-spread, spread) + self.rng.uniform(-spread / 2, spread / 2, 3)
        return ((np.array([red, green, blue]) + jitter) / 255).astype(np.float32)[:, None, None]

    def cover(self, depth, soft=1.0):
        """Coverage in [0, 1] of a pixel `depth` units inside a shape; the edge is `soft` pixels."""
        return np.clip(depth * (self.m / soft) + 0.5, 0, 1)

    def paint(self, alpha, colour):
        self.rgb += alpha * (colour - self.rgb)

    def ramp(self, top, bottom, start, end):
        """Fill everything below `start` with a gradient that has become `bottom` at `end`."""
        t = np.clip((self.y - start) / (end - start), 0, 1)
        self.paint(self.cover(self.y - start), top + (bottom - top) * t)

    def ramp_over(self, edge, bottom):
        """Let the ground below the line `edge` (1, W) fade towards `bottom` at the lower border."""
        self.paint(np.clip((self.y - edge) / (self.h - edge), 0, 1), bottom)

    def level(self, low, high):
        """A horizon between two fractions of the height, in units."""
        return self.rng.uniform(low, high) * self.h

    def wave(self, height, length):
        """A random smooth line over the width, (1, W), within +-height: hills, dunes, shores."""
        # Python floats: numpy's would make every array float64.
        a, b = self.rng.uniform(0, 2 * np.pi, 2).tolist()
        k = 2 * np.pi / (length * self.rng.uniform(0.8, 1.3))
        return height * (0.65 * np.sin(k * self.x + a) + 0.35 * np.sin(2.3 * k * self.x + b))

    def noise(self, cell, stretch=1.0):
        """Smooth noise (H, W) in about [-1, 1] with lumps `cell` high and `cell * stretch` wide."""
        shape = int(self.h / cell) + 3, int(self.w / (cell * stretch)) + 3
        lumps = Image.fromarray(self.rng.uniform(-1, 1, shape).astype(np.float32))
        return np.asarray(lumps.resize((self.rgb.shape[2], self.rgb.shape[1]), Image.BICUBIC))

    def shade(self, amount, where=1.0):
        """Lighten (amount > 0) or darken (< 0) by a field (H, W)."""
        self.rgb *= 1 + amount * where

    def disc(self, x, y, rx, ry, colour, soft=1.0, strength=1.0):
        """An ellipse, painted in its own window only, for speed."""
        m, pad = self.m, (soft + 1) / self.m
        rows = slice(max(0, int((y - ry - pad) * m)), max(0, int((y + ry + pad) * m) + 1))
        cols = slice(max(0, int((x - rx - pad) * m)), max(0, int((x + rx + pad) * m) + 1))
        r = np.sqrt(((self.x[:, cols] - x) / rx) ** 2 + ((self.y[rows] - y) / ry) ** 2)
        view = self.rgb[:, rows, cols]
        view += strength * self.cover((1 - r) * min(rx, ry), soft) * (colour - view)

    def circle(self, x, y, r, colour, soft=1.0, strength=1.0):
        self.disc(x, y, r, r, colour, soft, strength)

    def across(self, margin=0.0):
        """A random x, `margin` away from both sides."""
        return self.rng.uniform(margin, self.w - margin)

    def clouds(self, count, below, colour):
        for _ in range(count):
            x, y, r = self.across(), self.rng.uniform(0.04, below), self.rng.uniform(0.05, 0.09)
            for dx, k in ((-1.1, 0.6), (0.0, 1.0), (1.2, 0.7)):
                height = y + (1 - k) * r * 0.6
                self.disc(x + dx * r, height, 1.3 * k * r, 0.75 * k * r, colour, 3.0, 0.85)


def beach(c):
    horizon, rng = c.level(0.31, 0.47), c.rng
    c.ramp(c.colour(105, 185, 240), c.colour(215, 238, 250), -0.01, horizon)
    if rng.random() < 0.5:
        c.circle(c.across(0.1), rng.uniform(0.08, 0.2), 0.07, c.colour(255, 240, 160), 2)
    c.clouds(rng.integers(0, 3), horizon - 0.1, c.colour(250, 252, 255))
    c.ramp(c.colour(20, 110, 185), c.colour(60, 190, 205), horizon, horizon + 0.16)
    shore = horizon + rng.uniform(0.12, 0.17) + c.wave(0.018, 0.9)
    c.paint(c.cover(c.y - shore), c.colour(246, 252, 252, 3))  # foam
    c.paint(c.cover(c.y - shore - 0.025 - c.wave(0.006, 0.3)), c.colour(205, 175, 125))  # wet sand
    c.paint(c.cover(c.y - shore - 0.07, 5), c.colour(238, 214, 160))
    c.shade(0.05 * c.noise(0.05, 3), c.y > shore + 0.05)
    return horizon + 0.22


def grass(c):
    horizon = c.level(0.37, 0.55)
    c.ramp(c.colour(90, 165, 240), c.colour(205, 232, 252), -0.01, horizon)
    c.clouds(c.rng.integers(1, 4), horizon - 0.16, c.colour(252, 253, 255, 3))
    c.paint(c.cover(c.y - horizon + 0.07 - c.wave(0.05, 1.1)), c.colour(95, 165, 95))  # far hills
    edge = horizon + c.wave(0.015, 1.4)
    c.paint(c.cover(c.y - edge), c.colour(135, 205, 70))
    c.ramp_over(edge, c.colour(60, 150, 45))
    c.shade(0.13 * c.noise(0.07, 0.3), c.y > edge)  # upright lumps read as blades
    return horizon + 0.05


def snow(c):
    horizon, rng = c.level(0.42, 0.55), c.rng
    c.ramp(c.colour(165, 190, 215), c.colour(225, 235, 245), -0.01, horizon)
    for _ in range(3):  # mountains
        x, peak, slope = c.across(), horizon - rng.uniform(0.14, 0.26), rng.uniform(0.7, 1.1)
        inside = c.cover(c.y - peak - slope * abs(c.x - x) - 0.012 * np.sin(40 * c.x))
        c.paint(inside * (c.y < horizon + 0.05), c.colour(150, 170, 200) + 0.18 * (c.x < x))
    for _ in range(rng.integers(2, 6)):  # firs with white tips
        x, foot, tall = c.across(), horizon + rng.uniform(0.0, 0.05), rng.uniform(0.14, 0.24)
        depth = c.y - foot + tall - 3.2 * abs(c.x - x)
        inside = c.cover(np.minimum(depth * 0.3, foot - c.y))
        c.paint(inside, c.colour(60, 95, 95))
        c.paint(inside * (c.y < foot - 0.62 * tall), c.colour(235, 242, 250, 3))
    edge = horizon + c.wave(0.02, 1.3)
    c.paint(c.cover(c.y - edge), c.colour(250, 252, 255, 3))
    c.ramp_over(edge, c.colour(208, 222, 242, 5))
    c.shade(0.03 * c.noise(0.09, 3), c.y > edge)
    for _ in range(rng.integers(8, 26)):
        r = rng.uniform(0.006, 0.013)
        c.circle(c.across(), rng.uniform(0, c.h), r, np.float32(1), 1.5, 0.9)
    return horizon + 0.06


def desert(c):
    horizon, rng = c.level(0.36, 0.53), c.rng
    c.ramp(c.colour(245, 165, 95), c.colour(255, 225, 150), -0.01, horizon)
    r, x = rng.uniform(0.08, 0.13), c.across(0.1)
    height = rng.uniform(0.05, 0.25)
    c.circle(x, horizon - height, r, c.colour(255, 245, 205, 4), 3)
    if rng.random() < 0.6:  # table mountains
        for _ in range(2):
            x, half, tall = rng.uniform(0, c.w), rng.uniform(0.08, 0.2), rng.uniform(0.08, 0.17)
            below = c.y - horizon + tall
            depth = np.minimum(half + 0.3 * below - abs(c.x - x), below)
            c.paint(c.cover(depth), c.colour(190, 95, 60))
    for k, tone in enumerate(((222, 135, 65), (235, 152, 72), (214, 122, 50))):
        crest = horizon + 0.15 * k * (c.h - horizon) / 0.5 + c.wave(0.03 + 0.015 * k, 0.9 + 0.3 * k)
        c.paint(c.cover(c.y - crest), c.colour(*tone))
        c.shade(0.16 * np.exp(-np.maximum(c.y - crest, 0) * 14), c.cover(c.y - crest))  # lit crests
    c.shade(0.035 * c.noise(0.035, 6), c.y > horizon + 0.04)  # ripples
    return horizon + 0.08


def forest(c):
    ground, rng = c.level(0.54, 0.64), c.rng
    c.ramp(c.colour(45, 95, 50), c.colour(150, 195, 110), -0.01, ground)
    c.shade(0.25 * c.noise(0.12))
    for k in np.linspace(0.2, 1, rng.integers(7, 11)).tolist():  # trunks, far ones pale and thin
        x, half = rng.uniform(0, c.w), 0.012 + 0.035 * k * rng.uniform(0.7, 1.2)
        foot = ground - 0.03 + 0.09 * k
        root = half * (1 + 0.5 * np.exp(-np.maximum(foot - c.y, 0) * 25))
        depth = root - abs(c.x - x - 0.01 * np.sin(9 * c.y + x))
        bark = c.colour(*(np.array([110, 120, 80]) * (1 - k) + np.array([84, 54, 34]) * k))
        lit = bark * (1 + 0.25 * np.clip((x - c.x) / half, -1, 1))
        c.paint(c.cover(np.minimum(depth, foot - c.y)), lit)
    leaves = 0.13 + c.wave(0.05, 0.5) + c.wave(0.03, 0.2)
    c.paint(c.cover(leaves - c.y, 2), c.colour(25, 75, 35))
    edge = ground + c.wave(0.012, 0.5)
    under = c.cover(c.y - edge, 3) * 0.9
    c.paint(under, c.colour(92, 98, 42))
    c.shade(0.22 * c.noise(0.06, 2), under)
    return ground + 0.08


def night(c):
    horizon, rng = c.level(0.52, 0.64), c.rng
    c.ramp(c.colour(10, 12, 48, 5), c.colour(52, 48, 112, 7), -0.01, horizon)
    for _ in range(rng.integers(22, 42)):
        r = rng.uniform(0.005, 0.011)
        c.circle(c.across(), rng.uniform(0, horizon - 0.06), r, c.colour(255, 250, 215, 4), 1.2)
    x, y, r = c.across(0.12), rng.uniform(0.12, 0.24), rng.uniform(0.06, 0.095)
    before = c.rgb.copy()
    c.circle(x, y, r, c.colour(252, 244, 205, 4))
    if rng.random() < 0.5:  # a crescent: the sky again over half the moon
        sky = before[:, int(y * c.m), int(min(x, c.w - 0.01) * c.m), None, None]
        c.circle(x + 0.45 * r, y - 0.15 * r, 0.9 * r, sky)
    c.paint(c.cover(c.y - horizon + 0.05 - c.wave(0.04, 0.8)), c.colour(26, 28, 66, 4))
    edge = horizon + c.wave(0.012, 1.2)
    c.paint(c.cover(c.y - edge), c.colour(42, 60, 88, 6))
    c.ramp_over(edge, c.colour(22, 32, 56, 5))
    c.shade(0.12 * c.noise(0.06, 2.5), c.y > edge)
    return horizon + 0.05


def wall(c):
    foot, rng = c.level(0.7, 0.8), c.rng
    tall = rng.uniform(0.085, 0.12)  # a course of bricks
    course = np.floor((c.y + 1 - foot) / tall)
    across = c.x / (2.3 * tall) + 0.5 * (course % 2) + rng.random()
    table = rng.uniform(-1, 1, (64, 64)).astype(np.float32)
    tone = table[course.astype(int) % 64, across.astype(int) % 64]
    c.paint(1.0, c.colour(172, 76, 56, 14) * (1 + 0.13 * tone))
    beside = (across % 1) * 2.3 * tall
    above = (c.y + 1 - foot) % tall
    gap = np.minimum(np.minimum(beside, 2.3 * tall - beside), np.minimum(above, tall - above))
    c.paint(c.cover(0.008 - gap), c.colour(206, 192, 176))
    c.shade(0.1 * c.noise(0.4))
    c.ramp(c.colour(150, 150, 152), c.colour(122, 122, 126), foot, c.h)  # pavement
    c.shade(-0.35 * np.exp(-abs(c.y - foot) * 60))
    crack = (c.x - 0.5 * c.w) / (c.y - foot + 0.5) + rng.random()
    c.shade(-0.2 * c.cover(0.006 - abs(crack % 0.6 - 0.3)), c.y > foot)
    return foot + 0.05


def room(c):
    foot, rng = c.level(0.55, 0.66), c.rng
    paints = ((226, 214, 190), (178, 205, 212), (206, 190, 216), (190, 210, 178), (228, 196, 186))
    c.paint(1.0, c.colour(*paints[rng.integers(len(paints))]))
    c.shade(0.12 * (0.5 - c.y / foot))
    x, half, tall = rng.uniform(0.2, c.w - 0.2), rng.uniform(0.13, 0.2), rng.uniform(0.11, 0.16)
    box = np.minimum(half - abs(c.x - x), tall - abs(c.y - 0.24))
    frame = (250, 248, 242) if rng.random() < 0.6 else (120, 80, 50)
    c.paint(c.cover(box + 0.018), c.colour(*frame))
    # A window: sky and a cross of bars.
    c.paint(c.cover(box), c.colour(175, 220, 248) + 0.25 * (c.y - 0.24))
    bars = c.cover(0.008 - np.minimum(abs(c.x - x), abs(c.y - 0.24))) * (box > 0)
    c.paint(bars, c.colour(250, 248, 242))
    depth = c.y - foot + 0.35  # boards run to a point above the skirting
    along = (c.x - rng.uniform(0.3, 0.7) * c.w) / depth * 3.2 + 40
    tone = rng.uniform(-1, 1, 96).astype(np.float32)[np.clip(along, 0, 95).astype(int)]
    floor = c.cover(c.y - foot)
    c.paint(floor, c.colour(184, 122, 68, 14) * (1 + 0.1 * tone))
    seam = np.minimum(along % 1, 1 - along % 1) * depth / 3.2
    c.paint(floor * c.cover(0.005 - seam) * 0.6, c.colour(96, 58, 30))
    skirting = np.minimum(c.y - foot + 0.035, foot - c.y)
    c.paint(c.cover(skirting), c.colour(248, 246, 240, 4))
    return foot + 0.06


BACKGROUNDS = (beach, grass, snow, desert, forest, night, wall, room)
DRAW = {function.__name__: function for function in BACKGROUNDS}


def draw(name, rng, size):
    """One background: float32 rgb (3, H, W) in [0, 1], and the row below which objects stand."""
    canvas = Canvas(rng, size)
    horizon = DRAW[name](canvas)
    return np.clip(canvas.rgb, 0, 1), horizon * canvas.m
