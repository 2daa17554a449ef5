"""Scenes -> captions: sentences that people might write, each true of its picture.

A caption picks some of the things, mentions some of their attributes, and adds a relation, a place, a count or the
background. "A" claims that there is at least one; a number claims that there are exactly so many.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.data.dataset import CAPTIONS_PER_IMAGE
from lib.prepare.scenes.drawing import Scene, Thing, overlaps, place, relations

SHORTEST, LONGEST = 6, 20  # words of a caption
MENTION_CHANCES = {"size": 0.45, "texture": 0.55, "colour": 0.85, "shape": 0.93}  # that a description says it
MENTION_CHANCES |= {"medium": 0.1, "plain": 0.08}  # values that are rarely worth a word
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
WORDS = {  # what can be said in several ways, or only in words of its own
    "small": "small|tiny|little", "medium": "medium-sized", "large": "large|big",
    "plain": "plain|solid", "dotted": "dotted|spotted", "checkered": "checkered|checked", "purple": "purple|violet",
    "circle": "circle|disc", "ring": "ring|hoop", "cross": "cross|plus sign",
    "diamond": "diamond|rhombus", "crescent": "crescent|moon",
    "left of": "to the left of|left of", "right of": "to the right of|right of",
    "above": "above|over", "below": "below|under|beneath", "nearby": "next to|beside|close to",
    "in front": "in front of|partly covering", "behind": "behind|partly hidden by",
    "top left": "in the top left corner|in the upper left",
    "top right": "in the top right corner|in the upper right",
    "bottom left": "in the bottom left corner|in the lower left",
    "bottom right": "in the bottom right corner|in the lower right",
    "top": "at the top|near the top", "bottom": "at the bottom|near the bottom",
    "left": "on the left|on the left side", "right": "on the right|on the right side",
    "middle": "in the middle|in the centre",
    "grey": "on a plain grey background|on plain grey", "gradient": "on a fading background|on a smooth gradient",
    "noise": "on a noisy background|on a grainy grey background", "bricks": "on a brick wall|against a wall of bricks",
    "stripes": "on a striped background|against wide stripes", "grid": "on a grid|on squared paper",
    "night": "in the night sky|against a dark night sky",
}  # fmt: skip


def write_captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Five different captions of a scene."""
    writer = _Writer(scene, rng)
    captions: list[str] = []
    while len(captions) < CAPTIONS_PER_IMAGE:
        text = writer.sentence()
        if SHORTEST <= len(text.split()) <= LONGEST:
            text = text[0].upper() + text[1:] if writer.chance(0.6) else text
            text = text + "." if writer.chance(0.5) else text
            captions += [text] if text not in captions else []
    return captions


class _Writer:
    """Writes sentences about one scene. A pattern is a method that returns a sentence, or "" where it does not fit."""

    def __init__(self, scene: Scene, rng: np.random.Generator):
        self.scene, self.overlaps, self.rng = scene, overlaps(scene), rng

    def sentence(self) -> str:
        pattern = self.choose(("related", "related", "with_it", "listed", "placed", "counted", "counted_all"))
        things = [self.scene.things[i] for i in self.rng.permutation(len(self.scene.things))]
        return getattr(self, pattern)(*things)

    def related(self, a: Thing, b: Thing, c: Thing, *_: Thing) -> str:
        """A big red star is above a ring and there is a blue cross at the top."""
        if not (relation := self.relation(a, b)):
            return ""
        text = f"{self.say('{}|{} is|{} sits|there is {}').format(self.name(a))} {relation} {self.name(b)}"
        if self.chance(0.35):
            return f"{text} and there is {self.name(c)} {self.where(c)}".rstrip()
        return self.with_background(text)

    def with_it(self, a: Thing, b: Thing, *_: Thing) -> str:
        """A picture of a ring with a small dotted heart next to it."""
        if not (relation := self.relation(b, a)):
            return ""
        opening = self.say("||a picture of |a drawing of |there is ")
        return self.with_background(f"{opening}{self.name(a)} with {self.name(b)} {relation} it")

    def listed(self, *things: Thing) -> str:
        """A star, a green ring and a striped heart on a brick wall."""
        names = [self.name(thing) for thing in things[: self.rng.integers(2, 4)]]
        opening = self.say("||a picture with |there are |we see ")
        return self.with_background(f"{opening}{', '.join(names[:-1])} and {names[-1]}")

    def placed(self, a: Thing, b: Thing, *_: Thing) -> str:
        """A pink star is in the top left corner and a ring is at the bottom."""
        if not self.where(a):
            return ""
        verb = self.say("| is")
        text = f"{self.name(a)}{verb} {self.where(a)}"
        if self.where(b):
            text += f"{self.say(' and|,')} {self.name(b)}{verb} {self.where(b)}"
        return self.with_background(text)

    def counted(self, a: Thing, *others: Thing) -> str:
        """There are two stars and a small green ring on a grid."""
        attributes = self.say("shape|shape|colour|texture|colour shape").split()
        described = {name: getattr(a, name) for name in attributes}
        rest = [other for other in others if any(getattr(other, name) != described[name] for name in attributes)]
        count = 1 + len(others) - len(rest)
        if count < 2 or not rest:
            return ""
        opening = self.say("|there are |a picture of |we see ")
        text = f"{opening}{self.phrase(described, count)} and {self.name(rest[0])}"
        if self.where(rest[0]) and self.chance(0.5):
            return f"{text} {self.where(rest[0])}"
        return self.with_background(text)

    def counted_all(self, a: Thing, *others: Thing) -> str:
        """Five shapes in the night sky, one of them a purple moon."""
        total, opening = self.phrase({}, 1 + len(others)), self.say("|there are ")
        text = f"{opening}{total} {self.say(self.scene.background)}, one of them {self.name(a)}"
        return f"{text} {self.where(a)}".rstrip() if self.chance(0.5) else text

    def name(self, thing: Thing) -> str:
        """A noun phrase for one thing, with some of its attributes: at least its colour or its shape."""
        while True:
            values = {name: getattr(thing, name) for name in ("size", "texture", "colour", "shape")}
            chances = {name: MENTION_CHANCES.get(value, MENTION_CHANCES[name]) for name, value in values.items()}
            described = {name: values[name] for name, chance in chances.items() if self.chance(chance)}
            if "colour" in described or "shape" in described:
                return self.phrase(described)

    def phrase(self, described: dict[str, str], count: int = 1) -> str:
        """Words for `count` things of the given attributes: "a tiny striped orange star", "two striped stars"."""
        words = [self.say(described[name]) for name in ("size", "texture", "colour") if name in described]
        words.append(self.say(described.get("shape", "shape|object|thing")))
        if count == 1:
            return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])
        return " ".join([NUMBERS[count], *words]) + ("es" if words[-1].endswith("s") else "s")

    def relation(self, a: Thing, b: Thing) -> str:
        """Words for something true of `a` seen from `b`; empty where nothing is."""
        true = relations(a, b)
        true += 2 * ["in front"] if (a, b) in self.overlaps else []
        true += 2 * ["behind"] if (b, a) in self.overlaps else []
        return self.say(self.choose(true)) if true else ""

    def where(self, thing: Thing) -> str:
        return self.say(place(thing))

    def with_background(self, text: str) -> str:
        return f"{text} {self.say(self.scene.background)}" if self.chance(0.35) else text

    def say(self, alternatives: str) -> str:
        """One of several words or phrases, separated by "|", or of those that WORDS has for what is given."""
        return self.choose(WORDS.get(alternatives, alternatives).split("|"))

    def choose(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability
