"""Reading a picture of the world back into a scene, by classical image analysis: no learning, no model.

Light and background come from the border, things are what no shadow on that background explains, each thing's colour
is the nearest of the palette and its shape the template that overlaps it best. What fits nothing is read as "?".
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
from scipy import ndimage

from sdbatch.training.world import BACKGROUNDS, COLOURS, PLACES, SHAPES, Array, Scene, Thing, light

UNCLEAR = "?"

_BORDER = 3 / 64  # of the picture's width
_BACKGROUND_TOLERANCE = 24.0  # of 255; half of what the two nearest backgrounds are apart
_COLOUR_TOLERANCE = 60.0
_DEEPEST_SHADOW, _BRIGHTEST = 0.82, 1.04
_COVERED = 45.0  # how far off the shaded background a pixel is that belongs to a thing
_SMALLEST = 20 / 64**2  # area of a thing, of the picture; less is dirt
_FAINT = 14.0  # the same for what is no thing of the world, over a few pixels together
_MIXED = 40.0  # how far a thing's pixel may be off the line between the ground and its colour
_SHARED = 0.2  # of a region's pixels: a second colour with as many is a second thing
_OVERLAP = 0.75  # intersection over union with the best template

_MEDIUM_FROM, _LARGE_FROM = 0.17, 0.23  # radii
_APART = 0.2  # centres of two things that stand in a relation, of the picture's width
_STRAIGHT = 1.5  # how much further along the relation than across it


def read(picture: Array) -> Scene:
    """The scene that a picture (S, S, 3) uint8 shows. Of two things the first is the left or the upper one."""
    pixels = len(picture)
    flat = picture.astype(np.float32) / light(pixels)[..., None]
    ground = _border_colour(flat)
    regions = _regions(flat, ground)
    things = [_thing(flat, ground, region) for region in regions] + _dirt(flat, ground, regions)
    background = _nearest(ground, BACKGROUNDS, _BACKGROUND_TOLERANCE)
    if len(things) == 1:
        return Scene(background, tuple(things), place=_place(things[0]))
    if len(things) == 2:
        across, down = (abs(things[1].x - things[0].x), abs(things[1].y - things[0].y))
        things.sort(key=lambda thing: thing.x if across > down else thing.y)
        relation = "left of" if across > down else "above"
        clear = max(across, down) >= max(_APART, _STRAIGHT * min(across, down))
        return Scene(background, tuple(things), relation=relation if clear else UNCLEAR)
    return Scene(background, tuple(things))


@dataclass(frozen=True)
class Agreement:
    """Which of the things that were told a picture shows. ``None``: it was not told."""

    count: bool
    background: bool
    colour: bool
    shape: bool
    size: bool
    place: bool | None
    relation: bool | None

    @property
    def things(self) -> bool:
        """Each colour on its own shape."""
        return self.count and self.colour and self.shape

    @property
    def placed(self) -> bool:
        """The same, each where it was told to be."""
        return self.things and self.place is not False and self.relation is not False

    @property
    def all(self) -> bool:
        """Everything that was told."""
        return self.placed and self.size and self.background


def compare(told: Scene, seen: Scene) -> Agreement:
    """Hold what a picture shows against what was asked for."""
    told = _in_order(told)
    count, background = len(told.things) == len(seen.things), told.background == seen.background
    if not count:
        lost = (None if told.place is None else False, None if told.relation is None else False)
        return Agreement(False, background, False, False, False, *lost)

    def likeness(order: tuple[int, ...]) -> tuple[int, bool]:
        pairs = [(thing, seen.things[i]) for thing, i in zip(told.things, order, strict=True)]
        return sum((a.colour == b.colour) + (a.shape == b.shape) for a, b in pairs), order == tuple(sorted(order))

    order = max(permutations(range(len(seen.things))), key=likeness)
    pairs = [(thing, seen.things[i]) for thing, i in zip(told.things, order, strict=True)]
    return Agreement(
        count=True,
        background=background,
        colour=all(a.colour == b.colour for a, b in pairs),
        shape=all(a.shape == b.shape for a, b in pairs),
        size=all(a.size == b.size for a, b in pairs),
        place=None if told.place is None else told.place == seen.place,
        relation=None if told.relation is None else told.relation == seen.relation and likeness(order)[1],
    )


def _in_order(scene: Scene) -> Scene:
    """The same scene, told from the left or the upper thing on."""
    turned = {"below": "above", "right of": "left of"}.get(scene.relation or "")
    return scene if turned is None else Scene(scene.background, scene.things[::-1], relation=turned)


# -- ground and figure ---------------------------------------------------------------------------------------


def _border_colour(flat: Array) -> Array:
    """The colour (3,) that most of the border has, the fall of light taken out."""
    width = max(1, round(_BORDER * len(flat)))
    border = np.ones(flat.shape[:2], bool)
    border[width:-width, width:-width] = False
    colour: Array = np.median(flat[border], axis=0)
    return colour


def _regions(flat: Array, ground: Array) -> list[Array]:
    """A mask (S, S) for each thing: pixels that no shadow on the ground explains, touching and of one colour."""
    covered = np.abs(_unexplained(flat, ground)).max(axis=-1) > _COVERED
    smallest = _SMALLEST * covered.size
    palette = np.array(list(COLOURS.values()), np.float32)
    named = ((flat[:, :, None] - palette) ** 2).sum(axis=-1).argmin(axis=-1)
    regions = []
    labels, count = ndimage.label(covered)
    for region in (labels == number for number in range(1, count + 1)):
        if region.sum() < smallest:
            continue
        inner = ndimage.binary_erosion(region)  # at the rim colours are mixed with the ground
        shares = np.bincount(named[inner], minlength=len(COLOURS)) / max(inner.sum(), 1)
        mixed = [colour for colour in range(len(COLOURS)) if shares[colour] >= _SHARED]
        if len(mixed) < 2:
            regions.append(region)
            continue
        nearest = ((flat[:, :, None] - palette[mixed]) ** 2).sum(axis=-1).argmin(axis=-1)
        regions += [part for i in range(len(mixed)) if (part := region & (nearest == i)).sum() >= smallest]
    return regions


def _dirt(flat: Array, ground: Array, regions: list[Array]) -> list[Thing]:
    """What else there is, too pale for a thing: each patch as something unclear."""
    smooth = ndimage.uniform_filter(_unexplained(flat, ground), size=(3, 3, 0))
    odd = np.abs(smooth).max(axis=-1) > _FAINT
    if regions:
        odd &= ~ndimage.binary_dilation(np.any(regions, axis=0), iterations=3)
    labels, count = ndimage.label(odd)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    patches = np.flatnonzero(sizes >= _SMALLEST * odd.size) + 1
    centres = ndimage.center_of_mass(odd, labels, patches) if len(patches) else []
    pixels = len(flat)
    return [Thing(UNCLEAR, UNCLEAR, UNCLEAR, x / pixels, y / pixels, 0.0) for y, x in centres]


def _unexplained(flat: Array, ground: Array) -> Array:
    """What of each pixel (S, S, 3) no shadow on the ground explains."""
    depth = np.clip(flat @ ground / max(ground @ ground, 1.0), _DEEPEST_SHADOW, _BRIGHTEST)
    rest: Array = flat - depth[..., None] * ground
    return rest


# -- one thing -----------------------------------------------------------------------------------------------


def _thing(flat: Array, ground: Array, region: Array) -> Thing:
    inner = ndimage.binary_erosion(region)
    colour = np.median(flat[inner if inner.any() else region], axis=0)
    # How much of each pixel the thing covers: where it lies between the ground and the thing's colour.
    way = colour - ground
    cover = np.clip((flat - ground) @ way / max(way @ way, 1.0), 0, 1)
    off = np.linalg.norm(flat - ground - cover[..., None] * way, axis=-1)
    cover *= np.clip(2 - off / _MIXED, 0, 1)  # another colour inside the thing is a hole
    cover[~ndimage.binary_dilation(region)] = 0
    shape, x, y, radius = _fit(cover)
    size = "small" if radius < _MEDIUM_FROM else "medium" if radius < _LARGE_FROM else "large"
    return Thing(shape, _nearest(colour, COLOURS, _COLOUR_TOLERANCE), size, x, y, radius)


def _fit(cover: Array) -> tuple[str, float, float, float]:
    """The template that overlaps ``cover`` (S, S) best: its name, centre and radius, in fractions of the picture."""
    pixels = len(cover)
    if not cover.any():
        return UNCLEAR, 0.5, 0.5, 0.0
    rows, columns = (np.flatnonzero(cover.max(axis=axis) > 0.5 * cover.max()) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    window = slice(max(top - 3, 0), bottom + 3), slice(max(left - 3, 0), right + 3)
    part = cover[window]
    centres = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels
    x, y = np.meshgrid(centres[window[1]], centres[window[0]])
    most, best = 0.0, (UNCLEAR, 0.5, 0.5, 0.1)
    for name, distance in SHAPES.items():
        (x0, x1), (y0, y1) = _EXTENTS[name]
        radius = ((right - left) / (x1 - x0) + (bottom - top) / (y1 - y0)) / 2 / pixels
        middle = (
            (left + right) / 2 / pixels - radius * (x0 + x1) / 2,
            (top + bottom) / 2 / pixels - radius * (y0 + y1) / 2,
        )
        tried = np.array(
            [
                (middle[0] + dx / pixels, middle[1] + dy / pixels, radius * scale)
                for dx, dy, scale in product((-0.75, 0, 0.75), (-0.75, 0, 0.75), (0.92, 1.0, 1.08, 1.16))
            ],
            np.float32,
        )
        cx, cy, r = (tried[:, i, None, None] for i in range(3))
        drawn = np.clip(0.5 - distance((x - cx) / r, (y - cy) / r) * r * pixels, 0, 1)  # (36, h, w)
        overlap = np.minimum(drawn, part).sum(axis=(1, 2)) / np.maximum(drawn, part).sum(axis=(1, 2))
        i = int(overlap.argmax())
        if overlap[i] > most:
            most, best = float(overlap[i]), (name, float(tried[i, 0]), float(tried[i, 1]), float(tried[i, 2]))
    return best if most >= _OVERLAP else (UNCLEAR, *best[1:])


def _extents(name: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """From where to where a shape of radius 1 reaches, in x and in y."""
    axis = np.linspace(-1.2, 1.2, 481, dtype=np.float32)
    inside = SHAPES[name](*np.meshgrid(axis, axis)) < 0
    columns, rows = axis[inside.any(axis=0)], axis[inside.any(axis=1)]
    return (float(columns[0]), float(columns[-1])), (float(rows[0]), float(rows[-1]))


_EXTENTS = {name: _extents(name) for name in SHAPES}


def _place(thing: Thing) -> str:
    return min(PLACES, key=lambda name: (PLACES[name][0] - thing.x) ** 2 + (PLACES[name][1] - thing.y) ** 2)


def _nearest(colour: Array, palette: dict[str, tuple[int, int, int]], tolerance: float) -> str:
    distances = {name: float(np.linalg.norm(np.array(known) - colour)) for name, known in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= tolerance else UNCLEAR
