"""The tokenizer against transformers' CLIP tokenizer, with CLIP's own merges where they are at hand."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
import transformers

from sdbatch.diffusion import open_checkpoint
from sdbatch.diffusion.locate import _tokenizer_for
from sdbatch.diffusion.tokenizer import CLIPTokenizer, clip_tokenizer, read_tokenizer, write_tokenizer
from sdbatch.errors import ModelError

SHARED = Path(__file__).parents[2].parent / "shared/data"
ODD = [
    "",
    " ",
    "Café—naïve",
    "日本語の絵",
    "👩‍🚀 on 🌕",
    "a\tb\r\nc",
    "it's 1,000 o'clock!!",
    "<|endoftext|> x",
    "\x00\x07",
    "ﷺ" * 40,
]


def both(folder: Path, max_length: int) -> tuple[CLIPTokenizer, transformers.CLIPTokenizer]:
    ours = read_tokenizer(folder)
    assert ours.max_length == max_length
    return ours, transformers.CLIPTokenizer.from_pretrained(folder)


def same(ours: CLIPTokenizer, theirs: transformers.CLIPTokenizer, prompts: list[str]) -> None:
    expected = theirs(prompts, padding="max_length", truncation=True, max_length=ours.max_length).input_ids
    assert ours(prompts) == expected


def test_the_built_in_vocabulary_encodes_as_transformers_does() -> None:
    ours, theirs = both(open_checkpoint("builtin:shapes").path / "tokenizer", 32)
    same(ours, theirs, ["a small red circle on a pale blue background", "unknown words here", *ODD])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the prompt tables and CLIP's merges are not at hand")
def test_clip_vocabulary_encodes_real_prompts_as_transformers_does(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, clip_tokenizer(SHARED / "clip_bpe_vocab_16e6.txt.gz"))
    ours, theirs = both(tmp_path, 77)
    assert len(ours.vocab) == 49408
    with (SHARED / "partiprompts.tsv").open(encoding="utf-8") as file:
        parti = [row["Prompt"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    dpg = [json.loads(line)["prompt"] for line in (SHARED / "dpg_bench.jsonl").read_text("utf-8").splitlines()]
    with (SHARED / "coco_30k.csv").open(encoding="utf-8") as file:
        coco = [row["prompt"] for row in csv.DictReader(file)]
    assert (len(parti), len(coco)) == (1632, 30_000)
    same(ours, theirs, [*parti, *dpg, *coco, *ODD])
    # Known from CLIP itself.
    assert ours(["a photo of a cat"])[0][:7] == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_both_ways_of_saving_a_tokenizer_are_read(tmp_path: Path) -> None:
    folder = open_checkpoint("builtin:shapes").path / "tokenizer"
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    (tmp_path / "vocab.json").unlink(missing_ok=True)
    ours, again = read_tokenizer(folder), read_tokenizer(tmp_path)
    assert (again.vocab, again.merges, again.max_length) == (ours.vocab, ours.merges, ours.max_length)


def test_a_long_text_is_cut_before_the_end_mark() -> None:
    learnt = read_tokenizer(open_checkpoint("builtin:shapes").path / "tokenizer")
    tokenizer = CLIPTokenizer(learnt.vocab, learnt.merges, max_length=8)
    texts = ["red circle", "a red circle on a white background"]
    assert [len(ids) for ids in tokenizer.encode(texts)] == [2, 7]
    assert [len(row) for row in tokenizer(texts)] == [8, 8]
    assert tokenizer(texts)[1][-1] == tokenizer.eos_id


def test_a_learnt_word_stands_for_its_vectors() -> None:
    learnt = read_tokenizer(open_checkpoint("builtin:shapes").path / "tokenizer")
    size = len(learnt.vocab)
    learnt.add_word("<My-Style>", [size, size + 1])
    red, circle = learnt.encode(["red circle"])[0]
    assert learnt.encode(["red <my-style> circle", "red,<my-style>", "circle"]) == [
        [red, size, size + 1, circle],
        [red, *learnt.encode([","])[0], size, size + 1],
        [circle],
    ]
    with pytest.raises(ModelError, match="is a word already"):
        learnt.add_word("red", [1])


def test_an_installed_open_clip_lends_its_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For single files, which bring none: found without importing the package, refused in words without it."""
    learnt = read_tokenizer(open_checkpoint("builtin:shapes").path / "tokenizer")
    with pytest.raises(ModelError, match=r"set model\.tokenizer to a folder .* or install the package open_clip_torch"):
        _tokenizer_for(tmp_path / "x.safetensors", None)
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in learnt.merges)]
    with gzip.open(package / "bpe_simple_vocab_16e6.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    lent = _tokenizer_for(tmp_path / "x.safetensors", None)
    assert lent.merges == learnt.merges
    assert len(lent.vocab) == 2 * 256 + len(learnt.merges) + 2
    (one,), (other,) = lent.encode(["a red circle"]), learnt.encode(["a red circle"])
    assert [list(lent.vocab)[i] for i in one] == [_word(learnt, i) for i in other]


def _word(tokenizer: CLIPTokenizer, number: int) -> str:
    return next(word for word, i in tokenizer.vocab.items() if i == number)
