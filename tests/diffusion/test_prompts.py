"""How prompts are read: emphasis, and texts longer than the text encoder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdbatch.diffusion import LatentDiffusion, Reading, TextualInversion
from sdbatch.diffusion.conditioning import text_states
from sdbatch.diffusion.prompt import chunks_needed, parse_emphasis, read_prompts
from sdbatch.errors import UsageError
from tests.diffusion import tiny_models

CHUNKED, EMPHASIS = Reading(long_prompts="chunk"), Reading(emphasis=True)
BOTH = Reading(long_prompts="chunk", emphasis=True)
ROOM = tiny_models.LENGTH - 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.sdxl(), tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def sdxl(folder: Path) -> LatentDiffusion:
    return LatentDiffusion.from_pretrained(folder)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    return LatentDiffusion.from_pretrained(tiny_models.save(tiny_models.sd1(), tmp_path_factory.mktemp("sd1")))


# -- the grammar of emphasis -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("", [("", 1.0)]),
        ("a (cat)", [("a ", 1.0), ("cat", 1.1)]),
        ("a [cat]", [("a ", 1.0), ("cat", 1 / 1.1)]),
        ("a ((cat))", [("a ", 1.0), ("cat", 1.21)]),
        ("([cat])", [("cat", 1.0)]),
        ("a (cat:1.3)", [("a ", 1.0), ("cat", 1.3)]),
        ("(a: 1.3 )", [("a", 1.3)]),
        ("(a:.5)", [("a", 0.5)]),
        ("(a:2.)", [("a", 2.0)]),
        ("(a:0)", [("a", 0.0)]),
        ("(a:-1)", [("a", -1.0)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("((a) b:2)", [("a", 2.2), (" b", 2.0)]),
        ("(a:1.3) and (b:0.7)", [("a", 1.3), (" and ", 1.0), ("b", 0.7)]),
        ("(a)(b)", [("ab", 1.1)]),
        # A backslash makes brackets, and itself, ordinary.
        (r"a \(cat\)", [("a (cat)", 1.0)]),
        (r"\[x\] (y\))", [("[x] ", 1.0), ("y)", 1.1)]),
        (r"a\\(b)", [("a\\", 1.0), ("b", 1.1)]),
        (r"a\b", [("a\\b", 1.0)]),
        # What is never closed weighs to the end; what was never opened is text.
        ("a (b c", [("a ", 1.0), ("b c", 1.1)]),
        ("((a) b", [("a", 1.21), (" b", 1.1)]),
        ("a [b", [("a ", 1.0), ("b", 1 / 1.1)]),
        ("(a:1.3", [("a:1.3", 1.1)]),
        ("a) b]", [("a) b]", 1.0)]),
        ("a:1.3)", [("a:1.3)", 1.0)]),
        # The two kinds of bracket are matched apart; a weight belongs to round ones.
        ("[a (b] c)", [("a ", 1 / 1.1), ("b", 1.0), (" c", 1.1)]),
        ("[a:1.3]", [("a:1.3", 1 / 1.1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("a: b", [("a: b", 1.0)]),
        ("()", [("", 1.0)]),
    ],
)
def test_emphasis_reads_as_in_image_uis(prompt: str, parts: list[tuple[str, float]]) -> None:
    found = parse_emphasis(prompt)
    assert [text for text, _ in found] == [text for text, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


@given(st.text())
def test_any_text_can_be_read(text: str) -> None:
    parts = parse_emphasis(text)
    assert parts
    assert all(math.isfinite(weight) for _, weight in parts)
    for mark in "()[]\\":
        text = text.replace(mark, "")
    if ":" not in text:
        plain = "".join(part for part, _ in parts)
        for mark in "()[]\\":
            plain = plain.replace(mark, "")
        assert plain == text


@given(st.text(st.characters(exclude_characters="()[]\\:")))
def test_text_without_marks_is_itself(text: str) -> None:
    assert parse_emphasis(text) == [(text, 1.0)]


@given(st.text(alphabet="()[] ab"))
def test_brackets_alone_weigh_finitely_and_above_nothing(text: str) -> None:
    assert all(0 < weight < math.inf for _, weight in parse_emphasis(text))


def test_no_weight_leaves_the_range_of_the_number_formats() -> None:
    for prompt in ("(" * 5000 + "a", f"(a:{'9' * 400})", f"(a:-{'9' * 400})"):
        assert all(abs(weight) <= 1000 for _, weight in parse_emphasis(prompt))


# -- weights ---------------------------------------------------------------------------------------------


def test_weights_change_weighted_prompts_alone(sd1: LatentDiffusion) -> None:
    plain = sd1.encode(["a red circle", "a ring"], reading=EMPHASIS).states
    mixed = sd1.encode(["a (red:1.5) circle", "a ring"], reading=EMPHASIS).states
    assert torch.equal(plain[1], mixed[1])
    assert not torch.equal(plain[0], mixed[0])
    assert torch.equal(plain, sd1.encode(["a red circle", "a ring"]).states)


def test_weights_multiply_the_tokens_states_and_keep_the_mean(sd1: LatentDiffusion) -> None:
    plain = sd1.encode(["a red circle"]).states
    heavy = sd1.encode(["a (red:1.5) circle"], reading=EMPHASIS).states
    ratio = (heavy / plain)[0]
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3)
    by_token = ratio[:, 0] / ratio[0, 0]
    (ids,) = sd1.tokenizer.encode(["red"])
    expected = torch.ones(tiny_models.LENGTH)
    expected[2 : 2 + len(ids)] = 1.5  # after BOS and "a"
    assert torch.allclose(by_token, expected, rtol=1e-3)
    assert abs(plain.mean()) > 0.02
    assert heavy.mean().item() == pytest.approx(plain.mean().item(), rel=1e-3)


def test_a_mean_of_nothing_is_left_alone() -> None:
    """As it is right after a norm that was never trained: a factor to restore it would be rounding over rounding."""
    model = LatentDiffusion.from_pretrained("builtin:shapes")
    norm = model.text_encoders[0].text_model.final_layer_norm
    norm.weight, norm.bias = (torch.nn.Parameter(value * torch.ones_like(norm.bias), False) for value in (1.0, 0.0))
    plain, heavy = (model.encode([text], reading=EMPHASIS).states for text in ("a red circle", "a (red:1.5) circle"))
    assert abs(plain.mean()) < 1e-6
    assert torch.equal(heavy[:, 0], plain[:, 0])
    assert torch.equal(heavy[:, 2], 1.5 * plain[:, 2])


def test_brackets_are_ordinary_unless_emphasis_is_asked_for(sd1: LatentDiffusion) -> None:
    assert sd1.lengths(["a (red:1.5) circle"])[0] > sd1.lengths(["a (red:1.5) circle"], EMPHASIS)[0]
    assert sd1.lengths(["a (red:1.5) circle"], EMPHASIS) == sd1.lengths(["a red circle"])


@given(st.text(alphabet="()[]: abc12.-\\", max_size=40))
@settings(max_examples=30)
def test_any_emphasis_gives_finite_states(sd1: LatentDiffusion, text: str) -> None:
    assert sd1.encode([text, "(a:0)"], reading=Reading("chunk", emphasis=True), chunks=4).states.isfinite().all()


# -- long prompts ----------------------------------------------------------------------------------------

LONG = " ".join(f"a {word} ring" for word in ["red", "green", "blue"] * 4)


def test_a_prompt_of_200_tokens_takes_3_chunks_of_clip() -> None:
    """At CLIP's own length of 77 tokens, 75 of them text."""
    tokenizer = LatentDiffusion.from_pretrained("builtin:shapes").tokenizer
    tokenizer.max_length = 77
    prompt = " ".join(["a"] * 200)
    assert chunks_needed(tokenizer, [prompt, "a", ""], emphasis=False) == [3, 1, 1]
    (read,) = read_prompts(tokenizer, [prompt], chunked=True, emphasis=False)
    assert read.length == 200
    assert [len(chunk) for chunk in read.chunks] == [77, 77, 77]
    assert all(chunk[0] == tokenizer.bos_id and tokenizer.eos_id in chunk[1:] for chunk in read.chunks)
    told = [[i for i in chunk if i not in {tokenizer.bos_id, tokenizer.eos_id}] for chunk in read.chunks]
    assert [len(ids) for ids in told] == [75, 75, 50]
    assert [i for ids in told for i in ids] == tokenizer.encode([prompt])[0]


