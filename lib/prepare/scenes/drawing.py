"""Scenes -> pixels, by signed distances (negative inside) and anti-aliased masks. Only numpy, only the given generator.

What captions cannot know (shade, gain, light, grain, pattern phase) is drawn at random, so that two things of one
description have different pixels.
"""

import math

import numpy as np

from lib.prepare.scenes.world import COLOURS, PICTURE_SIZE, Scene, Thing

SHADE_JITTER = 0.05  # standard deviation of a thing's colour, per channel
GAIN_RANGE = (0.85, 1.08)  # brightness of a thing
LIGHT_RANGE = (0.88, 1.06)  # brightness of the whole picture
NOISE_RANGE = (0.015, 0.045)  # standard deviation of the sensor's noise
PATTERN_PERIOD = (5.0, 6.5)  # pixels from one stripe, dot or square to the next
MIN_OVERLAP = 12.0  # pixels of a thing that another must hide before it is "in front of" it

_Y, _X = np.mgrid[0:PICTURE_SIZE, 0:PICTURE_SIZE].astype(np.float32) + np.float32(0.5)


def _regular_polygon(corners: int, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
    """Corners around the centre, the first one straight up; `radii` are used in turn (two make a star)."""
    angles = 2 * np.pi * np.arange(corners) / corners
    reach = np.resize(radii, corners)
    return np.stack([reach * np.sin(angles), -reach * np.cos(angles)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 15.5


def _cross(arm: float) -> np.ndarray:
    """`arm`: half the width of its arms."""
    quarter = np.array([(arm, -1), (arm, -arm), (1, -arm)])
    turn = np.array([(0, 1), (-1, 0)])  # from one quarter to the next, clockwise on the screen
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


_POLYGONS = {  # corners in units of the thing's radius
    "square": 0.86 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": np.array([(0, -0.95), (1.02, 0.82), (-1.02, 0.82)]),
    "star": _regular_polygon(10, (1.1, 0.46)),
    "cross": _cross(arm=0.34),
    "diamond": np.array([(0, -1.1), (0.74, 0), (0, 1.1), (-0.74, 0)]),
    "hexagon": _regular_polygon(6),
    "heart": _heart(),
}


def _polygon_distance(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance of points to a polygon (Quilez, "2D distance functions"): nearest edge, even-odd rule."""
    squared = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners.tolist(), np.roll(corners, -1, axis=0).tolist(), strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        if ey:
            inside ^= ((ay > y) != (by > y)) & (px < ex * py / ey)
    return np.where(inside, -1, 1) * np.sqrt(squared)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a shape of radius 1 around the origin."""
    if shape in _POLYGONS:
        return _polygon_distance(x, y, _POLYGONS[shape])
    r = np.hypot(x, y)
    if shape == "ring":
        return np.abs(r - 0.74) - 0.26
    if shape == "crescent":
        return np.maximum(r - 1, 0.82 - np.hypot(x - 0.5, y + 0.1))
    return r - 1  # a circle


def masks(scene: Scene) -> np.ndarray:
    """Coverage of each pixel by each thing, 0 to 1, as if nothing lay in front: float32 (things, H, W)."""
    out = np.zeros((len(scene.things), PICTURE_SIZE, PICTURE_SIZE), np.float32)
    for mask, thing in zip(out, scene.things, strict=True):
        window = _window(thing)
        dx, dy = _X[window] - thing.x, _Y[window] - thing.y
        cos, sin = math.cos(thing.angle), math.sin(thing.angle)
        distance = _distance(thing.shape, (cos * dx + sin * dy) / thing.radius, (cos * dy - sin * dx) / thing.radius)
        mask[window] = np.clip(0.5 - distance * thing.radius, 0, 1)
    return out


def _window(thing: Thing) -> tuple[slice, slice]:
    reach = 1.3 * thing.radius + 1
    spans = ((max(int(c - reach), 0), int(c + reach) + 1) for c in (thing.y, thing.x))
    rows, columns = (slice(*span) for span in spans)
    return rows, columns


def overlaps(coverage: np.ndarray) -> set[tuple[int, int]]:
    """Pairs (front, back) of indices of things where the front one hides part of the back one.

    `coverage`: (things, H, W), from `masks`.
    """
    flat = coverage.reshape(len(coverage), -1)
    shared = flat @ flat.T
    return {(i, j) for i in range(len(flat)) for j in range(i) if shared[i, j] >= MIN_OVERLAP}


def draw(scene: Scene, coverage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture of a scene: uint8 (3, H, W). `coverage`: the scene's `masks`."""
    canvas = _background(scene.background, rng)
    for thing, mask in zip(scene.things, coverage, strict=True):
        rows, columns = _window(thing)
        colour = _paint(thing, rng, _X[rows, columns], _Y[rows, columns])
        canvas[:, rows, columns] += mask[rows, columns] * (colour - canvas[:, rows, columns])
    canvas *= rng.uniform(*LIGHT_RANGE)
    canvas += rng.uniform(*NOISE_RANGE) * rng.standard_normal(canvas.shape, np.float32)
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8)


def _paint(thing: Thing, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Colour of a thing's surface at the given points: (3, h, w)."""
    base = np.array(COLOURS[thing.colour]) * rng.uniform(*GAIN_RANGE) + rng.normal(0, SHADE_JITTER, 3)
    base = base.astype(np.float32)[:, None, None]
    second = 0.42 * base if base.mean() > 0.45 else base + 0.55 * (1 - base)
    share = _pattern(thing.texture, rng, x, y)
    shading = 1 + 0.06 * rng.uniform(-1, 1) * (x - thing.x) / thing.radius
    return shading * (base + (second - base) * share)


def _pattern(texture: str, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of the second tone at the given points, 0 to 1."""
    angle, phase, other_phase = (rng.uniform(0, turn) for turn in (np.pi, 2 * np.pi, 2 * np.pi))
    frequency = 2 * np.pi / rng.uniform(*PATTERN_PERIOD)
    if texture == "plain":
        return np.zeros_like(x)
    cos, sin = frequency * math.cos(angle), frequency * math.sin(angle)
    across = np.sin(cos * x + sin * y + phase)
    if texture == "striped":
        return _soft_step(across)
    along = np.sin(cos * y - sin * x + other_phase)
    if texture == "dotted":
        return _soft_step(across + along - 0.6)
    return _soft_step(3 * across * along)


def _soft_step(wave: np.ndarray) -> np.ndarray:
    """1 where the wave is high, 0 where it is low, with a soft edge about a pixel wide."""
    return np.clip(0.5 + 1.2 * wave, 0, 1)


def _background(name: str, rng: np.random.Generator) -> np.ndarray:
    """An empty picture: float32 (3, H, W), 0 to 1."""
    shape = (3, PICTURE_SIZE, PICTURE_SIZE)
    share = _BACKGROUND_PATTERNS[name](rng)
    low, high = np.array(_BACKGROUND_COLOURS[name], np.float32)[..., None, None]
    tint = rng.normal(0, 0.025, (3, 1, 1)).astype(np.float32)
    return np.broadcast_to(low + tint + (high - low) * share, shape).copy()


_BACKGROUND_COLOURS = {  # name: the colours that its pattern moves between
    "plain": ((0.52, 0.52, 0.52), (0.70, 0.70, 0.70)),
    "gradient": ((0.38, 0.45, 0.52), (0.80, 0.83, 0.86)),
    "noisy": ((0.34, 0.34, 0.34), (0.82, 0.82, 0.82)),
    "brick": ((0.76, 0.72, 0.68), (0.60, 0.42, 0.37)),
    "striped": ((0.64, 0.66, 0.58), (0.80, 0.80, 0.72)),
    "grid": ((0.90, 0.90, 0.88), (0.58, 0.68, 0.80)),
    "night": ((0.05, 0.06, 0.17), (0.75, 0.75, 0.80)),
}


def _one_shade(rng: np.random.Generator) -> float:
    return rng.uniform(0, 1)


def _fade(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    ramp = math.cos(angle) * (_X - PICTURE_SIZE / 2) + math.sin(angle) * (_Y - PICTURE_SIZE / 2)
    return np.clip(0.5 + ramp / PICTURE_SIZE, 0, 1)


def _grain(rng: np.random.Generator) -> np.ndarray:
    coarse = rng.random((PICTURE_SIZE // 2, PICTURE_SIZE // 2), np.float32)
    return coarse.repeat(2, axis=0).repeat(2, axis=1)


def _bricks(rng: np.random.Generator) -> np.ndarray:
    width, height = rng.uniform(17, 22), rng.uniform(8, 11)
    y = _Y + rng.uniform(0, height)
    row = np.floor(y / height)
    x = _X + rng.uniform(0, width) + row % 2 * width / 2
    in_brick = (x % width > 1.8) & (y % height > 1.8)
    tone = np.sin(7.1 * row + 3.7 * np.floor(x / width))
    return in_brick * (0.9 + 0.15 * tone)


def _wide_stripes(rng: np.random.Generator) -> np.ndarray:
    angle, period = rng.uniform(0, np.pi), rng.uniform(15, 22)
    return _soft_step(2 * np.sin(2 * np.pi / period * (math.cos(angle) * _X + math.sin(angle) * _Y)))


def _grid_lines(rng: np.random.Generator) -> np.ndarray:
    pitch = rng.uniform(11, 15)
    x, y = _X + rng.uniform(0, pitch), _Y + rng.uniform(0, pitch)
    return ((x % pitch < 1.4) | (y % pitch < 1.4)).astype(np.float32)


def _night(rng: np.random.Generator) -> np.ndarray:
    specks = rng.random((PICTURE_SIZE, PICTURE_SIZE), np.float32) < 0.006
    return rng.uniform(0.4, 1) * specks + 0.12 * (1 - _Y / PICTURE_SIZE)


_BACKGROUND_PATTERNS = {
    "plain": _one_shade,
    "gradient": _fade,
    "noisy": _grain,
    "brick": _bricks,
    "striped": _wide_stripes,
    "grid": _grid_lines,
    "night": _night,
}
