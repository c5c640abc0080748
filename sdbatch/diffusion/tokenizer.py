"""CLIP's tokenizer: lower-cased byte-pair encoding (Radford et al. 2021, section 2.4).

The encoding itself is the ``tokenizers`` library's, fed with a checkpoint's vocab.json and merges.txt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from sdbatch.errors import ModelError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"

# Special tokens, English contractions, words, single digits, runs of anything else.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Tokens:
    """``ids``: ``max_length`` token ids a prompt; ``lengths``: tokens before any cut, BOS and EOS included."""

    ids: list[list[int]]
    lengths: list[int]


class CLIPTokenizer:
    """Turns prompts into token ids of a fixed length: BOS, text, EOS, padding.

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
        self._bpe = clip_bpe(models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=EOS))

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Encode, cut to ``max_length`` keeping EOS, and pad."""
        ids, lengths = [], []
        for encoding in self._bpe.encode_batch(list(prompts), add_special_tokens=False):
            text = encoding.ids
            lengths.append(len(text) + 2)
            row = [self.bos_id, *text[: self.max_length - 2], self.eos_id]
            ids.append(row + [self.pad_id] * (self.max_length - len(row)))
        return Tokens(ids, lengths)


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
