"""The drawn world: what a scene looks like, what is said of it, and what training never shows."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from sdbatch.training.architecture import MAX_TOKENS
from sdbatch.training.captions import caption, mistakes, vocabulary
from sdbatch.training.loop import draws
from sdbatch.training.tokens import learn_tokenizer
from sdbatch.training.world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, Scene, Thing, draw, random_scene


def thing(shape: str = "circle", colour: str = "red") -> Thing:
    return Thing(shape, colour, "large", 0.5, 0.5, 0.26)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_in_its_colour_on_its_background(shape: str) -> None:
    picture, cover = draw(Scene("light blue", (thing(shape),), place="center"))
    assert picture.shape == (64, 64, 3)
    assert 0.08 < cover.mean() < 0.26
    inside = picture[cover > 0.99].mean(axis=0)
    assert np.abs(inside - COLOURS["red"]).max() < 25
    assert np.abs(picture[:3, :3].mean(axis=(0, 1)) - BACKGROUNDS["light blue"]).max() < 10


def test_captions_name_colour_and_shape_and_every_word_is_one_token() -> None:
    tokenizer = learn_tokenizer(vocabulary(), MAX_TOKENS)
    rng = draws(0, "captions")
    for _ in range(300):
        scene = random_scene(rng)
        text = caption(scene, rng)
        assert all(thing.colour in text for thing in scene.things)
        words = text.replace(",", " ,").split()
        assert len(tokenizer.encode([text])[0]) == len(words) <= MAX_TOKENS - 2


def test_complete_captions_of_different_scenes_differ() -> None:
    rng = draws(1, "captions")
    for number in range(100):
        scene = random_scene(rng)
        told = [caption(one, draws(0, number), complete=True) for one in (scene, *mistakes(scene))]
        assert len(set(told)) == len(told)


def test_mistakes_change_one_thing_that_is_told() -> None:
    lone = random_scene(draws(0, "m"), 1)
    # Backgrounds, places, colours, shapes, sizes; the one colour and the one shape that would be held out are left out.
    assert len(mistakes(lone)) == 5 + 8 + 6 + 6 + 2
    assert not any(other.novel for number in range(50) for other in mistakes(random_scene(draws(number, "m"))))
    pair = Scene("white", (thing("star", "red"), thing("ring", "blue")), relation="above")
    swapped = mistakes(pair)[-2]
    assert [(one.shape, one.colour) for one in swapped.things] == [("star", "blue"), ("ring", "red")]


def test_an_eighth_of_the_pairs_is_held_out_each_shape_and_colour_once() -> None:
    held = [
        (shape, colour)
        for shape, colour in product(SHAPES, COLOURS)
        if Scene("white", (thing(shape, colour),), place="center").novel
    ]
    assert len(held) == len({shape for shape, _ in held}) == len({colour for _, colour in held}) == 8


def test_a_relation_is_held_out_whichever_way_it_is_told() -> None:
    turned = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
    held = 0
    for a, b, relation in product(SHAPES, SHAPES, RELATIONS):
        # Colours with which neither shape is held out.
        first, second = (next(thing(s, c) for c in COLOURS if not Scene("white", (thing(s, c),)).novel) for s in (a, b))
        scene = Scene("white", (first, second), relation=relation)
        assert scene.novel == Scene("white", (second, first), relation=turned[relation]).novel
        held += scene.novel
    assert held == 8 * 8 * 4 // 8


@pytest.mark.parametrize("things", [1, 2])
def test_scenes_are_novel_exactly_when_asked(things: int) -> None:
    rng = draws(5, "novel")
    for novel in (False, True):
        scenes = [random_scene(rng, things, novel=novel) for _ in range(100)]
        assert {scene.novel for scene in scenes} == {novel}
        assert {len(scene.things) for scene in scenes} == {things}


def test_scenes_come_from_their_seed_alone() -> None:
    assert [random_scene(draws(3, "s")) for _ in range(2)] == [random_scene(draws(3, "s")) for _ in range(2)]
    assert random_scene(draws(3, "s")) != random_scene(draws(4, "s"))
