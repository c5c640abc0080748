"""What is measured of pictures, against tools that measure the same."""

from __future__ import annotations

from pathlib import Path

import imagehash
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdbatch.checks import duplicates, first_alike, load_measures
from sdbatch.checks.blank import contrast
from sdbatch.checks.perceptual_hash import distance, perceptual_hash
from sdbatch.diffusion.clip import CLIP
from sdbatch.spec import Checks

MODELS = Path(__file__).parents[2] / "sdbatch/models"
CLIP_SCORE = {"model": "builtin:shapes-clip"}


def pictures(count: int, height: int = 40, width: int = 56) -> np.ndarray:
    """Soft noise, as no two pictures are alike in it, with edges."""
    rng = np.random.default_rng(7)
    coarse = rng.integers(0, 256, (count, 5, 7, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((width, height))) for one in coarse])


@pytest.mark.parametrize("size", [(40, 56), (64, 64), (200, 90), (8, 8)])
def test_the_perceptual_hash_is_that_of_imagehash(size: tuple[int, int]) -> None:
    for pixels in pictures(8, *size):
        assert perceptual_hash(pixels) == str(imagehash.phash(Image.fromarray(pixels)))


def test_pictures_that_look_alike_have_near_hashes_and_others_have_not() -> None:
    one, other = pictures(2, 64, 64)
    small = np.asarray(Image.fromarray(one).resize((48, 48)))
    lighter = np.clip(one.astype(int) + 12, 0, 255).astype(np.uint8)
    assert max(distance(perceptual_hash(one), perceptual_hash(near)) for near in (small, lighter)) <= 4
    assert distance(perceptual_hash(one), perceptual_hash(other)) > 16


def test_the_hash_of_a_plain_picture_does_not_depend_on_rounding() -> None:
    assert len({perceptual_hash(np.full((48, 64, 3), level, np.uint8)) for level in (1, 77, 130, 255)}) == 1


def test_contrast_is_the_standard_deviation_of_the_liveliest_channel() -> None:
    for pixels in pictures(4):
        expected = pixels.reshape(-1, 3).astype(np.float64).std(axis=0).max()
        assert contrast(pixels) == pytest.approx(expected, abs=0.005)
    plain = np.full((16, 16, 3), 200, np.uint8)
    assert contrast(plain) == 0.0
    plain[::2, :, 1] += 20
    assert contrast(plain) == 10.0


def test_a_score_is_clips_and_depends_on_no_neighbour() -> None:
    measures = load_measures(Checks.model_validate({"clip_score": CLIP_SCORE}), "cpu", 1, emphasis=False)
    images, prompts = pictures(4, 64, 64), ["a red circle", "a blue star", "a ring", "a green heart"]
    scores = [facts.clip_score for facts in measures(images, prompts)]
    expected = CLIP.from_pretrained(MODELS / "shapes-clip").score(images, prompts)
    assert scores == pytest.approx(expected.tolist(), abs=1e-4)
    for place, prompt in enumerate(prompts):
        alone = np.zeros_like(images)
        alone[place] = images[place]
        told = measures(alone, [prompt if other == place else None for other in range(4)])
        assert told[place].clip_score == scores[place]
        assert {facts.clip_score for facts in told} == {None, scores[place]}


def test_weights_in_brackets_are_no_words_of_the_prompt() -> None:
    images, plain, weighted = (
        pictures(1, 64, 64),
        "a red circle on a white background",
        "a (red:1.3) ((circle)) on a [white] background",
    )
    for emphasis, same in ((True, True), (False, False)):
        measures = load_measures(Checks.model_validate({"clip_score": CLIP_SCORE}), "cpu", 1, emphasis=emphasis)
        one, other = (measures(images, [prompt])[0].clip_score for prompt in (plain, weighted))
        assert (one == other) is same


def test_concepts_in_words_are_compared_with_their_thresholds() -> None:
    concepts = {"a red circle": 0.9, "a blue star": -0.9}
    safety = {"safety": {**CLIP_SCORE, "concepts": concepts}}
    measures = load_measures(Checks.model_validate(safety), "cpu", 1, emphasis=False)
    images = pictures(2, 64, 64)
    clip = CLIP.from_pretrained(MODELS / "shapes-clip")
    cosines = clip.embed_images(images) @ clip.embed_texts(["a blue star"])[0]
    for facts, cosine in zip(measures(images, ["", ""]), cosines.tolist(), strict=True):
        assert facts.unsafe_concept == "a blue star"
        assert facts.unsafe_score == pytest.approx(cosine + 0.9, abs=5e-4)


@given(
    seed=st.integers(0, 2**32),
    count=st.integers(0, 120),
    most=st.integers(0, 31),
    pieces=st.none() | st.integers(1, 16),
)
def test_the_first_that_looks_alike_is_found_without_comparing_all(
    seed: int, count: int, most: int, pieces: int | None
) -> None:
    """Whether each is compared with each, or those that share one of so many pieces more than bits may differ."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    for place in range(1, count):  # most are another's, with some bits turned
        if rng.random() < 0.8:
            turned = sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 2 * most + 2), replace=False))
            hashes[place] = hashes[rng.integers(0, place)] ^ np.uint64(turned)
    near = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= most
    first = near.argmax(axis=1) if count else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_AT_ONCE", 1 << 8)
        patch.setattr(duplicates, "_pieces", lambda count, most: 0 if pieces is None else most + pieces)
        assert np.array_equal(first_alike(hashes, most), first)


def test_many_hashes_are_cut_into_pieces_and_few_or_far_ones_are_not() -> None:
    assert [duplicates._pieces(count, 4) for count in (10, 1000, 10**6)] == [0, 0, 5]
    assert duplicates._pieces(10**6, 31) == 0
    assert duplicates._pieces(10**6, 2) > 3  # of three pieces there were two million values to look at
