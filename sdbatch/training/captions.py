"""Captions of scenes, in many phrasings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from sdbatch.training.world import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Scene, Thing

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


def caption(scene: Scene, rng: np.random.Generator, *, complete: bool = False) -> str:
    """Say what the scene shows. Colour and shape are always named, the rest nearly always, or always.

    ``rng`` is drawn from equally often for every scene of as many things.
    """
    opening = _pick(rng, OPENINGS)
    ground = _perhaps(rng, 0.9, complete, _ground(scene, rng))
    if len(scene.things) == 2 and scene.relation is not None:
        first, second = (_noun(thing, rng, 0.5, complete) for thing in scene.things)
        words = _perhaps(rng, 0.95, complete, _pick(rng, RELATION_WORDS[scene.relation])) or "and"
        return f"{opening}{first} {words} {second}{ground}"
    noun = _noun(scene.things[0], rng, 0.75, complete)
    place = ""
    if scene.place is not None:
        chance = 0.5 if scene.place == "center" else 0.9
        place = _perhaps(rng, chance, complete, " " + _pick(rng, PLACE_WORDS[scene.place]))
    before = rng.random() < 0.4
    if ground and place and before:
        return f"{opening}{noun}{ground}, {place.strip()}"
    return f"{opening}{noun}{place}{ground}"


def vocabulary() -> Iterator[str]:
    """Every phrase a caption can hold: what the tokenizer learns its words from."""
    for words in (SHAPE_WORDS, SIZE_WORDS, BACKGROUND_WORDS, PLACE_WORDS, RELATION_WORDS):
        for phrases in words.values():
            yield from phrases
    yield from OPENINGS
    yield from (*COLOURS, *SHAPES, *RELATIONS, "a an and with on background colored", ",")


def mistakes(scene: Scene) -> list[Scene]:
    """Scenes that a caption with one wrong word would describe; for pairs also those with colours or shapes
    exchanged. What the picture shows has not changed, only what is said of it.

    Nothing is said of a scene seen in training that would be true of one held out: its words would be learnt as
    always wrong. Of a held-out scene every mistake is made.
    """
    wrong = [replace(scene, background=name) for name in BACKGROUNDS if name != scene.background]
    if scene.place is not None:
        wrong += [replace(scene, place=name) for name in PLACES if name != scene.place]
    if scene.relation is not None:
        wrong += [replace(scene, relation=name) for name in RELATIONS if name != scene.relation]
    for i, thing in enumerate(scene.things):
        others: list[Thing] = [replace(thing, colour=name) for name in COLOURS if name != thing.colour]
        others += [replace(thing, shape=name) for name in SHAPES if name != thing.shape]
        if len(scene.things) == 1:
            others += [replace(thing, size=name) for name in SIZES if name != thing.size]
        wrong += [replace(scene, things=(*scene.things[:i], other, *scene.things[i + 1 :])) for other in others]
    if len(scene.things) == 2:
        a, b = scene.things
        if a.colour != b.colour:
            wrong.append(replace(scene, things=(replace(a, colour=b.colour), replace(b, colour=a.colour))))
        if a.shape != b.shape:
            wrong.append(replace(scene, things=(replace(a, shape=b.shape), replace(b, shape=a.shape))))
    return [other for other in wrong if scene.novel or not other.novel]


def _noun(thing: Thing, rng: np.random.Generator, size_chance: float, complete: bool) -> str:
    size = _perhaps(rng, size_chance, complete, _pick(rng, SIZE_WORDS[thing.size]))
    size = size or (thing.size if complete else "")
    words = " ".join(word for word in (size, thing.colour, _pick(rng, SHAPE_WORDS[thing.shape])) if word)
    return ("an " if words[0] in "aeiou" else "a ") + words


def _perhaps(rng: np.random.Generator, chance: float, always: bool, words: str) -> str:
    return words if rng.random() < chance or always else ""


def _ground(scene: Scene, rng: np.random.Generator) -> str:
    colour = _pick(rng, BACKGROUND_WORDS[scene.background])
    return _pick(rng, (f" on a {colour} background", f" on {colour}", f" with a {colour} background"))


def _pick(rng: np.random.Generator, phrases: tuple[str, ...]) -> str:
    return phrases[int(rng.integers(len(phrases)))]
