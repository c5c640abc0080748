"""CLIP's tokenizer: lower-cased byte-pair encoding (Radford et al. 2021, section 2.4).

The encoding itself is the ``tokenizers`` library's, fed with a checkpoint's vocab.json and merges.txt.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from sdbatch.errors import ModelError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"

_PLAUSIBLE_LENGTH = 1_000_000

# Special tokens, English contractions, words, single digits, runs of anything else.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class CLIPTokenizer:
    """Turns text into token ids; ``frame`` makes of them the fixed length that a text encoder reads.

    ``vocab`` is token → id, ``merges`` the pairs that byte-pair encoding joins, first learnt first.
    """

    def __init__(
        self, vocab: dict[str, int], merges: list[tuple[str, str]], *, max_length: int = 77, pad_token: str = EOS
    ) -> None:
        missing = [token for token in (BOS, EOS, pad_token) if token not in vocab]
        if missing:
            raise ModelError(f"tokenizer: the vocabulary lacks the token {missing[0]}")
        self.vocab, self.merges = vocab, merges
        self.max_length = max_length
        self.pad_token = pad_token
        self.bos_id, self.eos_id, self.pad_id = vocab[BOS], vocab[EOS], vocab[pad_token]
        try:
            self._bpe = clip_bpe(models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=EOS))
        except Exception as error:  # the library raises nothing narrower
            raise ModelError(f"tokenizer: vocabulary and merges don't go together: {error}") from None
        self._words: dict[str, list[int]] = {}  # learnt words and the ids of their vectors

    def padded_with(self, pad_token: str) -> CLIPTokenizer:
        """The same tokenizer with another padding."""
        return CLIPTokenizer(self.vocab, self.merges, max_length=self.max_length, pad_token=pad_token)

    def within(self, positions: int) -> CLIPTokenizer:
        """The same tokenizer for an encoder of so many positions: one saved without a length has an endless one."""
        if self.max_length <= max(positions, _PLAUSIBLE_LENGTH):
            return self
        return CLIPTokenizer(self.vocab, self.merges, max_length=positions, pad_token=self.pad_token)

    def add_word(self, word: str, ids: Sequence[int]) -> None:
        """Let ``word``, wherever it stands in a text, mean the rows ``ids`` of the embedding table."""
        word = word.lower()
        if not word or {word, f"{word}</w>"} & self.vocab.keys() or word in self._words:
            raise ModelError(f"tokenizer: '{word}' is a word already; give the embedding another token")
        self._bpe.add_tokens([AddedToken(word, single_word=True, normalized=True)])
        self._words[word] = list(ids)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text: as many as there are, without BOS and EOS."""
        encodings = self._bpe.encode_batch(list(texts), add_special_tokens=False)
        if not self._words:
            return [encoding.ids for encoding in encodings]
        learnt = {self._bpe.token_to_id(word): ids for word, ids in self._words.items()}
        return [[new for old in encoding.ids for new in learnt.get(old, [old])] for encoding in encodings]

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """``max_length`` ids a text; what is beyond is cut."""
        return [self.frame(ids) for ids in self.encode(texts)]

    @property
    def room(self) -> int:
        """Tokens of text that fit between BOS and EOS."""
        return self.max_length - 2

    def frame(self, ids: Sequence[int]) -> list[int]:
        """BOS, as many ids as there is room for, EOS, padding: ``max_length`` in all."""
        row = [self.bos_id, *ids[: self.room], self.eos_id]
        return row + [self.pad_id] * (self.max_length - len(row))


def clip_bpe(model: models.BPE) -> Tokenizer:
    """The text clean-up of CLIP round a byte-pair model."""
    bpe = Tokenizer(model)
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.add_special_tokens([BOS, EOS])  # written out in a prompt they mean themselves, as in CLIP's own code
    return bpe


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """From vocab.json and merges.txt or, as newer releases of transformers save it, from tokenizer.json."""
    path = folder / "vocab.json"
    try:
        if path.is_file():
            vocab = _read_json(path)
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            pairs: list[Any] = [line for line in lines if line and not line.startswith("#version")]
        else:
            path = folder / "tokenizer.json"
            model = _read_json(path)["model"]
            vocab, pairs = model["vocab"], model["merges"]
        halves = (pair.split() if isinstance(pair, str) else pair for pair in pairs)
        merges = [(str(left), str(right)) for left, right in halves]
        file = folder / "tokenizer_config.json"
        config = _read_json(file) if file.exists() else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"model file {path} can't be read as a tokenizer: {error}") from None
    if not isinstance(config, dict) or not isinstance(vocab, dict):
        raise ModelError(f"model file {path} can't be read as a tokenizer: it should hold a JSON object")
    pad, length = config.get("pad_token", EOS), config.get("model_max_length", 77)
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if not isinstance(pad, str) or not isinstance(length, int) or length < 3:
        raise ModelError(f"model file {file}: pad_token should be a token and model_max_length a number")
    return CLIPTokenizer(vocab, merges, max_length=length, pad_token=pad)


def clip_tokenizer(path: Path) -> CLIPTokenizer:
    """From the list of merges that CLIP's authors published, ``bpe_simple_vocab_16e6.txt.gz``.

    Its vocabulary is every byte, every byte at the end of a word, every merge, and the two marks.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
        merges = [(left, right) for left, right in (line.split() for line in lines[1 : _CLIP_MERGES + 1])]
    except (OSError, ValueError, EOFError) as error:
        raise ModelError(f"model file {path} can't be read as CLIP's merges: {error}") from None
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_order)
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in merges), BOS, EOS]
    return CLIPTokenizer({word: number for number, word in enumerate(words)}, merges)


_CLIP_MERGES = 49152 - 256 - 2


def _byte_order(letter: str) -> tuple[bool, int]:
    """Bytes that print stand for themselves and come first; the others were moved beyond 255, in order."""
    return ord(letter) > 255, ord(letter)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_tokenizer(folder: Path, tokenizer: CLIPTokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(tokenizer.vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in tokenizer.merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokenizer.max_length,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": tokenizer.pad_token,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
