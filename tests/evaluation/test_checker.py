"""Pictures of the world read back: drawn truth is read rightly, anything else without a stumble."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sdbatch.evaluation.prompts import CELLS
from sdbatch.training.checker import UNCLEAR, Agreement, compare, read
from sdbatch.training.world import BACKGROUNDS, COLOURS, Array, Scene, Thing, draw, random_scene

SCENES = 100
ATTRIBUTES = ("count", "background", "colour", "shape", "size", "place", "relation", "things", "placed", "all")
PALETTE = np.array([*COLOURS.values(), *BACKGROUNDS.values()], np.uint8)


def thing(shape: str, colour: str, x: float, y: float, radius: float = 0.15) -> Thing:
    return Thing(shape, colour, "small" if radius < 0.17 else "large", x, y, radius)


def shown(scene: Scene) -> Scene:
    return read(draw(scene)[0])


BESIDE = Scene("white", (thing("circle", "red", 0.25, 0.5), thing("square", "blue", 0.75, 0.5)), relation="left of")


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_drawn_is_read(cell: str) -> None:
    things, novel = CELLS[cell]
    rng = np.random.default_rng([1, things, novel])
    scenes = [random_scene(rng, things=things, novel=novel) for _ in range(SCENES)]
    seen = [shown(scene) for scene in scenes]
    agreements = [compare(told, found) for told, found in zip(scenes, seen, strict=True)]
    for attribute in ATTRIBUTES:
        told = [right for agreement in agreements if (right := getattr(agreement, attribute)) is not None]
        assert sum(told) >= 0.99 * len(told), attribute
    shifted = sum(compare(told, found).placed for told, found in zip(scenes[1:], seen, strict=False))
    assert shifted <= 0.03 * SCENES


@pytest.mark.parametrize("pixels", [32, 64, 128])
def test_pictures_of_other_sizes_are_read(pixels: int) -> None:
    assert compare(BESIDE, read(draw(BESIDE, pixels)[0])).all


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_picture_of_nothing_holds_no_thing(level: int) -> None:
    seen = read(np.full((64, 64, 3), level, np.uint8))
    assert seen.things == ()
    assert seen.background == ("white" if level == 255 else UNCLEAR)


def noise(seed: int) -> list[Array]:
    """Pictures of no sense: grains, tiles, stripes, dots of the world's own colours on a plain ground."""
    rng = np.random.default_rng(seed)
    dots = np.full((64, 64, 3), PALETTE[rng.integers(len(PALETTE))])
    dots[8:56, 8:56] = PALETTE[rng.integers(len(PALETTE), size=(48, 48))]
    return [
        rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        np.clip(rng.normal(128, 60, (64, 64, 3)), 0, 255).astype(np.uint8),
        PALETTE[rng.integers(len(PALETTE), size=(8, 8))].repeat(8, axis=0).repeat(8, axis=1),
        PALETTE[rng.integers(len(PALETTE), size=(1, 64))].repeat(64, axis=0),
        dots,
    ]


