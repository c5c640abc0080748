"""The synthetic world of the built-in model: scenes of shapes, drawn by code.

A scene is data; :func:`draw` turns it into a picture, :mod:`~sdbatch.training.captions` into words.
Coordinates are fractions of the picture: x to the right, y down, (0.5, 0.5) the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

PIXELS = 64  # each way

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "orange": (250, 140, 20),
    "yellow": (244, 208, 20),
    "green": (36, 160, 62),
    "blue": (36, 86, 222),
    "purple": (130, 52, 190),
    "pink": (244, 104, 182),
    "black": (28, 28, 32),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (252, 252, 252),
    "gray": (196, 198, 202),
    "light blue": (184, 218, 250),
    "light green": (192, 240, 196),
    "cream": (252, 238, 190),
    "rose": (252, 206, 214),
}

SIZES: dict[str, tuple[float, float]] = {"small": (0.13, 0.16), "medium": (0.18, 0.22), "large": (0.24, 0.28)}

PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.3, 0.3),
    "top": (0.5, 0.3),
    "top right": (0.7, 0.3),
    "left": (0.3, 0.5),
    "center": (0.5, 0.5),
    "right": (0.7, 0.5),
    "bottom left": (0.3, 0.7),
    "bottom": (0.5, 0.7),
    "bottom right": (0.7, 0.7),
}

RELATIONS = ("above", "below", "left of", "right of")


@dataclass(frozen=True)
class Thing:
    """One object: its ``radius`` is half its extent."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One thing at a named ``place``, or two of which the first stands in ``relation`` to the second."""

    background: str
    things: tuple[Thing, ...]
    place: str | None = None
    relation: str | None = None

    @property
    def ordered(self) -> tuple[Thing, ...]:
        """The things from left to right or from top to bottom, however their relation is told."""
        return self.things if self.relation in {None, "above", "left of"} else self.things[::-1]

    @property
    def novel(self) -> bool:
        """Does it show what training never shows: a held-out colour of a shape, or a held-out relation of shapes?

        An eighth of the 64 (shape, colour) pairs is held out, each shape and each colour once, and an eighth of
        the relations. "A left of B" and "B right of A" are one picture, so they are held out together.
        """
        if any((3 * _index(SHAPES, thing.shape) + _index(COLOURS, thing.colour)) % 8 == 1 for thing in self.things):
            return True
        if self.relation is None:
            return False
        first, second = (_index(SHAPES, thing.shape) for thing in self.ordered)
        return (first + 3 * second + 4 * (self.relation in {"above", "below"})) % 8 == 5


# -- shapes: signed distance functions, negative inside, of coordinates in units of the radius -----------------


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 1.0


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.86


def _diamond(x: Array, y: Array) -> Array:
    return (np.abs(x) * 1.25 + np.abs(y) - 1.0) / 1.6


def _triangle(x: Array, y: Array) -> Array:
    return np.maximum(y - 0.75, np.abs(x) * 0.866 - y * 0.5 - 0.48)


def _star(x: Array, y: Array) -> Array:
    angle = np.mod(np.arctan2(x, -y) + np.pi / 5, 2 * np.pi / 5) - np.pi / 5
    radius = np.hypot(x, y)
    # The edge of each of ten half-points runs from the tip (radius 1) to the notch (radius 0.42).
    tip, notch = np.array([1.0, 0.0]), 0.45 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    edge = (notch - tip) / np.linalg.norm(notch - tip)
    px, py = radius * np.cos(angle) - tip[0], np.abs(radius * np.sin(angle)) - tip[1]
    return px * edge[1] - py * edge[0]


def _heart(x: Array, y: Array) -> Array:
    u, v = np.abs(x) * 1.12, -y * 1.12 + 0.18
    return (u**2 + (v - 0.75 * np.sqrt(u + 1e-6)) ** 2 - 0.98) / 2.0


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - 0.74) - 0.26