def test_chunks_are_read_one_by_one_and_put_in_a_row(sdxl: LatentDiffusion) -> None:
    (length,) = sdxl.lengths([LONG])
    chunks = math.ceil(length / ROOM)
    assert chunks == 3
    together = sdxl.encode([LONG], reading=CHUNKED, chunks=chunks)
    by_encoder, pooled = [], []
    for tokenizer, encoder in zip(sdxl.checkpoint.tokenizers, sdxl.text_encoders, strict=True):
        (ids,) = tokenizer.encode([LONG])
        states = []
        for i in range(chunks):
            framed = torch.tensor([tokenizer.frame(ids[i * ROOM : (i + 1) * ROOM])])
            layers = encoder(framed)
            states.append(layers[-2])
            pooled.append(encoder.pool(layers[-1], framed, tokenizer.eos_id))
        by_encoder.append(torch.cat(states, dim=1))
    assert torch.allclose(together.states, torch.cat(by_encoder, dim=-1), atol=1e-5)
    assert together.added is not None
    assert torch.allclose(together.added.pooled, pooled[chunks], atol=1e-5), "of the second encoder's first chunk"


def test_weights_follow_their_tokens_into_later_chunks(sd1: LatentDiffusion) -> None:
    plain = sd1.encode([LONG], reading=CHUNKED, chunks=3).states.unflatten(1, (3, -1))
    heavy = sd1.encode([f"{LONG[:-4]}(ring:1.5)"], reading=BOTH, chunks=3).states.unflatten(1, (3, -1))
    assert torch.allclose(plain[:, :2], heavy[:, :2], atol=1e-5)
    assert not torch.allclose(plain[:, 2], heavy[:, 2], atol=1e-2)


