"""The text encoders of a model, and what they made of the prompts that came last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdbatch.diffusion.conditioning import Reading, text_states
from sdbatch.diffusion.prompt import read_prompts
from sdbatch.diffusion.text_encoder import TextEncoder
from sdbatch.diffusion.tokenizer import CLIPTokenizer

#: States of all text encoders side by side (B, L, D), and the last one's pooled text (B, P).
TextStates = tuple[Tensor, Tensor]


class Texts:
    """Tokenizers with their text encoders on a device: prompts → states.

    ``penultimate``: the layer before the last one counts, in all of them.
    """

    def __init__(
        self,
        tokenizers: Sequence[CLIPTokenizer],
        encoders: Sequence[TextEncoder],
        device: torch.device,
        *,
        penultimate: bool,
    ) -> None:
        self.tokenizers = list(tokenizers)
        self.encoders = list(encoders)
        self.keeps = 0  # read prompts to keep from one call to the next, where no weight changes meanwhile
        self._device = device
        self._penultimate = penultimate
        self._kept: dict[tuple[str, Reading, int, bool], TextStates] = {}
        self._offloaded = False

    @property
    def offloaded(self) -> bool:
        """Are encoders kept off the device but while they read, one at a time: less memory."""
        return self._offloaded

    @offloaded.setter
    def offloaded(self, wanted: bool) -> None:
        self._offloaded = wanted
        for encoder in self.encoders:
            encoder.to("cpu" if wanted else self._device)

    def lengths(self, prompts: Sequence[str], reading: Reading) -> list[int]:
        """Tokens of each prompt. A learnt word may have vectors for one encoder alone: the longer reading counts."""
        reads = [
            read_prompts(tokenizer, prompts, chunked=False, emphasis=reading.emphasis) for tokenizer in self.tokenizers
        ]
        return [max(read.length for read in of_prompt) for of_prompt in zip(*reads, strict=True)]

    def each(self, prompts: Sequence[str], reading: Reading, chunks: int, negative: bool) -> TextStates:
        """Every distinct prompt read once and by itself: what stands beside it changes nothing."""
        how = reading, chunks, negative
        new = [prompt for prompt in dict.fromkeys(prompts) if (prompt, *how) not in self._kept]
        read = self._read([[prompt] for prompt in new], reading, chunks, negative) if new else []
        known = self._kept | {(prompt, *how): text for prompt, text in zip(new, read, strict=True)}
        used = {(prompt, *how): known[prompt, *how] for prompt in prompts}
        if self.keeps:
            latest = [*(item for item in self._kept.items() if item[0] not in used), *used.items()]
            self._kept = dict(latest[-self.keeps :])
        states, pooled = zip(*(known[prompt, *how] for prompt in prompts), strict=True)
        return torch.cat(states), torch.cat(pooled)

    def together(self, prompts: Sequence[str], reading: Reading, chunks: int, negative: bool) -> TextStates:
        """The same but for rounding, all prompts in one batch."""
        (read,) = self._read([prompts], reading, chunks, negative)
        return read

    def _read(
        self, batches: Sequence[Sequence[str]], reading: Reading, chunks: int, negative: bool
    ) -> list[TextStates]:
        # The reference skips layers for what is wanted alone, and so do we: the same pictures.
        how = {"chunks": chunks, "skip": 0 if negative else reading.clip_skip}
        by_encoder = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            if self._offloaded:
                encoder.to(self._device)
            by_encoder.append(
                [
                    text_states(tokenizer, encoder, batch, reading, penultimate=self._penultimate, **how)
                    for batch in batches
                ]
            )
            if self._offloaded:
                encoder.to("cpu")
        return [
            (torch.cat([states for states, _ in parts], dim=-1), parts[-1][1])
            for parts in zip(*by_encoder, strict=True)
        ]
