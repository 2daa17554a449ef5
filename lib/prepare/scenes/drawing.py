"""What a picture of `scenes` holds, what is true of it, and its pixels, with numpy alone.

Lengths are in pixels, x grows to the right and y downwards, angles are in radians. What captions cannot know (shade,
light, grain, where a pattern begins) is drawn at random: two things of one description have different pixels.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

PICTURE_SIZE = 128  # side of a picture
THING_COUNTS, THING_COUNT_CHANCES = (3, 4, 5, 6), (0.2, 0.3, 0.3, 0.2)
SIZES = {"small": (9.5, 11.0), "medium": (14.5, 17.0), "large": (22.0, 26.0)}  # name: range of the radius
SIZE_CHANCES = (0.35, 0.4, 0.25)
TEXTURES, TEXTURE_CHANCES = ("plain", "striped", "dotted", "checkered"), (0.4, 0.2, 0.2, 0.2)
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "hexagon", "heart", "crescent")
COLOURS = {  # red, green, blue, each 0 to 1
    "red": (0.84, 0.12, 0.12), "orange": (0.96, 0.53, 0.08), "yellow": (0.95, 0.88, 0.15), "green": (0.13, 0.60, 0.20),
    "blue": (0.13, 0.30, 0.85), "purple": (0.48, 0.16, 0.62), "pink": (0.97, 0.55, 0.74), "brown": (0.45, 0.27, 0.11),
    "black": (0.07, 0.07, 0.08), "white": (0.96, 0.96, 0.96),
}  # fmt: skip
BACKGROUNDS = {  # name: the two colours that its pattern mixes, the colour of things that could not be seen on it
    "grey": ((0.52, 0.52, 0.52), (0.70, 0.70, 0.70), None),
    "gradient": ((0.38, 0.45, 0.52), (0.80, 0.83, 0.86), "white"),
    "noise": ((0.34, 0.34, 0.34), (0.82, 0.82, 0.82), None),
    "bricks": ((0.76, 0.72, 0.68), (0.60, 0.42, 0.37), "brown"),
    "stripes": ((0.64, 0.66, 0.58), (0.80, 0.80, 0.72), "white"),
    "grid": ((0.90, 0.90, 0.88), (0.58, 0.68, 0.80), "white"),
    "night": ((0.05, 0.06, 0.17), (0.75, 0.75, 0.80), "black"),
}
REPEAT_CHANCE = 0.25  # a thing takes the shape, or the colour, of an earlier one, so that there is something to count
CROWDING = 0.8  # two centres are at least this share of the summed radii apart: things overlap at most a little
CLEAR_STEP = 18.0  # how much further left (right, up, down) a thing lies before one would say so
NEARBY_GAP = 12.0  # the widest gap between things that are "next to" each other
EDGE_BAND = 42.0  # a centre within this distance of an edge is at that edge
MIDDLE_BAND = 16.0  # a centre within this distance of the picture's centre, along both axes, is in the middle
MIN_OVERLAP = 12.0  # pixels of a thing that another must hide before it is "in front of" it


@dataclass(frozen=True)
class Thing:
    """One object: four named attributes, and where and how it lies."""

    size: str
    texture: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """A background and its things, drawn in this order: a later thing lies in front of an earlier one."""

    background: str
    things: tuple[Thing, ...]


def make_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene at random: 3 to 6 things that lie inside the picture and hide little of each other."""
    background = str(rng.choice(list(BACKGROUNDS)))
    colours = [colour for colour in COLOURS if colour != BACKGROUNDS[background][2]]
    things: list[Thing] = []
    for _ in range(rng.choice(THING_COUNTS, p=THING_COUNT_CHANCES)):
        colour, shape = str(rng.choice(colours)), str(rng.choice(SHAPES))
        if things and rng.random() < REPEAT_CHANCE:
            shape = things[rng.integers(len(things))].shape
        elif things and rng.random() < REPEAT_CHANCE:
            colour = things[rng.integers(len(things))].colour
        texture = str(rng.choice(TEXTURES, p=TEXTURE_CHANCES))
        size, x, y, radius = _find_room(rng, things)
        things.append(Thing(size, texture, colour, shape, x, y, radius, rng.uniform(-0.2, 0.2)))
    return Scene(background, tuple(things))


def _find_room(rng: np.random.Generator, things: list[Thing]) -> tuple[str, float, float, float]:
    """Size, x, y and radius of one more thing. Six small ones always fit, so the search ends."""
    while True:
        size = str(rng.choice(list(SIZES), p=SIZE_CHANCES))
        radius = rng.uniform(*SIZES[size])
        x, y = (rng.uniform(radius + 2, PICTURE_SIZE - radius - 2) for _ in range(2))
        if all(math.hypot(x - thing.x, y - thing.y) >= CROWDING * (radius + thing.radius) for thing in things):
            return size, x, y, radius


