"""Memory told in advance: the bookkeeping by hand, against real tensors, and at the published sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sdbatch.diffusion import LatentDiffusion, NoiseSchedule, open_checkpoint
from sdbatch.diffusion.checkpoint import Checkpoint, Component
from sdbatch.diffusion.clip import clip_component
from sdbatch.diffusion.clip_folder import read_clip_folder
from sdbatch.diffusion.convolution import packed_bytes
from sdbatch.diffusion.locate import locate_clip
from sdbatch.diffusion.memory import activations, image_encoder_bytes, live_tensors, peak_bytes
from sdbatch.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from sdbatch.diffusion.tokenizer import CLIPTokenizer
from sdbatch.diffusion.unet import UNet, UNetConfig
from sdbatch.diffusion.vae import VAE, VAEConfig
from sdbatch.diffusion.weights import Weights

GB = 10**9


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tensor_counts_from_its_making_to_its_end(device: str) -> None:
    before = torch.zeros(1000, device=device)
    with live_tensors(device) as live:
        x = torch.zeros(100, device=device)  # 400 bytes
        y = x + 1
        assert (live.now, live.peak) == (800, 800)
        y = y * 2  # both the old and the new, for a moment
        assert (live.now, live.peak) == (800, 1200)
        part = y[:50]
        x.add_(1)
        assert live.now == 800, "views and changes in place take nothing"
        del y
        assert live.now == 800, "the view keeps the whole"
        del x, part
        assert live.now == 0
        _ = before[:10], before.view(10, 100)
        assert live.now == 0, "what was there before is not ours"
        assert (live.restart(), live.peak) == (1200, 0)
        del before
        assert live.now == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_counts_as_its_output(device: str) -> None:
    q = torch.zeros(1, 2, 64, 8, device=device)
    with live_tensors(device) as live:
        out = F.scaled_dot_product_attention(q, q, q)
        assert live.peak == live.now == out.nbytes
        del out
        assert live.now == 0


def test_other_devices_do_not_count() -> None:
    with live_tensors("meta") as live:
        kept = torch.zeros(100)
        assert live.peak == 0
        kept = kept.to("meta")
        assert live.peak == kept.nbytes


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("tiled", [True, False])
def test_without_content_the_same_bytes_as_with(guided: bool, tiled: bool) -> None:
    settings = {"batch": 2, "width": 96, "height": 64, "guided": guided}
    model = LatentDiffusion.from_pretrained("builtin:shapes")
    model.checkpoint = _with_tiles_of(model.checkpoint, 32)
    model.vae.config = model.checkpoint.vae.config
    model.vae_tiling = tiled
    told = peak_bytes(model.checkpoint, dtype="float32", vae_tiling=tiled, **settings)
    networks = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoders[0]}
    stored = {name: sum(tensor.nbytes for tensor in network.parameters()) for name, network in networks.items()}
    assert told.weights == stored
    resident = sum(stored.values()) + packed_bytes(model.unet)
    assert (told.encoding, told.denoising, told.decoding) == tuple(
        resident + made for made in activations(model, **settings)
    )
    assert told.peak == max(told.encoding, told.denoising, told.decoding)


def _with_tiles_of(checkpoint: Checkpoint, pixels: int) -> Checkpoint:
    config = dataclasses.replace(checkpoint.vae.config, sample_size=pixels)
    return dataclasses.replace(checkpoint, vae=dataclasses.replace(checkpoint.vae, config=config))


# -- the published sizes ---------------------------------------------------------------------------------

CLIP_L = TextEncoderConfig()
OPEN_CLIP_G = TextEncoderConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)
SDXL_UNET = UNetConfig(
    block_out_channels=(320, 640, 1280),
    attention=(False, True, True),
    num_attention_heads=(5, 10, 20),
    transformer_layers=(1, 2, 10),
    cross_attention_dim=2048,
    use_linear_projection=True,
    added_sizes_dim=256,
    added_dim=2816,
    sample_size=128,
)
SDXL_VAE = VAEConfig(scaling_factor=0.13025, sample_size=1024, force_upcast=True)


def published(unet: UNetConfig, vae: VAEConfig, *encoders: TextEncoderConfig) -> Checkpoint:
    """A checkpoint of these sizes, without files."""

    def component(name: str, kind: type, config: object) -> Component:
        return Component(name, kind, config, Weights([]), {})

    small = open_checkpoint("builtin:shapes").tokenizers[0]
    names = ("text_encoder", "text_encoder_2")
    return Checkpoint(
        path=Path("nowhere"),
        layout="none",
        unet=component("unet", UNet, unet),
        vae=component("vae", VAE, vae),
        text_encoders=tuple(
            component(name, TextEncoder, config) for name, config in zip(names, encoders, strict=False)
        ),
        tokenizers=(CLIPTokenizer(small.vocab, small.merges),) * len(encoders),
        schedule=NoiseSchedule(),
    )


SD15 = published(UNetConfig(), VAEConfig(), CLIP_L)
SDXL = published(SDXL_UNET, SDXL_VAE, CLIP_L, OPEN_CLIP_G)


def test_sd15_fits_into_6_gb() -> None:
    told = peak_bytes(SD15, dtype="float16", batch=1, width=512, height=512)
    parameters = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert told.weights == {name: 2 * count for name, count in parameters.items()}
    assert sum(told.weights.values()) < told.encoding < told.denoising < told.decoding == told.peak < 6 * GB


def test_sdxl_fits_into_12_gb_with_its_vae_in_float32() -> None:
    size = {"dtype": "float16", "batch": 1, "width": 1024, "height": 1024}
    told = peak_bytes(SDXL, **size)
    parameters = {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}
    assert told.weights == {name: 2 * count for name, count in parameters.items()} | {"vae": 4 * 83_653_863}
    assert told.decoding == told.peak < 12 * GB
    offloaded = peak_bytes(SDXL, offload_text_encoders=True, **size)
    texts = 2 * (parameters["text_encoder"] + parameters["text_encoder_2"])
    assert (offloaded.denoising, offloaded.decoding) == (told.denoising - texts, told.decoding - texts)
    assert offloaded.encoding == told.encoding - 2 * parameters["text_encoder"]
    assert offloaded.peak < 10 * GB


def test_larger_batches_and_pictures_need_slices_and_tiles() -> None:
    def decoding(checkpoint: Checkpoint, side: int, batch: int, **settings: bool) -> int:
        return peak_bytes(checkpoint, dtype="float16", batch=batch, width=side, height=side, **settings).decoding

    assert decoding(SD15, 512, 8) > 5 * GB
    assert decoding(SD15, 512, 8, vae_slicing=True) < 3 * GB
    # Four times the pixels of 1024 × 1024, and the memory of one tile.
    assert decoding(SDXL, 2048, 1, vae_tiling=True) < 11 * GB


def test_without_guidance_half_as_much_is_denoised() -> None:
    size = {"dtype": "float16", "batch": 2, "width": 512, "height": 512}
    weights = sum(peak_bytes(SD15, **size).weights.values())
    both, one = (peak_bytes(SD15, guided=guided, **size).denoising - weights for guided in (True, False))
    assert 1.8 < both / one < 2.2


def test_what_a_clip_takes_is_told_before_it_is_loaded() -> None:
    component = clip_component(read_clip_folder(locate_clip("builtin:shapes-clip")))
    clip = component.load("cpu", torch.float32)
    with torch.inference_mode(), live_tensors("cpu") as live:
        clip.vision_model(torch.zeros(3, 3, 64, 64))
    weights = sum(value.nbytes for value in clip.state_dict().values())
    assert image_encoder_bytes(component, 3) == weights + live.peak


def test_on_a_gpu_the_copies_of_norms_and_convolutions_count() -> None:
    size: Any = {"dtype": "bfloat16", "batch": 1, "width": 1024, "height": 1024}
    here, there = (peak_bytes(SDXL, **size, on_gpu=on_gpu) for on_gpu in (False, True))
    # At full size the decoder's widest block holds its input, the norm's copy of it and what the norm makes.
    assert there.decoding - there.resident - (here.decoding - here.resident) >= 2 * 128 * 1024 * 1024
    assert there.denoising - there.resident >= here.denoising - here.resident
    assert there.weights == here.weights


def test_a_large_batch_is_decoded_in_parts_of_a_fixed_size() -> None:
    size: Any = {"dtype": "bfloat16", "width": 1024, "height": 1024}
    eight, four = (peak_bytes(SDXL, **size, batch=batch) for batch in (8, 4))
    # Four more pictures are kept, not made at the same time.
    assert eight.decoding - four.decoding < (four.decoding - four.resident) / 10
