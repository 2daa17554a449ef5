"""Scenes -> captions: sentences that people might write, each true of its picture.

A caption picks some of the things, mentions some of their attributes, and adds a relation, a place, a count or the
background. "A" claims that there is one; a number claims that there are exactly so many.
"""

from dataclasses import dataclass

import numpy as np

from lib.prepare.scenes.world import Scene, Thing, place, relations

CAPTIONS_PER_PICTURE = 5
ATTRIBUTES = ("size", "texture", "colour", "shape")
WORDS_PER_CAPTION = (6, 20)
MENTION_CHANCES = {  # attribute: chance that a description says it; a value of its own goes before the attribute's
    "colour": 0.85,
    "shape": 0.93,
    "texture": 0.55,
    "plain": 0.08,
    "size": 0.45,
    "medium": 0.1,
}
BACKGROUND_CHANCE = 0.35
CAPITAL_CHANCE = 0.6
PERIOD_CHANCE = 0.5

SYNONYMS = {
    "small": ("small", "tiny", "little"),
    "medium": ("medium-sized",),
    "large": ("large", "big"),
    "plain": ("plain", "solid"),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"),
    "purple": ("purple", "violet"),
}
NOUNS = {  # shape: (singular, plural) of each of its names
    "circle": (("circle", "circles"), ("disc", "discs")),
    "square": (("square", "squares"),),
    "triangle": (("triangle", "triangles"),),
    "star": (("star", "stars"),),
    "ring": (("ring", "rings"), ("hoop", "hoops")),
    "cross": (("cross", "crosses"), ("plus sign", "plus signs")),
    "diamond": (("diamond", "diamonds"), ("rhombus", "rhombuses")),
    "hexagon": (("hexagon", "hexagons"),),
    "heart": (("heart", "hearts"),),
    "crescent": (("crescent", "crescents"), ("moon", "moons")),
    None: (("shape", "shapes"), ("object", "objects"), ("thing", "things")),
}
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
    "nearby": ("next to", "beside", "close to"),
    "front": ("in front of", "partly covering"),
    "behind": ("behind", "partly hidden by"),
}
PLACES = {
    "top left": ("in the top left corner", "in the upper left"),
    "top right": ("in the top right corner", "in the upper right"),
    "bottom left": ("in the bottom left corner", "in the lower left"),
    "bottom right": ("in the bottom right corner", "in the lower right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "middle": ("in the middle", "in the centre"),
}
BACKDROPS = {
    "plain": ("on a plain grey background", "on plain grey"),
    "gradient": ("on a fading background", "on a smooth gradient"),
    "noisy": ("on a noisy background", "on a grainy grey background"),
    "brick": ("on a brick wall", "against a wall of bricks"),
    "striped": ("on a striped background", "against wide stripes"),
    "grid": ("on a grid", "on squared paper"),
    "night": ("in the night sky", "against a dark night sky"),
}


@dataclass(frozen=True)
class Description:
    """Some attributes of a thing; None is an attribute that is not mentioned."""

    size: str | None = None
    texture: str | None = None
    colour: str | None = None
    shape: str | None = None

    def fits(self, thing: Thing) -> bool:
        return all(value in (None, getattr(thing, name)) for name, value in vars(self).items())


def write_captions(scene: Scene, overlaps: set[tuple[int, int]], rng: np.random.Generator) -> list[str]:
    """Five different captions of a scene. `overlaps`: pairs (front, back) of indices of its things."""
    writer = _Writer(scene, overlaps, rng)
    captions: list[str] = []
    while len(captions) < CAPTIONS_PER_PICTURE:
        caption = writer.caption()
        if caption not in captions:
            captions.append(caption)
    return captions


class _Writer:
    """Writes captions of one scene. A pattern is a method that returns a sentence, or None where it does not apply."""

    def __init__(self, scene: Scene, overlaps: set[tuple[int, int]], rng: np.random.Generator):
        self.scene, self.overlaps, self.rng = scene, overlaps, rng

    def caption(self) -> str:
        patterns = (self.related, self.related, self.with_it, self.listed, self.placed, self.counted, self.counted_all)
        shortest, longest = WORDS_PER_CAPTION
        while True:
            text = self.choose(patterns)()
            if text and shortest <= len(text.split()) <= longest:
                return self.punctuate(text)

    # Patterns

    def related(self) -> str | None:
        """A big red star is above a ring, and a blue cross is at the top."""
        a, b, *others = self.things()
        relation = self.relation(a, b)
        if relation is None:
            return None
        subject, verb = self.choose((("{}", ""), ("{}", " is"), ("{}", " sits"), ("there is {}", "")))
        text = f"{subject.format(self.name(a))}{verb} {relation} {self.name(b)}"
        if others and self.chance(0.35):
            return f"{text} and there is {self.name(others[0])} {self.where(others[0])}".rstrip()
        return self.with_backdrop(text)

    def with_it(self) -> str | None:
        """A picture of a ring with a small dotted heart next to it."""
        a, b, *_ = self.things()
        relation = self.relation(b, a)
        if relation is None:
            return None
        opening = self.choose(("", "", "a picture of ", "a drawing of ", "there is "))
        return self.with_backdrop(f"{opening}{self.name(a)} with {self.name(b)} {relation} it")

    def listed(self) -> str:
        """A star, a green ring and a striped heart on a brick wall."""
        names = [self.name(thing) for thing in self.things()[: self.rng.integers(2, 4)]]
        opening = self.choose(("", "", "a picture with ", "there are ", "we see "))
        return self.with_backdrop(f"{opening}{', '.join(names[:-1])} and {names[-1]}")

    def placed(self) -> str | None:
        """A pink star is in the top left corner and a ring is at the bottom."""
        a, b, *_ = self.things()
        if not self.where(a):
            return None
        verb = self.choose(("", " is"))
        text = f"{self.name(a)}{verb} {self.where(a)}"
        if self.where(b):
            text += f"{self.choose((' and', ','))} {self.name(b)}{verb} {self.where(b)}"
        return self.with_backdrop(text)

    def counted(self) -> str | None:
        """There are two stars and a small green ring on a grid."""
        thing, *others = self.things()
        attributes = self.choose((("shape",), ("shape",), ("colour",), ("texture",), ("colour", "shape")))
        description = Description(**{name: getattr(thing, name) for name in attributes})
        count = sum(map(description.fits, self.scene.things))
        rest = [other for other in others if not description.fits(other)]
        if count < 2 or not rest:
            return None
        opening = self.choose(("", "there are ", "a picture of ", "we see "))
        text = f"{opening}{self.phrase(description, count)} and {self.name(rest[0])}"
        return f"{text} {self.where(rest[0])}" if self.where(rest[0]) and self.chance(0.5) else self.with_backdrop(text)

    def counted_all(self) -> str:
        """Five shapes in the night sky, one of them a purple moon."""
        thing, *_ = self.things()
        total = self.phrase(Description(), len(self.scene.things))
        text = f"{self.choose(('', 'there are '))}{total} {self.backdrop()}, one of them {self.name(thing)}"
        return f"{text} {self.where(thing)}".rstrip() if self.chance(0.5) else text

    # Their parts

    def things(self) -> list[Thing]:
        """The scene's things in random order."""
        return [self.scene.things[i] for i in self.rng.permutation(len(self.scene.things))]

    def name(self, thing: Thing) -> str:
        """A noun phrase for one thing, with some of its attributes: at least its colour or its shape."""
        while True:
            description = Description(
                **{name: getattr(thing, name) for name in ATTRIBUTES if self.mentions(thing, name)}
            )
            if description.colour or description.shape:
                return self.phrase(description)

    def mentions(self, thing: Thing, attribute: str) -> bool:
        return self.chance(MENTION_CHANCES.get(getattr(thing, attribute), MENTION_CHANCES[attribute]))

    def phrase(self, description: Description, count: int = 1) -> str:
        """E.g. "a tiny striped orange star" or, with a count, "two striped stars"."""
        adjectives = [description.size, description.texture, description.colour]
        words = [self.choose(SYNONYMS.get(word, (word,))) for word in adjectives if word]
        words.append(self.choose(NOUNS[description.shape])[count > 1])
        article = NUMBERS[count] if count > 1 else "an" if words[0][0] in "aeiou" else "a"
        return " ".join([article, *words])

    def relation(self, a: Thing, b: Thing) -> str | None:
        """Words for something true of `a` seen from `b`."""
        i, j = self.scene.things.index(a), self.scene.things.index(b)
        true = relations(a, b)
        true += ["front"] * 2 if (i, j) in self.overlaps else []
        true += ["behind"] * 2 if (j, i) in self.overlaps else []
        return self.choose(RELATIONS[self.choose(true)]) if true else None

    def where(self, thing: Thing) -> str:
        """Words for a thing's place in the picture; empty where nobody would say."""
        name = place(thing)
        return self.choose(PLACES[name]) if name else ""

    def backdrop(self) -> str:
        return self.choose(BACKDROPS[self.scene.background])

    def with_backdrop(self, text: str) -> str:
        return f"{text} {self.backdrop()}" if self.chance(BACKGROUND_CHANCE) else text

    def punctuate(self, text: str) -> str:
        text = text[0].upper() + text[1:] if self.chance(CAPITAL_CHANCE) else text
        return text + "." if self.chance(PERIOD_CHANCE) else text

    def choose(self, options):
        return options[self.rng.integers(len(options))]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability
