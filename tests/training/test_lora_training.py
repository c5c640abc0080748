"""Branches beside linear layers: nothing changes before they learn, only they do, others load what they learnt."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path

import diffusers
import pytest
import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdbatch.diffusion import LatentDiffusion, Lora
from sdbatch.diffusion.text_encoder import TextEncoder
from sdbatch.diffusion.unet import UNet, UNetConfig
from sdbatch.errors import UsageError
from sdbatch.training.lora import add_lora, lora_state, save_lora

CONFIG = UNetConfig(
    block_out_channels=(16, 32),
    attention=(True, False),
    num_attention_heads=(2, 2),
    layers_per_block=1,
    cross_attention_dim=24,
    norm_num_groups=8,
)
TRANSFORMER = "mid_block.attentions.0.transformer_blocks.0"


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG)


def inputs(width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    latents, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, width, generator=generator)
    return latents, torch.tensor([900.0, 3.0]), context


def learnt(network: nn.Module) -> nn.Module:
    """With branches that are no longer zero."""
    torch.manual_seed(3)
    for parameter in add_lora(network, 3).values():
        nn.init.normal_(parameter, std=0.2)
    return network


# -- the branches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changes_at_the_start(unet: UNet, dtype: torch.dtype) -> None:
    unet.to(dtype)
    latents, timesteps, context = inputs()
    before, state = unet(latents.to(dtype), timesteps, context.to(dtype)), dict(unet.state_dict())
    branches = add_lora(unet, 4)
    assert torch.equal(unet(latents.to(dtype), timesteps, context.to(dtype)), before)
    assert {branch.dtype for branch in branches.values()} == {torch.float32}
    after = unet.state_dict()
    assert after.keys() == state.keys() | branches.keys()
    assert all(after[key].data_ptr() == value.data_ptr() for key, value in state.items())


def test_a_starts_as_a_linear_layer_does_and_b_as_zeros(unet: UNet) -> None:
    branches = add_lora(unet, 6, ["to_k"])
    for name, branch in branches.items():
        width = unet.get_submodule(name.rpartition(".")[0]).weight.shape[1]
        if name.endswith("lora_B"):
            assert not branch.any()
        else:
            assert branch.shape == (6, width)
            assert 0.8 / math.sqrt(width) < branch.abs().max() <= 1 / math.sqrt(width)


def test_branches_come_from_their_seed_alone(unet: UNet) -> None:
    def drawn(seed: int, generator: torch.Generator | None = None) -> list[Tensor]:
        torch.manual_seed(seed)
        return list(add_lora(copy.deepcopy(unet), 2, generator=generator).values())

    first, *_ = drawn(1)
    assert all(torch.equal(a, b) for a, b in zip(drawn(1), drawn(1), strict=True))
    assert not torch.equal(first, drawn(2)[0])
    assert torch.equal(first, drawn(2, torch.Generator().manual_seed(1))[0])


def test_targets_are_whole_parts_of_names(unet: UNet) -> None:
    every, text, outputs = (
        {name.removesuffix(".lora_A") for name in add_lora(copy.deepcopy(unet), 1, targets) if name.endswith("_A")}
        for targets in (None, ["attn2.to_q"], ["0", "to_out.0"])
    )
    assert {name.partition(".attn")[2][2:] for name in every} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert f"{TRANSFORMER}.attn2.to_q" in text
    assert all(name.endswith(".attn2.to_q") for name in text)
    assert all(name.endswith("to_out.0") for name in outputs)


@pytest.mark.parametrize(
    ("rank", "targets", "message"),
    [
        (0, None, "rank 0 can't be trained"),
        (4, ["to_q", "o_k"], "no linear layer is called o_k; there are .*attn1.to_k"),
        (4, ["proj_in"], "called proj_in"),  # a convolution here
        (4, ["q_proj", "fc1"], "called q_proj or fc1"),
    ],
)
def test_what_can_not_be_adapted(unet: UNet, rank: int, targets: list[str] | None, message: str) -> None:
    keys = unet.state_dict().keys()
    with pytest.raises(UsageError, match=message):
        add_lora(unet, rank, targets)
    assert unet.state_dict().keys() == keys
    assert all(parameter.requires_grad for parameter in unet.parameters())


# -- learning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_branches_learn_and_they_do(unet: UNet, dtype: torch.dtype) -> None:
    branches = add_lora(unet.to(dtype), 8)
    frozen = {name: value.clone() for name, value in unet.state_dict().items() if name not in branches}
    latents, timesteps, context = inputs()
    target = torch.randn(latents.shape, generator=torch.Generator().manual_seed(6))
    optimizer = torch.optim.AdamW(branches.values(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(unet(latents.to(dtype), timesteps, context.to(dtype)).float(), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert {name for name, value in unet.named_parameters() if value.grad is not None} == branches.keys()
    assert all(branch.grad.any() for branch in branches.values())
    state = unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())


# -- files -----------------------------------------------------------------------------------------------


def test_the_file_holds_the_branches_in_the_layout_of_peft(unet: UNet, tmp_path: Path) -> None:
    learnt(unet)
    path = save_lora(tmp_path / "new", {"unet": unet}, dtype="bfloat16")
    assert path == tmp_path / "new/pytorch_lora_weights.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert stored.keys() == lora_state({"unet": unet}).keys()
    up = stored[f"unet.{TRANSFORMER}.attn1.to_out.0.lora_B.weight"]
    assert (up.shape, up.dtype) == ((32, 3), torch.bfloat16)
    assert torch.equal(up, unet.get_submodule(f"{TRANSFORMER}.attn1.to_out.0").lora_B.bfloat16())


def text_states(encoder: TextEncoder, ids: Tensor) -> Tensor:
    return encoder.normalise(encoder(ids)[-1])


@pytest.mark.parametrize("with_text", [False, True])
@torch.no_grad()
def test_diffusers_and_our_own_pipeline_compute_what_the_branches_do(
    with_text: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = LatentDiffusion.from_pretrained("builtin:shapes")
    encoder = trained.text_encoders[0]
    latents, timesteps, context = inputs(encoder.config.hidden_size)
    ids = torch.tensor(trained.tokenizer(["a red circle", "two"]))
    plain = trained.unet(latents, timesteps, context), text_states(encoder, ids)
    learnt(trained.unet)
    if with_text:
        learnt(encoder)
    path = save_lora(tmp_path, {"unet": trained.unet, "text_encoder": encoder})
    expected = trained.unet(latents, timesteps, context), text_states(encoder, ids)
    assert (expected[0] - plain[0]).abs().max() > 0.1
    assert torch.equal(expected[1], plain[1]) != with_text

    ours = LatentDiffusion.from_pretrained("builtin:shapes", adaptations=[Lora(path)])
    got = ours.unet(latents, timesteps, context), text_states(ours.text_encoders[0], ids)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    pictures = [model.generate(["a red circle"], seeds=[1], num_inference_steps=2) for model in (trained, ours)]
    assert abs(pictures[0].astype(int) - pictures[1].astype(int)).max() <= 1

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(trained.checkpoint.path)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("peft"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(tmp_path)
    theirs = pipeline.unet(latents, timesteps, context).sample, pipeline.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)
    # diffusers says so of its own files, too, where a network was not trained.
    assert [text for text in caplog.messages if with_text or "No LoRA keys associated to CLIPText" not in text] == []
