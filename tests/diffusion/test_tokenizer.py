"""The tokenizer against transformers' CLIP tokenizer, with CLIP's own merges where they are at hand."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
import transformers
from tokenizers import pre_tokenizers

from sdbatch.diffusion import describe
from sdbatch.diffusion.checkpoint import read_tokenizer
from sdbatch.diffusion.tokenizer import BOS, EOS, CLIPTokenizer

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
    assert ours(prompts).ids == expected


def test_the_built_in_vocabulary_encodes_as_transformers_does() -> None:
    ours, theirs = both(describe("builtin:shapes").folder / "tokenizer", 48)
    same(ours, theirs, ["a small red circle on a pale blue background", "unknown words here", *ODD])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the prompt tables and CLIP's merges are not at hand")
def test_clip_vocabulary_encodes_real_prompts_as_transformers_does(tmp_path: Path) -> None:
    lines = gzip.decompress((SHARED / "clip_bpe_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    # The order in which CLIP lists the bytes: printable ones first, then the rest.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    assert sorted(chars) == sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*chars, *(c + "</w>" for c in chars), *("".join(line.split()) for line in merges), BOS, EOS]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    ours, theirs = both(tmp_path, 77)
    assert len(ours.vocab) == 49408
    with (SHARED / "partiprompts.tsv").open(encoding="utf-8") as file:
        parti = [row["Prompt"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    dpg = [json.loads(line)["prompt"] for line in (SHARED / "dpg_bench.jsonl").read_text("utf-8").splitlines()]
    assert len(parti) == 1632
    same(ours, theirs, [*parti, *dpg, *ODD])
    # Known from CLIP itself.
    assert ours(["a photo of a cat"]).ids[0][:7] == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_both_ways_of_saving_a_tokenizer_are_read(tmp_path: Path) -> None:
    folder = describe("builtin:shapes").folder / "tokenizer"
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    (tmp_path / "vocab.json").unlink(missing_ok=True)
    ours, again = read_tokenizer(folder), read_tokenizer(tmp_path)
    assert (again.vocab, again.merges, again.max_length) == (ours.vocab, ours.merges, ours.max_length)


def test_lengths_tell_what_was_cut() -> None:
    folder = describe("builtin:shapes").folder / "tokenizer"
    learnt = read_tokenizer(folder)
    tokenizer = CLIPTokenizer(learnt.vocab, learnt.merges, max_length=8)
    tokens = tokenizer(["red circle", "a red circle on a white background"])
    assert tokens.lengths == [4, 9]
    assert [len(row) for row in tokens.ids] == [8, 8]
    assert tokens.ids[1][-1] == tokenizer.eos_id