def _cross(x: Array, y: Array) -> Array:
    u, v = np.abs(x), np.abs(y)
    bar = 0.33
    return np.minimum(np.maximum(u - 0.98, v - bar), np.maximum(v - 0.98, u - bar))


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "cross": _cross,
}


def _index(names: Iterable[str], name: str) -> int:
    return list(names).index(name)


# -- drawing -----------------------------------------------------------------------------------------------


def light(pixels: int) -> Array:
    """The soft fall of light on the background from the upper left, (pixels, pixels) float32."""
    centres = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels
    x, y = np.meshgrid(centres, centres)
    return 1.0 - 0.03 * (x + y - 1.0)


def draw(scene: Scene, pixels: int = PIXELS) -> tuple[Array, Array]:
    """The picture (pixels, pixels, 3) uint8, and how much of each pixel a thing covers, float32 in [0, 1]."""
    centres = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels
    x, y = np.meshgrid(centres, centres)
    picture = np.array(BACKGROUNDS[scene.background], np.float32) * light(pixels)[..., None]
    covered = np.zeros((pixels, pixels), np.float32)
    for thing in scene.things:
        u, v = (x - thing.x) / thing.radius, (y - thing.y) / thing.radius
        soft = 1.0 / (thing.radius * pixels)  # one pixel, in units of the radius
        distance = SHAPES[thing.shape](u, v)
        shadow = np.clip(0.5 - SHAPES[thing.shape](u - 0.1, v - 0.14) / (8 * soft), 0, 1)
        picture *= 1.0 - 0.14 * shadow[..., None]
        cover = np.clip(0.5 - distance / soft, 0, 1)
        shade = 1.06 - 0.12 * np.clip((u + v) / 2 * 0.7 + 0.5, 0, 1)
        colour = np.array(COLOURS[thing.colour], np.float32) * shade[..., None]
        picture = picture * (1 - cover[..., None]) + colour * cover[..., None]
        covered = np.maximum(covered, cover)
    return np.clip(np.round(picture), 0, 255).astype(np.uint8), covered.astype(np.float32)


# -- chance ------------------------------------------------------------------------------------------------


def random_scene(rng: np.random.Generator, things: int | None = None, *, novel: bool = False) -> Scene:
    """A scene with one thing or two (None: two in five hold one), ``novel`` or of the kind that is trained on."""
    count = things or (1 if rng.random() < 0.4 else 2)
    while True:
        scene = _lone_thing(rng) if count == 1 else _pair(rng)
        if scene.novel == novel:
            return scene


def _lone_thing(rng: np.random.Generator) -> Scene:
    place, size = _pick(rng, list(PLACES)), _pick(rng, list(SIZES))
    x, y = PLACES[place]
    thing = _thing(rng, size, x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.02, 0.02), "")
    return Scene(_pick(rng, list(BACKGROUNDS)), (thing,), place=place)


def _pair(rng: np.random.Generator) -> Scene:
    relation = _pick(rng, list(RELATIONS))
    along, across = rng.uniform(0.235, 0.265), rng.uniform(-0.04, 0.04)
    sign = -1.0 if relation in {"above", "left of"} else 1.0
    things: list[Thing] = []
    for direction in (sign, -sign):
        shift = (across, direction * along) if relation in {"above", "below"} else (direction * along, across)
        size = _pick(rng, ["small", "medium"])
        taken = things[0].colour if things else ""
        things.append(_thing(rng, size, 0.5 + shift[0], 0.5 + shift[1], taken))
    return Scene(_pick(rng, list(BACKGROUNDS)), tuple(things), relation=relation)


def _thing(rng: np.random.Generator, size: str, x: float, y: float, taken: str) -> Thing:
    colour = _pick(rng, [name for name in COLOURS if name != taken])
    return Thing(_pick(rng, list(SHAPES)), colour, size, x, y, rng.uniform(*SIZES[size]))


def _pick(rng: np.random.Generator, names: list[str]) -> str:
    return names[int(rng.integers(len(names)))]
