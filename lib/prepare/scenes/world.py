"""What a picture of `scenes` may hold, where things lie in it, and what is true of them.

Lengths are in pixels, x grows to the right and y downwards, angles are in radians.
"""

from dataclasses import dataclass
from math import hypot

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
        if all(hypot(x - thing.x, y - thing.y) >= CROWDING * (radius + thing.radius) for thing in things):
            return size, x, y, radius


def relations(a: Thing, b: Thing) -> list[str]:
    """What is true of `a` seen from `b`: the direction, where the step is clear, and whether it is nearby."""
    dx, dy = a.x - b.x, a.y - b.y
    step, directions = (dx, ("left of", "right of")) if abs(dx) > abs(dy) else (dy, ("above", "below"))
    true = [directions[step > 0]] if abs(step) >= CLEAR_STEP else []
    return [*true, "nearby"] if 0 <= hypot(dx, dy) - a.radius - b.radius <= NEARBY_GAP else true


def place(thing: Thing) -> str:
    """Where a thing lies in the picture: "top left", "top", "middle", ... or "" where nobody would say."""
    edge, middle = PICTURE_SIZE - EDGE_BAND, PICTURE_SIZE / 2
    row = "top" if thing.y < EDGE_BAND else "bottom" if thing.y > edge else ""
    column = "left" if thing.x < EDGE_BAND else "right" if thing.x > edge else ""
    in_middle = max(abs(thing.x - middle), abs(thing.y - middle)) <= MIDDLE_BAND
    return f"{row} {column}".strip() or ("middle" if in_middle else "")
