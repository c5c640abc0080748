"""Learn a small CLIP vocabulary from captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from tokenizers import models, pre_tokenizers

from sdbatch.diffusion.tokenizer import BOS, EOS, CLIPTokenizer, clip_bpe


def learn_tokenizer(phrases: Iterable[str], max_length: int) -> CLIPTokenizer:
    """A tokenizer to which every word of ``phrases`` is one token, and which still encodes any other text.

    As in CLIP's own file the vocabulary starts with all bytes, then all bytes at a word's end, then the
    merges in the order in which they were learnt, then the two special tokens.
    """
    merges = _learn_merges(_words(phrases))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{char}</w>" for char in alphabet), *("".join(merge) for merge in merges), BOS, EOS]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab, merges, max_length=max_length)


def _words(phrases: Iterable[str]) -> list[str]:
    """The distinct words of the phrases, split and spelt in bytes as CLIP does it."""
    bpe = clip_bpe(models.BPE())
    found = set()
    for phrase in phrases:
        text = bpe.normalizer.normalize_str(phrase)
        found |= {word for word, _ in bpe.pre_tokenizer.pre_tokenize_str(text)}
    return sorted(found)


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016, algorithm 1) until every word is whole.

    The library's own trainer breaks ties in an order that changes from run to run; here the first in the
    alphabet wins, so that the same captions always give the same vocabulary.
    """
    spelt = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for word in spelt for pair in pairwise(word))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelt = [_merged(word, best) for word in spelt]


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out