def test_nothing_is_cut_in_silence(sd1: LatentDiffusion) -> None:
    with pytest.raises(UsageError, match=r"a prompt takes 3 chunks of 14 tokens, but chunks is 2"):
        sd1.encode([LONG, "a"], reading=CHUNKED, chunks=2)
    lengths = sd1.lengths([LONG, "a ring", ""])
    assert lengths[0] > sd1.tokenizer.room >= lengths[1] > lengths[2] == 0
    kept = sd1.tokenizer.encode([LONG])[0][:ROOM]
    cut = sd1.encode([LONG]).states
    layers = sd1.text_encoders[0](torch.tensor([sd1.tokenizer.frame(kept)]))
    assert torch.allclose(cut, sd1.text_encoders[0].normalise(layers[-1]), atol=1e-5)


def test_generate_reads_as_many_chunks_as_the_longest_prompt_needs(sd1: LatentDiffusion) -> None:
    arguments = {"seeds": [1], "num_inference_steps": 2, "output": "latent", "reading": CHUNKED}
    whole = sd1.generate([LONG], **arguments)
    assert torch.equal(whole, sd1.generate([LONG], chunks=3, **arguments))
    assert torch.equal(sd1.generate(["a"], [LONG], **arguments), sd1.generate(["a"], [LONG], chunks=3, **arguments))
    assert not torch.equal(whole, sd1.generate([f"{LONG} star"], **arguments)), "the end of the prompt counts"
    assert not torch.equal(whole, sd1.generate([LONG], **{**arguments, "reading": Reading()}))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_long_neighbours_do_not_change_a_short_prompt(name: str, request: pytest.FixtureRequest) -> None:
    model: LatentDiffusion = request.getfixturevalue(name)

    def latent(neighbour: str, negative: str) -> torch.Tensor:
        prompts, negatives = ["a red circle", neighbour], ["", negative]
        settings = {"num_inference_steps": 2, "output": "latent", "reading": BOTH, "chunks": 3}
        return model.generate(prompts, negatives, seeds=[3, 4], **settings)[0]

    assert torch.equal(latent("", ""), latent(LONG, f"(blurry:1.4) {LONG[:-10]}"))


def test_the_longer_reading_counts_where_encoders_know_different_words(folder: Path, tmp_path: Path) -> None:
    safetensors.torch.save_file({"clip_g": torch.zeros(20, 48)}, tmp_path / "longword.safetensors")
    model = LatentDiffusion.from_pretrained(folder, adaptations=[TextualInversion(tmp_path / "longword.safetensors")])
    assert model.lengths(["longword"]) == [20]
    assert (
        model.generate(["longword"], seeds=[1], num_inference_steps=1, output="latent", reading=CHUNKED)
        .isfinite()
        .all()
    )


# -- each prompt once and by itself ------------------------------------------------------------------------

COMPANIES = [["a ring", "a red circle"], ["a red circle"] * 3, ["", "a ring", "a star", "a red circle", "", "a ring"]]


@pytest.mark.parametrize("company", COMPANIES)
@pytest.mark.parametrize("kept", [0, 2])
def test_a_prompt_is_read_the_same_whatever_stands_beside_it(
    company: list[str], kept: int, sdxl: LatentDiffusion
) -> None:
    alone = {prompt: sdxl.encode([prompt]) for prompt in company}
    sdxl.texts.keeps = kept
    try:
        for _ in range(2):
            together = sdxl.encode(company)
            assert torch.equal(together.states, torch.cat([alone[prompt].states for prompt in company]))
            pooled = [alone[prompt].added.pooled for prompt in company]  # type: ignore[union-attr]
            assert together.added is not None
            assert torch.equal(together.added.pooled, torch.cat(pooled))
    finally:
        sdxl.texts.keeps = 0


def test_distinct_prompts_are_read_once_and_kept_as_long_as_asked_for(
    sd1: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        "sdbatch.diffusion.texts.text_states",
        lambda *given, **how: read.extend(given[2]) or text_states(*given, **how),
    )
    sd1.encode(["a ring", "a star", "a ring"])
    sd1.encode(["a ring"])
    assert read == ["a ring", "a star", "a ring"], "between calls nothing is kept"
    monkeypatch.setattr(sd1.texts, "keeps", 2)
    read.clear()
    for prompts in (["a ring"], ["a star", "a ring"], ["a ring"], ["a cross"], ["a ring"], ["a star"]):
        sd1.encode(prompts)
    assert read == ["a ring", "a star", "a cross", "a star"], "what was used last stays"
    sd1.encode(["a ring"], negative=True)
    sd1.encode(["a star"], reading=EMPHASIS)
    assert read[4:] == ["a ring", "a star"], "read otherwise is another text"
    sd1.texts._kept.clear()