@pytest.mark.parametrize("seed", range(10))
def test_noise_is_read_as_something_that_nobody_told(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for picture in noise(seed):
        seen = read(picture)
        assert not any(compare(random_scene(rng), seen).all for _ in range(10))


def test_two_things_of_one_colour_are_two() -> None:
    apart = replace(BESIDE, things=tuple(replace(each, colour="red") for each in BESIDE.things))
    assert compare(apart, shown(apart)).all


def test_two_things_of_one_colour_that_touch_are_no_shape() -> None:
    touching = Scene("white", (thing("circle", "red", 0.4, 0.5), thing("square", "red", 0.6, 0.5)))
    assert [each.shape for each in shown(touching).things] == [UNCLEAR]


def test_two_things_of_two_colours_that_touch_are_two() -> None:
    touching = Scene(
        "white", (thing("square", "red", 0.36, 0.5), thing("square", "blue", 0.6, 0.5)), relation="left of"
    )
    assert compare(touching, shown(touching)).all


@pytest.mark.parametrize(("x", "y"), [(0.0, 0.5), (0.5, 1.0), (1.0, 1.0), (0.03, 0.03)])
def test_a_thing_that_the_border_cuts_keeps_its_colour(x: float, y: float) -> None:
    seen = shown(Scene("white", (thing("heart", "purple", x, y, 0.25),)))
    assert [each.colour for each in seen.things] == ["purple"]


def test_a_thing_that_fills_the_picture_is_ground() -> None:
    assert shown(Scene("white", (thing("square", "blue", 0.5, 0.5, 0.9),))).background == UNCLEAR


def test_three_things_are_three() -> None:
    three = Scene("gray", (*BESIDE.things, thing("star", "green", 0.5, 0.85, 0.13)))
    seen = shown(three)
    assert len(seen.things) == 3
    assert compare(BESIDE, seen) == Agreement(
        count=False, background=False, colour=False, shape=False, size=False, place=None, relation=False
    )


@pytest.mark.parametrize("centres", [((0.5, 0.5), (0.5, 0.52)), ((0.3, 0.3), (0.68, 0.7))])
def test_things_that_lie_in_no_clear_relation_are_in_none(centres: tuple[tuple[float, float], ...]) -> None:
    (ax, ay), (bx, by) = centres
    scene = Scene("white", (thing("ring", "red", ax, ay, 0.26), thing("circle", "blue", bx, by, 0.13)))
    assert shown(scene).relation == UNCLEAR


@pytest.mark.parametrize("colour", [(170, 170, 170), (244, 210, 220)])
def test_a_pale_patch_is_something(colour: tuple[int, int, int]) -> None:
    picture = draw(replace(BESIDE, background="white"))[0]
    picture[2:16, 25:40] = colour
    assert len(read(picture).things) == 3


def test_a_thing_with_a_hole_of_another_colour_is_no_such_shape() -> None:
    picture = draw(Scene("white", (thing("circle", "red", 0.5, 0.5, 0.27),)))[0]
    picture[26:38, 26:38] = (28, 28, 32)
    seen = read(picture)
    assert [each.shape for each in seen.things] != ["circle"]


# -- compare -------------------------------------------------------------------------------------------------


def test_the_same_is_right_in_all_that_was_told() -> None:
    same = compare(BESIDE, shown(BESIDE))
    assert all(getattr(same, name) for name in ATTRIBUTES if name != "place")
    assert same.place is None


def test_swapped_colours_are_neither_colour_nor_things() -> None:
    first, second = BESIDE.things
    swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
    found = compare(BESIDE, shown(replace(BESIDE, things=swapped)))
    assert found.count
    assert not (found.colour and found.shape)
    assert not found.things
    assert not found.all


def test_exchanged_things_are_right_but_for_their_relation() -> None:
    first, second = BESIDE.things
    exchanged = replace(BESIDE, things=(replace(second, x=first.x), replace(first, x=second.x)))
    found = compare(BESIDE, shown(exchanged))
    assert found.things
    assert found.relation is False
    assert not found.all


def test_another_axis_is_another_relation() -> None:
    first, second = BESIDE.things
    upright = Scene("white", (replace(first, x=0.5, y=0.25), replace(second, x=0.5, y=0.75)), relation="above")
    found = compare(BESIDE, shown(upright))
    assert found.things
    assert found.relation is False


@pytest.mark.parametrize(("relation", "inverse"), [("left of", "right of"), ("above", "below")])
def test_a_relation_told_from_the_other_end_is_the_same(relation: str, inverse: str) -> None:
    upright = relation == "above"
    places = [(0.5, 0.25), (0.5, 0.75)] if upright else [(0.25, 0.5), (0.75, 0.5)]
    things = tuple(replace(each, x=x, y=y) for each, (x, y) in zip(BESIDE.things, places, strict=True))
    told = Scene("white", things[::-1], relation=inverse)
    assert compare(told, shown(Scene("white", things, relation=relation))).all


def test_a_missing_thing_is_wrong_in_all_but_the_background() -> None:
    found = compare(BESIDE, shown(replace(BESIDE, things=BESIDE.things[:1])))
    assert found.background
    assert not any(getattr(found, name) for name in ATTRIBUTES if name != "background")


def test_another_place_size_and_background_are_told_apart() -> None:
    told = Scene("cream", (thing("ring", "green", 0.3, 0.3, 0.15),), place="top left")
    seen = shown(Scene("rose", (thing("ring", "green", 0.7, 0.7, 0.26),)))
    found = compare(told, seen)
    assert found.things
    assert (found.background, found.size, found.place, found.all) == (False, False, False, False)