def relations(a: Thing, b: Thing) -> list[str]:
    """What is true of `a` seen from `b`: the direction, where the step is clear, and whether it is nearby."""
    dx, dy = a.x - b.x, a.y - b.y
    step, directions = (dx, ("left of", "right of")) if abs(dx) > abs(dy) else (dy, ("above", "below"))
    true = [directions[step > 0]] if abs(step) >= CLEAR_STEP else []
    return [*true, "nearby"] if 0 <= math.hypot(dx, dy) - a.radius - b.radius <= NEARBY_GAP else true


def place(thing: Thing) -> str:
    """Where a thing lies in the picture: "top left", "top", "middle", ... or "" where nobody would say."""
    edge, middle = PICTURE_SIZE - EDGE_BAND, PICTURE_SIZE / 2
    row = "top" if thing.y < EDGE_BAND else "bottom" if thing.y > edge else ""
    column = "left" if thing.x < EDGE_BAND else "right" if thing.x > edge else ""
    in_middle = max(abs(thing.x - middle), abs(thing.y - middle)) <= MIDDLE_BAND
    return f"{row} {column}".strip() or ("middle" if in_middle else "")


# Pixels: signed distances (negative inside), which give anti-aliased masks

Y, X = np.mgrid[0:PICTURE_SIZE, 0:PICTURE_SIZE].astype(np.float32) + np.float32(0.5)  # centres of the pixels


def _rays(lengths: list[float]) -> np.ndarray:
    """Ends of rays from the origin, evenly spread and clockwise, the first one straight up: (rays, 2)."""
    angles = 2 * np.pi * np.arange(len(lengths)) / len(lengths)
    return np.stack([lengths * np.sin(angles), -np.array(lengths) * np.cos(angles)], axis=1)


T = np.linspace(0, 2 * np.pi, 28, endpoint=False)
HEART_HEIGHT = 13 * np.cos(T) - 5 * np.cos(2 * T) - 2 * np.cos(3 * T) - np.cos(4 * T)
CROSS = [(0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34), (0.34, 1)]  # its right half
POLYGONS = {  # corners in units of the thing's radius
    "square": 0.86 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": np.array([(0, -0.95), (1.02, 0.82), (-1.02, 0.82)]),
    "star": _rays([1.1, 0.46] * 5),
    "cross": np.array([*CROSS, *((-x, -y) for x, y in CROSS)]),
    "diamond": np.array([(0, -1.1), (0.74, 0), (0, 1.1), (-0.74, 0)]),
    "hexagon": _rays([1.0] * 6),
    "heart": np.stack([16 * np.sin(T) ** 3, -HEART_HEIGHT - 2.5], axis=1) / 15.5,
}


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance of points to a shape of radius 1 around the origin.

    To a polygon as by Quilez, "2D distance functions": the nearest edge, the sign by the even-odd rule.
    """
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74) - 0.26
    if shape == "crescent":
        return np.maximum(np.hypot(x, y) - 1, 0.82 - np.hypot(x - 0.5, y + 0.1))
    squared, inside = np.full_like(x, np.inf), np.zeros(x.shape, bool)
    corners = POLYGONS[shape].tolist()
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        if ey:
            inside ^= ((ay > y) != (by > y)) & (px < ex * py / ey)
    return np.where(inside, -1, 1) * np.sqrt(squared)


def _window(thing: Thing) -> tuple[slice, slice]:
    """Rows and columns of the pixels around a thing."""
    reach = 1.3 * thing.radius + 1
    rows, columns = (slice(max(int(centre - reach), 0), int(centre + reach) + 1) for centre in (thing.y, thing.x))
    return rows, columns


@lru_cache(maxsize=8)
def masks(scene: Scene) -> np.ndarray:
    """Coverage of each pixel by each thing, 0 to 1, as if nothing lay in front: float32 (things, H, W)."""
    coverage = np.zeros((len(scene.things), PICTURE_SIZE, PICTURE_SIZE), np.float32)
    for mask, thing in zip(coverage, scene.things, strict=True):
        window = _window(thing)
        dx, dy = X[window] - thing.x, Y[window] - thing.y
        cos, sin = math.cos(thing.angle), math.sin(thing.angle)
        distance = _distance(thing.shape, (cos * dx + sin * dy) / thing.radius, (cos * dy - sin * dx) / thing.radius)
        mask[window] = np.clip(0.5 - distance * thing.radius, 0, 1)
    return coverage


def overlaps(scene: Scene) -> set[tuple[Thing, Thing]]:
    """Pairs (front, back) of things where the front one hides part of the back one."""
    flat = masks(scene).reshape(len(scene.things), -1)
    hidden = np.argwhere(np.tril(flat @ flat.T, -1) >= MIN_OVERLAP)
    return {(scene.things[front], scene.things[back]) for front, back in hidden}


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A picture of a scene: uint8 (3, H, W)."""
    canvas = _background(scene.background, rng)
    for thing, mask in zip(scene.things, masks(scene), strict=True):
        window = _window(thing)
        part = canvas[:, *window]
        part += mask[window] * (_paint(thing, rng, X[window], Y[window]) - part)
    canvas *= rng.uniform(0.88, 1.06)  # the light
    canvas += rng.uniform(0.015, 0.045) * rng.standard_normal(canvas.shape, np.float32)
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8)


