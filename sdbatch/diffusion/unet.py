"""The denoising U-Net with cross-attention (Rombach et al. 2022, section 3.3 and appendix E).

It maps a noisy latent z_t, its time step and the text states to the noise ε or the velocity v.
The module tree carries the key names of diffusers' ``UNet2DConditionModel``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdbatch.diffusion.convolution import Conv2d
from sdbatch.diffusion.resnet import Downsample, ResnetBlock, Upsample


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the U-Net, one tuple entry a level. The defaults are those of SD 1.x."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels hold transformers
    num_attention_heads: tuple[int, ...] = (8, 8, 8, 8)
    layers_per_block: int = 2
    transformer_layers: tuple[int, ...] = (1, 1, 1, 1)  # blocks in each transformer
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    added_sizes_dim: int | None = None  # SDXL: channels of the embedding of each size number
    added_dim: int | None = None  # SDXL: pooled text and all size embeddings together
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64  # latent height and width the model was trained at


@dataclass(frozen=True)
class Added:
    """What SDXL conditions on beside the text states (Podell et al. 2023, section 2.2)."""

    pooled: Tensor  # (B, P) the text's embedding
    sizes: Tensor  # (B, 6) original height and width, crop top and left, target height and width; refiner: (B, 5)


#: What a cross-attention is told of a text: keys and values, each (B, heads, L, d).
KeysValues = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Multi-head attention of x to itself or, given its keys and values, to the text."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{width} channels can't be shared among {heads} attention heads")
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, text: KeysValues | None = None) -> Tensor:
        q = self._heads(self.to_q(x))  # (B, heads, h·w, d)
        k, v = self.keys_values(x) if text is None else text
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](h.transpose(1, 2).flatten(2))

    def keys_values(self, source: Tensor) -> KeysValues:
        """What ``source`` (B, L, context_width) has to say."""
        return self._heads(self.to_k(source)), self._heads(self.to_v(source))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.proj(x).chunk(2, dim=-1)
        gate = F.gelu(gate)
        return gate * h if torch.is_grad_enabled() else gate.mul_(h)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # Index 1 is the reference's dropout: nothing at inference, but it gives the last layer its number.
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each pre-normalised and residual."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, text: KeysValues) -> Tensor:
        x = self.attn1(self.norm1(x)).add_(x)
        x = self.attn2(self.norm2(x), text).add_(x)
        return self.ff(self.norm3(x)).add_(x)


class SpatialTransformer(nn.Module):
    """A transformer over the h·w positions of a feature map."""

    def __init__(self, width: int, heads: int, layers: int, config: UNetConfig) -> None:
        super().__init__()
        self.linear = config.use_linear_projection
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=1e-6)
        self.proj_in: nn.Module = nn.Linear(width, width) if self.linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, config.cross_attention_dim, heads) for _ in range(layers)
        )
        self.proj_out: nn.Module = nn.Linear(width, width) if self.linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, texts: Iterator[KeysValues]) -> Tensor:
        size = x.shape[-2:]
        h = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        h = h.flatten(2).transpose(1, 2)  # (B, h·w, width)
        h = self.proj_in(h) if self.linear else h.contiguous()
        for block in self.transformer_blocks:
            h = block(h, next(texts))
        if self.linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(2, size)
        return x + (h if self.linear else self.proj_out(h))


class DownBlock(nn.Module):
    def __init__(self, config: UNetConfig, level: int, in_channels: int) -> None:
        super().__init__()
        out, last = config.block_out_channels[level], len(config.block_out_channels) - 1
        self.resnets = nn.ModuleList(
            _resnet(config, in_channels if i == 0 else out, out) for i in range(config.layers_per_block)
        )
        self.attentions = _transformers(config, level, config.layers_per_block)
        self.downsamplers = nn.ModuleList([Downsample(out)] if level < last else [])

    def forward(self, x: Tensor, time: Tensor, texts: Iterator[KeysValues], skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, texts)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(config, width, width) for _ in range(2))
        heads, layers = config.num_attention_heads[-1], config.transformer_layers[-1]
        self.attentions = nn.ModuleList([SpatialTransformer(width, heads, layers, config)])

    def forward(self, x: Tensor, time: Tensor, texts: Iterator[KeysValues]) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), texts)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    def __init__(self, config: UNetConfig, level: int, in_channels: int, skip_channels: list[int]) -> None:
        super().__init__()
        out = config.block_out_channels[level]
        self.resnets = nn.ModuleList(
            _resnet(config, (in_channels if i == 0 else out) + skip, out) for i, skip in enumerate(skip_channels)
        )
        self.attentions = _transformers(config, level, len(skip_channels))
        self.upsamplers = nn.ModuleList([Upsample(out)] if level > 0 else [])

    def forward(self, x: Tensor, time: Tensor, texts: Iterator[KeysValues], skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if self.attentions:
                x = self.attentions[i](x, texts)
        for upsample in self.upsamplers:
            # Odd sizes do not double back: the next skip knows the size to return to.
            height, width = skips[-1].shape[-2:]
            x = upsample(x, (height, width))
        return x


def sinusoids(values: Tensor, channels: int) -> Tensor:
    """(N,) → (N, channels): cosines, then sines, of falling frequency (Vaswani et al. 2017, section 3.5)."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedding(nn.Module):
    """A small MLP to the width of the time embedding."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class UNet(nn.Module):
    """(z_t, t, text) → ε or v.

    ``latents`` (B, in_channels, h, w); ``timesteps`` (B,), float; ``context`` (B, L, cross_attention_dim), or the keys
    and values made of it, which are the same at every step; ``added`` for models that have it.
    Returns (B, out_channels, h, w).
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], 4 * widths[0])
        self.add_embedding = Embedding(config.added_dim, 4 * widths[0]) if config.added_dim else None

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # channels of every feature map the way up will meet again
        for level, width in enumerate(widths):
            self.down_blocks.append(DownBlock(config, level, widths[max(level - 1, 0)]))
            skips += [width] * (config.layers_per_block + (level < len(widths) - 1))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for level in reversed(range(len(widths))):
            taken = [skips.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(config, level, below, taken))
            below = widths[level]

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)

    def keys_values(self, context: Tensor) -> list[KeysValues]:
        """What each cross-attention is told of the text, in the order in which they come."""
        blocks = [module for module in self.modules() if isinstance(module, TransformerBlock)]
        return [block.attn2.keys_values(context) for block in blocks]

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor | Sequence[KeysValues],
        added: Added | None = None,
    ) -> Tensor:
        texts = iter(self.keys_values(context) if isinstance(context, Tensor) else context)
        time = self.time_embedding(sinusoids(timesteps, self.config.block_out_channels[0]))  # (B, 4·widths[0])
        if self.add_embedding is not None and self.config.added_sizes_dim:
            if added is None:
                raise ValueError("this U-Net is conditioned on sizes, too: `added` is missing")
            sizes = sinusoids(added.sizes.flatten(), self.config.added_sizes_dim).reshape(len(added.sizes), -1)
            time = time + self.add_embedding(torch.cat([added.pooled.float(), sizes], dim=-1))
        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, time, texts, skips)
        x = self.mid_block(x, time, texts)
        for block in self.up_blocks:
            x = block(x, time, texts, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def _resnet(config: UNetConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    time_channels = 4 * config.block_out_channels[0]
    return ResnetBlock(
        in_channels, out_channels, groups=config.norm_num_groups, eps=config.norm_eps, time_channels=time_channels
    )


def _transformers(config: UNetConfig, level: int, count: int) -> nn.ModuleList:
    if not config.attention[level]:
        return nn.ModuleList()
    width, heads = config.block_out_channels[level], config.num_attention_heads[level]
    layers = config.transformer_layers[level]
    return nn.ModuleList(SpatialTransformer(width, heads, layers, config) for _ in range(count))
