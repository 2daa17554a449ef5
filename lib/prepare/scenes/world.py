"""The little world of `scenes`: what a picture may hold, where things lie, and what is true of them.

Lengths are in pixels, x grows to the right and y downwards, angles are in radians.
"""

from dataclasses import dataclass
from math import hypot

import numpy as np

PICTURE_SIZE = 128  # side of a picture
THING_COUNTS = (3, 4, 5, 6)
THING_COUNT_CHANCES = (0.2, 0.3, 0.3, 0.2)
SIZES = {"small": (9.5, 11.0), "medium": (14.5, 17.0), "large": (22.0, 26.0)}  # name: range of the radius
SIZE_CHANCES = (0.35, 0.4, 0.25)
TEXTURES = ("plain", "striped", "dotted", "checkered")
TEXTURE_CHANCES = (0.4, 0.2, 0.2, 0.2)
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "hexagon", "heart", "crescent")
COLOURS = {  # name: red, green, blue, each 0 to 1
    "red": (0.84, 0.12, 0.12),
    "orange": (0.96, 0.53, 0.08),
    "yellow": (0.95, 0.88, 0.15),
    "green": (0.13, 0.60, 0.20),
    "blue": (0.13, 0.30, 0.85),
    "purple": (0.48, 0.16, 0.62),
    "pink": (0.97, 0.55, 0.74),
    "brown": (0.45, 0.27, 0.11),
    "black": (0.07, 0.07, 0.08),
    "white": (0.96, 0.96, 0.96),
}
BACKGROUNDS = {  # name: the colours that would be lost on it
    "plain": (),
    "gradient": ("white",),
    "noisy": (),
    "brick": ("brown",),
    "striped": ("white",),
    "grid": ("white",),
    "night": ("black",),
}
MAX_ROTATION = 0.2
REPEAT_CHANCE = 0.25  # a thing takes the shape, or the colour, of an earlier one, so that there is something to count
CROWDING = 0.8  # two centres are at least this share of the summed radii apart: things overlap at most a little
CLEAR_STEP = 18.0  # how much further left (right, up, down) a thing lies before one would say so
NEARBY_GAP = 12.0  # the widest gap between things that are "next to" each other
EDGE_BAND = 42.0  # centres within this distance of an edge are at that edge
MIDDLE_BAND = 16.0  # centres within this distance of the picture's centre, along both axes, are in the middle


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
    visible = [colour for colour in COLOURS if colour not in BACKGROUNDS[background]]
    things: list[Thing] = []
    for _ in range(rng.choice(THING_COUNTS, p=THING_COUNT_CHANCES)):
        things.append(_make_thing(rng, visible, things))
    return Scene(background, tuple(things))


def _make_thing(rng: np.random.Generator, colours: list[str], others: list[Thing]) -> Thing:
    colour, shape = str(rng.choice(colours)), str(rng.choice(SHAPES))
    if others and rng.random() < REPEAT_CHANCE:
        shape = others[rng.integers(len(others))].shape
    elif others and rng.random() < REPEAT_CHANCE:
        colour = others[rng.integers(len(others))].colour
    texture = str(rng.choice(TEXTURES, p=TEXTURE_CHANCES))
    size, radius, x, y = _find_room(rng, others)
    return Thing(size, texture, colour, shape, x, y, radius, rng.uniform(-MAX_ROTATION, MAX_ROTATION))


def _find_room(rng: np.random.Generator, others: list[Thing]) -> tuple[str, float, float, float]:
    """Size, radius and centre of one more thing. Six small ones always fit, so the search ends."""
    while True:
        size = str(rng.choice(list(SIZES), p=SIZE_CHANCES))
        radius = rng.uniform(*SIZES[size])
        x, y = (rng.uniform(radius + 2, PICTURE_SIZE - radius - 2) for _ in range(2))
        if all(hypot(x - o.x, y - o.y) >= CROWDING * (radius + o.radius) for o in others):
            return size, radius, x, y


def relations(a: Thing, b: Thing) -> list[str]:
    """What is true of `a` seen from `b`: any of left, right, above, below, nearby.

    A direction is named only where the step is clear and larger than the step across it.
    """
    dx, dy = a.x - b.x, a.y - b.y
    sideways = abs(dx) > abs(dy)
    gap = hypot(dx, dy) - a.radius - b.radius
    tests = {
        "left": sideways and dx <= -CLEAR_STEP,
        "right": sideways and dx >= CLEAR_STEP,
        "above": not sideways and dy <= -CLEAR_STEP,
        "below": not sideways and dy >= CLEAR_STEP,
        "nearby": 0 <= gap <= NEARBY_GAP,
    }
    return [name for name, true in tests.items() if true]


def place(thing: Thing) -> str | None:
    """Where a thing lies in the picture: "top left", "top", "middle", ... or None where nobody would say."""
    far_edge = PICTURE_SIZE - EDGE_BAND
    row = "top" if thing.y < EDGE_BAND else "bottom" if thing.y > far_edge else ""
    column = "left" if thing.x < EDGE_BAND else "right" if thing.x > far_edge else ""
    if row or column:
        return f"{row} {column}".strip()
    off_centre = max(abs(thing.x - PICTURE_SIZE / 2), abs(thing.y - PICTURE_SIZE / 2))
    return "middle" if off_centre <= MIDDLE_BAND else None
