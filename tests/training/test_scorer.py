"""The CLIP that learns the drawn world: its captions right and wrong, its learning, and the folder it leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from sdbatch.diffusion.clip import CLIP
from sdbatch.diffusion.image_encoder import preprocess
from sdbatch.training.architecture import MAX_TOKENS
from sdbatch.training.autoencoder import as_tensor
from sdbatch.training.captions import vocabulary
from sdbatch.training.loop import draws
from sdbatch.training.scorer import Matching, answers, new_clip, ranks_first, right_and_wrong
from sdbatch.training.tokens import learn_tokenizer
from sdbatch.training.world import draw, random_scene


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    return new_clip(learn_tokenizer(vocabulary(), MAX_TOKENS))


@pytest.mark.parametrize("things", [1, 2])
@pytest.mark.parametrize("complete", [False, True])
def test_wrong_captions_differ_from_the_right_one(things: int, complete: bool) -> None:
    rng = draws(0, "wrong")
    for _ in range(50):
        told = right_and_wrong(random_scene(rng, things), rng, 3, complete=complete)
        assert len(set(told)) == len(told) == 4


def test_matching_is_learnt(clip: CLIP) -> None:
    rng = draws(0, "matching")
    scenes = [random_scene(rng) for _ in range(8)]
    pixels = as_tensor(np.stack([draw(scene)[0] for scene in scenes]))
    told = [right_and_wrong(scene, rng, 2, complete=True) for scene in scenes]
    right, wrong = [texts[0] for texts in told], [text for texts in told for text in texts[1:]]
    ids = [torch.tensor(clip.tokenizer(texts)) for texts in (right, wrong)]
    truth = torch.tensor([answers(scene) for scene in scenes])
    matching = Matching(clip)
    optimizer = torch.optim.AdamW(matching.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = matching(pixels, *ids, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_before_learning_the_right_caption_is_first_by_chance(clip: CLIP) -> None:
    rng = draws(1, "ranks")
    torch.manual_seed(1)
    fresh = new_clip(clip.tokenizer).eval()
    assert np.mean(ranks_first(fresh, [random_scene(rng) for _ in range(40)], rng)) < 0.4


def test_transformers_opens_the_folder_and_computes_the_same(clip: CLIP, tmp_path: Path) -> None:
    clip.save_pretrained(tmp_path)
    ours = CLIP.from_pretrained(tmp_path)
    theirs = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    images = np.stack([draw(random_scene(draws(number)))[0] for number in range(3)])
    prompts = ["a red circle", "a large blue star on a white background", "a ring above a heart"]
    with torch.no_grad():
        image = theirs.get_image_features(torch.from_numpy(preprocess(images, ours.preprocessing))).pooler_output
        text = theirs.get_text_features(torch.tensor(ours.tokenizer(prompts))).pooler_output
    assert torch.allclose(ours.embed_images(images), F.normalize(image, dim=-1), atol=1e-5)
    assert torch.allclose(ours.embed_texts(prompts), F.normalize(text, dim=-1), atol=1e-5)
