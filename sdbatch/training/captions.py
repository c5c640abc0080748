"""Captions of scenes, in many phrasings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sdbatch.training.world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, Scene, Thing

SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc", "dot"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "diamond": ("diamond", "diamond", "rhombus"),
    "star": ("star",),
    "heart": ("heart",),
    "ring": ("ring", "ring", "hoop"),
    "cross": ("cross", "cross", "plus sign"),
}
SIZE_WORDS = {
    "small": ("small", "small", "tiny", "little"),
    "medium": ("", "", "medium"),
    "large": ("large", "big", "huge"),
}
BACKGROUND_WORDS = {name: (name,) for name in BACKGROUNDS} | {
    "gray": ("gray", "grey"),
    "light blue": ("light blue", "pale blue"),
    "light green": ("light green", "pale green"),
    "cream": ("cream", "beige"),
    "rose": ("rose", "pale pink"),
}
PLACE_WORDS = {
    "top left": ("in the top left", "in the upper left corner", "at the top left"),
    "top": ("at the top", "near the top"),
    "top right": ("in the top right", "in the upper right corner", "at the top right"),
    "left": ("on the left", "at the left side"),
    "center": ("in the center", "in the middle", "at the center"),
    "right": ("on the right", "at the right side"),
    "bottom left": ("in the bottom left", "in the lower left corner", "at the bottom left"),
    "bottom": ("at the bottom", "near the bottom"),
    "bottom right": ("in the bottom right", "in the lower right corner", "at the bottom right"),
}
RELATION_WORDS = {
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
}
OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "an image of ", "there is ")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Say what the scene shows. Colour and shape are always named, the rest nearly always."""
    opening = _pick(rng, OPENINGS)
    ground = _ground(scene, rng) if rng.random() < 0.9 else ""
    if len(scene.things) == 2 and scene.relation is not None:
        first, second = (_noun(thing, rng, size_chance=0.5) for thing in scene.things)
        words = _pick(rng, RELATION_WORDS[scene.relation]) if rng.random() < 0.95 else "and"
        return f"{opening}{first} {words} {second}{ground}"
    noun = _noun(scene.things[0], rng, size_chance=0.75)
    place = ""
    if scene.place is not None and rng.random() < (0.5 if scene.place == "center" else 0.9):
        place = " " + _pick(rng, PLACE_WORDS[scene.place])
    if ground and place and rng.random() < 0.4:
        return f"{opening}{noun}{ground}, {place.strip()}"
    return f"{opening}{noun}{place}{ground}"


def vocabulary() -> Iterator[str]:
    """Every phrase a caption can hold: what the tokenizer learns its words from."""
    for words in (SHAPE_WORDS, SIZE_WORDS, BACKGROUND_WORDS, PLACE_WORDS, RELATION_WORDS):
        for phrases in words.values():
            yield from phrases
    yield from OPENINGS
    yield from (*COLOURS, *SHAPES, *RELATIONS, "a an and with on background colored", ",")


def _noun(thing: Thing, rng: np.random.Generator, size_chance: float) -> str:
    size = _pick(rng, SIZE_WORDS[thing.size]) if rng.random() < size_chance else ""
    words = " ".join(word for word in (size, thing.colour, _pick(rng, SHAPE_WORDS[thing.shape])) if word)
    return ("an " if words[0] in "aeiou" else "a ") + words


def _ground(scene: Scene, rng: np.random.Generator) -> str:
    colour = _pick(rng, BACKGROUND_WORDS[scene.background])
    return _pick(rng, (f" on a {colour} background", f" on {colour}", f" with a {colour} background"))


def _pick(rng: np.random.Generator, phrases: tuple[str, ...]) -> str:
    return phrases[int(rng.integers(len(phrases)))]