def _paint(thing: Thing, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Colour of a thing's surface at the given points, its texture in a second tone: (3, h, w)."""
    colour = np.array(COLOURS[thing.colour]) * rng.uniform(0.85, 1.08) + rng.normal(0, 0.05, 3)
    base = colour.astype(np.float32)[:, None, None]
    second = 0.42 * base if base.mean() > 0.45 else base + 0.55 * (1 - base)
    angle, phase, other_phase = (rng.uniform(0, turn) for turn in (np.pi, 2 * np.pi, 2 * np.pi))
    frequency = 2 * np.pi / rng.uniform(5.0, 6.5)  # by the pixels from one stripe, dot or square to the next
    cos, sin = frequency * math.cos(angle), frequency * math.sin(angle)
    across, along = np.sin(cos * x + sin * y + phase), np.sin(cos * y - sin * x + other_phase)
    waves = {"striped": across, "dotted": across + along - 0.6, "checkered": 3 * across * along}
    share = _soft_step(waves[thing.texture]) if thing.texture in waves else np.zeros_like(x)
    shading = 1 + 0.06 * rng.uniform(-1, 1) * (x - thing.x) / thing.radius
    return shading * (base + (second - base) * share)


def _soft_step(wave: np.ndarray) -> np.ndarray:
    """1 where the wave is high, 0 where it is low, with a soft edge about a pixel wide."""
    return np.clip(0.5 + 1.2 * wave, 0, 1)


def _background(name: str, rng: np.random.Generator) -> np.ndarray:
    """An empty picture, its two colours mixed by a pattern: float32 (3, H, W), 0 to 1."""
    share: float | np.ndarray  # of the second colour, 0 to 1
    if name == "grey":
        share = rng.uniform(0, 1)
    elif name == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        ramp = math.cos(angle) * (X - PICTURE_SIZE / 2) + math.sin(angle) * (Y - PICTURE_SIZE / 2)
        share = np.clip(0.5 + ramp / PICTURE_SIZE, 0, 1)
    elif name == "noise":
        share = rng.random((PICTURE_SIZE // 2, PICTURE_SIZE // 2), np.float32).repeat(2, axis=0).repeat(2, axis=1)
    elif name == "bricks":
        width, height = rng.uniform(17, 22), rng.uniform(8, 11)
        y = Y + rng.uniform(0, height)
        row = np.floor(y / height)
        x = X + rng.uniform(0, width) + row % 2 * width / 2
        tone = np.sin(7.1 * row + 3.7 * np.floor(x / width))
        share = ((x % width > 1.8) & (y % height > 1.8)) * (0.9 + 0.15 * tone)
    elif name == "stripes":
        angle, period = rng.uniform(0, np.pi), rng.uniform(15, 22)
        share = _soft_step(2 * np.sin(2 * np.pi / period * (math.cos(angle) * X + math.sin(angle) * Y)))
    elif name == "grid":
        pitch = rng.uniform(11, 15)
        x, y = X + rng.uniform(0, pitch), Y + rng.uniform(0, pitch)
        share = ((x % pitch < 1.4) | (y % pitch < 1.4)).astype(np.float32)
    else:  # night
        stars = rng.random((PICTURE_SIZE, PICTURE_SIZE), np.float32) < 0.006
        share = rng.uniform(0.4, 1) * stars + 0.12 * (1 - Y / PICTURE_SIZE)
    low, high = np.array(BACKGROUNDS[name][:2], np.float32)[..., None, None]
    tint = rng.normal(0, 0.025, (3, 1, 1)).astype(np.float32)
    return np.broadcast_to(low + tint + (high - low) * share, (3, PICTURE_SIZE, PICTURE_SIZE)).copy()
