"""Convolutions that are packed once: the bytes of those that are not, whatever happens to their weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from sdbatch.diffusion import LatentDiffusion
from sdbatch.diffusion.convolution import Conv2d, pack_convolutions, packed_bytes

FORMATS = [torch.float32, *([torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])]

pytestmark = pytest.mark.skipif(not packed_bytes(Conv2d(8, 8, 3)), reason="this machine's torch has no such kernels")


@pytest.fixture
def layers() -> tuple[Conv2d, nn.Conv2d]:
    """A layer that is packed and one with the same weights that is not."""
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 24, 3, padding=1).requires_grad_(False)
    packed = Conv2d(8, 24, 3, padding=1).requires_grad_(False)
    packed.load_state_dict(plain.state_dict())
    pack_convolutions(packed)
    return packed, plain


def same(layers: tuple[Conv2d, nn.Conv2d], *shape: int) -> bool:
    packed, plain = layers
    x = torch.randn(shape, dtype=plain.weight.dtype)
    with torch.inference_mode():
        return torch.equal(packed(x), plain(x))


@pytest.mark.parametrize("dtype", FORMATS)
def test_shapes_may_come_in_turns(layers: tuple[Conv2d, nn.Conv2d], dtype: torch.dtype) -> None:
    for layer in layers:
        layer.to(dtype)
    for shape in ((2, 8, 16, 16), (2, 8, 16, 16), (2, 8, 5, 7), (16, 8, 4, 4), (2, 8, 16, 16)):
        assert same(layers, *shape)


def test_weights_are_packed_once(layers: tuple[Conv2d, nn.Conv2d]) -> None:
    packed, _ = layers
    assert same(layers, 2, 8, 4, 4)
    first = packed._packed
    assert first is not None
    assert same(layers, 2, 8, 4, 4)
    assert packed._packed is first


def test_changed_weights_are_followed(layers: tuple[Conv2d, nn.Conv2d]) -> None:
    packed, plain = layers
    assert same(layers, 2, 8, 4, 4)
    for layer in layers:
        layer.weight.mul_(0.5)  # in place
    assert same(layers, 2, 8, 4, 4)
    weight = nn.Parameter(plain.weight + 1, requires_grad=False)
    packed.weight = plain.weight = weight
    assert same(layers, 2, 8, 4, 4)


def test_weights_made_for_inference_are_packed_too() -> None:
    with torch.inference_mode():
        packed, x = Conv2d(8, 8, 3), torch.randn(2, 8, 6, 6)
        expected = packed(x)
        pack_convolutions(packed)
        assert torch.allclose(packed(x), expected, atol=1e-6)
        assert packed._packed is not None


def test_a_format_without_kernels_takes_the_plain_way(layers: tuple[Conv2d, nn.Conv2d]) -> None:
    assert same(layers, 2, 8, 4, 4)
    for layer in layers:
        layer.to(torch.float64)
    assert same(layers, 2, 8, 4, 4)


def test_gradients_are_those_of_a_plain_layer(layers: tuple[Conv2d, nn.Conv2d]) -> None:
    assert same(layers, 2, 8, 4, 4)
    x = torch.randn(2, 8, 4, 4)
    gradients = []
    for layer in layers:
        layer.requires_grad_(True)
        layer(x).square().sum().backward()
        gradients.append(layer.weight.grad)
    assert torch.equal(*gradients)


def test_copies_are_packed_anew(layers: tuple[Conv2d, nn.Conv2d]) -> None:
    packed, plain = layers
    assert same(layers, 2, 8, 4, 4)
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert again.packs
        assert again._packed is None
        assert same((again, plain), 2, 8, 4, 4)


@pytest.mark.parametrize("dtype", [str(kind).removeprefix("torch.") for kind in FORMATS])
def test_pictures_have_the_bytes_of_a_model_that_is_not_packed(dtype: str) -> None:
    packed, plain = (LatentDiffusion.from_pretrained("builtin:shapes", dtype=dtype) for _ in range(2))
    convolutions = [module for module in plain.unet.modules() if isinstance(module, Conv2d)]
    assert all(module.packs for module in convolutions)
    for module in convolutions:
        module.packs = False
    for batch, guidance in ((1, 5.0), (3, 1.0)):
        prompts, settings = ["a red circle"] * batch, {"num_inference_steps": 3, "guidance_scale": guidance}
        ours = packed.generate(prompts, seeds=range(batch), **settings)
        assert (ours == plain.generate(prompts, seeds=range(batch), **settings)).all()
    weights = [module.weight for module in packed.unet.modules() if isinstance(module, Conv2d)]
    assert packed_bytes(packed.unet) == sum(weight.nbytes for weight in weights)
