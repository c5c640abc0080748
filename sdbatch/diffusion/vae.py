"""The KL-regularised autoencoder between pictures and latents (Rombach et al. 2022, section 3.1).

The module tree carries the key names of diffusers' ``AutoencoderKL``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdbatch.diffusion.resnet import Downsample, ResnetBlock, Upsample


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder. The defaults are those of SD 1.x."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # multiplies latents to unit variance
    mid_block_add_attention: bool = True
    sample_size: int = 512  # pixels, each way, of a tile
    force_upcast: bool = False  # float16 overflows: compute in float32

    @property
    def downscale(self) -> int:
        """Pixels a latent position stands for, each way."""
        return 1 << (len(self.block_out_channels) - 1)


NORM_EPS = 1e-6


class SpatialAttention(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=NORM_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, h·w, width)
        q, k, v = (project(h)[:, None] for project in (self.to_q, self.to_k, self.to_v))  # (B, 1, h·w, width)
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.to_out[0](h[:, 0]).transpose(1, 2).unflatten(2, x.shape[-2:])
        return h + x  # in this order, as in the reference: the first one's memory layout is the sum's


class MidBlock(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups=groups, eps=NORM_EPS) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(width, groups)] if config.mid_block_add_attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class EncoderBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, config: VAEConfig, *, last: bool) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, config.layers_per_block, config)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out_channels, asymmetric=True)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class DecoderBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, config: VAEConfig, *, last: bool) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, config.layers_per_block + 1, config)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            EncoderBlock(widths[max(i - 1, 0)], width, config, last=i == len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(
            DecoderBlock(widths[max(i - 1, 0)], width, config, last=i == len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] ↔ unscaled latents (B, latent_channels, H/f, W/f)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, images: Tensor, *, tiled: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), each (B, latent_channels, h, w)."""
        size = self.config.sample_size
        moments = _tiled(self._encode, images, size, size // self.config.downscale) if tiled else self._encode(images)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, torch.clamp(log_variance, -30.0, 20.0)

    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """Pictures of unscaled latents, about [-1, 1] (not clamped)."""
        size = self.config.sample_size
        return _tiled(self._decode, latents, size // self.config.downscale, size) if tiled else self._decode(latents)

    def _encode(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def _decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


def _tiled(apply: Callable[[Tensor], Tensor], x: Tensor, tile: int, tile_out: int) -> Tensor:
    """``apply`` to overlapping tiles of x (B, C, H, W), blended where they overlap, a quarter of a tile each way.

    ``tile`` and ``tile_out`` are a tile's height and width before and after. Memory is one tile's, seams are soft.
    """
    if max(x.shape[-2:]) <= tile:
        return apply(x)
    stride, blend = int(tile * 0.75), int(tile_out * 0.25)
    kept = tile_out - blend
    rows: list[list[Tensor]] = []
    for top in range(0, x.shape[2], stride):
        row: list[Tensor] = []
        for left in range(0, x.shape[3], stride):
            done = apply(x[:, :, top : top + tile, left : left + tile])
            if rows:
                done = _blend(rows[-1][len(row)], done, blend, dim=2)
            if row:
                done = _blend(row[-1], done, blend, dim=3)
            row.append(done)
        rows.append(row)
    return torch.cat([torch.cat([part[:, :, :kept, :kept] for part in row], dim=3) for row in rows], dim=2)


def _blend(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """Fade from the end of one tile into the beginning of the next."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    shape = [1, 1, 1, 1]
    shape[dim] = extent
    weight = (torch.arange(extent, device=after.device, dtype=after.dtype) / extent).reshape(shape)
    head = after.narrow(dim, 0, extent)
    tail = before.narrow(dim, before.shape[dim] - extent, extent)
    rest = after.narrow(dim, extent, after.shape[dim] - extent)
    return torch.cat([tail * (1 - weight) + head * weight, rest], dim=dim)


def _resnets(in_channels: int, out_channels: int, count: int, config: VAEConfig) -> nn.ModuleList:
    return nn.ModuleList(
        ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups=config.norm_num_groups, eps=NORM_EPS)
        for i in range(count)
    )
