"""Each network of each family against diffusers and transformers: what it computes, and its names and shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdbatch.diffusion import configs, folder
from sdbatch.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from sdbatch.diffusion.unet import Added, UNet, UNetConfig
from sdbatch.diffusion.vae import VAE, VAEConfig
from sdbatch.diffusion.weights import skeletons
from sdbatch.errors import ModelError
from tests.diffusion.families import FULL, shapes
from tests.diffusion.parity import FAMILIES, NETWORKS

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracles warn of one another


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_computes_what_the_reference_computes(
    family: str, network: str, model_folder: Callable[[str], Path]
) -> None:
    errors = NETWORKS[network](model_folder(family), torch.float32)
    assert max(errors.values()) <= 1e-4, errors


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_rounds_as_the_reference_rounds(
    family: str, network: str, model_folder: Callable[[str], Path]
) -> None:
    errors = NETWORKS[network](model_folder(family), torch.bfloat16)
    assert max(errors.values()) <= 1e-2, errors


#: Parameters of U-Net, VAE and text encoders, as the published models are known by them.
COUNTS = {
    "SD 1.x": (859_520_964, 83_653_863, 123_060_480),
    "SD 1.x inpainting": (859_535_364, 83_653_863, 123_060_480),
    "SD 2.x": (865_910_724, 83_653_863, 340_387_840),
    "SDXL": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
    "SDXL refiner": (2_259_526_660, 83_653_863, 694_659_840),
}


@pytest.mark.parametrize("family", FULL)
def test_full_size_has_the_published_names_shapes_and_parameters(family: str, tmp_path: Path) -> None:
    full = FULL[family]
    with torch.device("meta"):
        unet, vae = full.build_unet(), full.build_vae()
        encoders = [encoder.build() for encoder in full.encoders]
    unet.save_config(tmp_path / "unet")
    vae.save_config(tmp_path / "vae")
    with skeletons():
        ours = [
            UNet(configs.read_unet_config(tmp_path / "unet/config.json")),
            VAE(configs.read_vae_config(tmp_path / "vae/config.json")),
        ]
        for encoder in encoders:
            encoder.config.architectures = [type(encoder).__name__]
            encoder.config.save_pretrained(tmp_path / "text")
            ours.append(TextEncoder(configs.read_text_config(tmp_path / "text/config.json")))
    assert [shapes(module) for module in ours[:2]] == [shapes(unet), shapes(vae)]
    assert [shapes(module) for module in ours[2:]] == [shapes(encoder, "text_model.") for encoder in encoders]
    assert tuple(sum(value.numel() for value in module.parameters()) for module in ours) == COUNTS[family]


def test_the_defaults_are_those_of_sd_1() -> None:
    with skeletons():
        counts = [UNet(UNetConfig()), VAE(VAEConfig()), TextEncoder(TextEncoderConfig())]
    assert tuple(sum(value.numel() for value in module.parameters()) for module in counts) == COUNTS["SD 1.x"]


def test_a_unet_that_is_told_sizes_does_not_run_without(model_folder: Callable[[str], Path]) -> None:
    unet = folder.read_unet(model_folder("SDXL") / "unet").load("cpu", torch.float32)
    z, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, unet.config.cross_attention_dim)
    with pytest.raises(ValueError, match="sizes"):
        unet(z, torch.tensor([1.0]), text)
    assert unet(z, torch.tensor([1.0]), text, Added(torch.zeros(1, 64), torch.zeros(1, 6))).shape == z.shape


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(block_out_channels=(32, 40)),
        UNetConfig(block_out_channels=()),
        UNetConfig(num_attention_heads=(7, 7, 7, 7)),
        UNetConfig(transformer_layers=([1, 2],) * 4),  # type: ignore[arg-type]
        UNetConfig(in_channels="four"),  # type: ignore[arg-type]
    ],
)
def test_sizes_that_do_not_go_together_are_a_model_error(config: UNetConfig) -> None:
    with pytest.raises(ModelError, match="no network can be built"), skeletons():
        UNet(config)
