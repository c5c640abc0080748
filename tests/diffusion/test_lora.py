"""Merged adapters against diffusers with peft, on small random networks, for every layout of file."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import diffusers
import peft
import pytest
import safetensors.torch
import torch
import transformers
from diffusers.training_utils import _collate_lora_metadata
from torch import Tensor, nn

from sdbatch.diffusion.lora import merge_lora
from sdbatch.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from sdbatch.diffusion.unet import UNet, UNetConfig
from sdbatch.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers, transformers and peft warn of one another

UNET = UNetConfig(
    block_out_channels=(16, 32),
    attention=(True, False),
    num_attention_heads=(2, 2),
    layers_per_block=1,
    cross_attention_dim=24,
    norm_num_groups=8,
)
TEXT = TextEncoderConfig(
    vocab_size=100,
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
)
CLIP = {**dataclasses.asdict(TEXT), "bos_token_id": 98, "eos_token_id": 99, "projection_dim": 24}


@dataclass(frozen=True)
class Factors:
    """One layer's down (r, in, ...), up (out, r, ...) and alpha."""

    down: Tensor
    up: Tensor
    alpha: float


Adapters = dict[str, Factors]  # by network and layer, such as "unet.conv_in"
Networks = dict[str, nn.Module]
Pipeline = diffusers.StableDiffusionPipeline | diffusers.StableDiffusionXLPipeline


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def text_encoder_like(theirs: nn.Module) -> TextEncoder:
    ours = TextEncoder(TEXT)
    ours.load_state_dict(
        {f"text_model.{key.removeprefix('text_model.')}": value for key, value in theirs.state_dict().items()}
    )
    return ours.eval()


@pytest.fixture
def theirs() -> diffusers.StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=UNET.block_out_channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=UNET.num_attention_heads,
        layers_per_block=UNET.layers_per_block,
        cross_attention_dim=UNET.cross_attention_dim,
        norm_num_groups=UNET.norm_num_groups,
        sample_size=16,
    )
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)).eval(),
        tokenizer=None,
        unet=unet.eval(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def ours(theirs: diffusers.StableDiffusionPipeline) -> Networks:
    unet = UNet(UNET)
    unet.load_state_dict(theirs.unet.state_dict())
    return {"unet": unet.eval(), "text_encoder": text_encoder_like(theirs.text_encoder)}


@pytest.fixture
def plain(theirs: diffusers.StableDiffusionPipeline) -> Networks:
    """diffusers' networks, which will never see an adapter."""
    return {"unet": copy.deepcopy(theirs.unet), "text_encoder": copy.deepcopy(theirs.text_encoder)}


def random_factors(networks: Mapping[str, nn.Module], seed: int = 1) -> Adapters:
    """For every linear and convolution layer, of rank 2 to 4 and any alpha."""
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for network, module in networks.items():
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                out, *source = layer.weight.shape
                rank = 2 + len(adapters) % 3
                down = torch.randn(rank, *source, generator=generator) / layer.weight[0].numel() ** 0.5
                up = torch.randn(out, rank, *[1] * (len(source) - 1), generator=generator) / 4
                adapters[f"{network}.{name}"] = Factors(down, up, 1.0 + len(adapters) % 4)
    return adapters


def only(adapters: Adapters, *words: str) -> Adapters:
    return {name: factors for name, factors in adapters.items() if any(word in name for word in words)}


def outputs(unet: nn.Module, text_encoder: nn.Module) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    latents, context, ids = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 24), torch.randint(0, 100, (2, 16))
    with torch.no_grad():
        return unet(latents, torch.tensor([900.0, 3.0]), context).sample, text_encoder(ids).last_hidden_state


def assert_same(ours: Networks, theirs: Pipeline, plain: Networks, *changed: str) -> None:
    """diffusers' networks compute with our weights what they compute with their own adapter.

    ``changed`` are the networks that no longer compute what they did before.
    """
    before, expected = outputs(**plain), outputs(theirs.unet, theirs.text_encoder)
    for name, network in plain.items():
        load(network, ours[name])
    for name, got, want, old in zip(plain, outputs(**plain), expected, before, strict=True):
        assert relative_error(got, want) <= 1e-4
        assert (relative_error(old, want) > 1e-2) == (name in changed)


def load(theirs: nn.Module, ours: nn.Module) -> None:
    """Some releases of transformers leave "text_model." out of the keys."""
    known = theirs.state_dict().keys()
    theirs.load_state_dict(
        {key if key in known else key.removeprefix("text_model."): value for key, value in ours.state_dict().items()}
    )


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file({key: value.clone() for key, value in tensors.items()}, path, metadata)
    return path


# -- layouts ---------------------------------------------------------------------------------------------


def as_peft(adapters: Adapters, a: str = ".lora_A.weight", b: str = ".lora_B.weight") -> dict[str, Tensor]:
    return {f"{name}{a}": f.down for name, f in adapters.items()} | {f"{name}{b}": f.up for name, f in adapters.items()}


def as_diffusers(adapters: Adapters) -> dict[str, Tensor]:
    unet, text = only(adapters, "unet."), only(adapters, "text_encoder.")
    return as_peft(unet, ".lora.down.weight", ".lora.up.weight") | as_peft(
        text, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"
    )


def as_attention_processors(adapters: Adapters) -> dict[str, Tensor]:
    """Of attention alone: the U-Net's processors, and the text encoder's with the same four names."""
    spelt = {}
    for name, factors in only(adapters, "attn").items():
        layer = name.removesuffix(".0")
        layer = layer.replace("q_proj", "to_q").replace("k_proj", "to_k")
        layer = layer.replace("v_proj", "to_v").replace("out_proj", "to_out")
        path, _, letter = layer.rpartition(".")
        spelt[f"{path}.processor.{letter}" if name.startswith("unet.") else layer] = factors
    return as_peft(spelt, "_lora.down.weight", "_lora.up.weight")


def as_kohya(adapters: Adapters, text_prefix: str = "lora_te") -> dict[str, Tensor]:
    tensors = {}
    for name, factors in adapters.items():
        network, _, layer = name.partition(".")
        prefix = {"unet": "lora_unet", "text_encoder": text_prefix, "text_encoder_2": "lora_te2"}[network]
        flat = f"{prefix}_{layer.replace('.', '_')}"
        tensors[f"{flat}.lora_down.weight"] = factors.down
        tensors[f"{flat}.lora_up.weight"] = factors.up
        tensors[f"{flat}.alpha"] = torch.tensor(factors.alpha)
    return tensors


LAYOUTS: dict[str, tuple[Callable[[Adapters], dict[str, Tensor]], tuple[str, ...]]] = {
    "peft": (as_peft, ("unet.", "text_encoder.")),
    "peft, U-Net alone": (as_peft, ("unet.",)),
    "diffusers": (as_diffusers, ("attn", "ff", "mlp")),
    "attention processors": (as_attention_processors, ("attn",)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_without_alphas(
    layout: str, ours: Networks, theirs: diffusers.StableDiffusionPipeline, plain: Networks, tmp_path: Path
) -> None:
    spell, words = LAYOUTS[layout]
    adapters = only(random_factors(ours), *words)
    path = write(tmp_path / "style.safetensors", spell(adapters))
    theirs.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="style")
    theirs.set_adapters("style", 0.7)
    assert merge_lora(ours, path, 0.7) == len(adapters)
    assert_same(ours, theirs, plain, *{name.partition(".")[0] for name in adapters})


@pytest.mark.parametrize("words", [("attn",), ("attn", "ff", "mlp", "proj_in", "proj_out"), ("resnets", "attn")])
def test_kohya_files(
    words: tuple[str, ...], ours: Networks, theirs: diffusers.StableDiffusionPipeline, plain: Networks, tmp_path: Path
) -> None:
    adapters = {
        name: dataclasses.replace(factors, alpha=1.5) for name, factors in only(random_factors(ours), *words).items()
    }
    path = write(tmp_path / "style.safetensors", as_kohya(adapters))
    theirs.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="style")
    theirs.set_adapters("style", 1.3)
    assert merge_lora(ours, path, 1.3) == len(adapters)
    assert_same(ours, theirs, plain, "unet", "text_encoder")


@pytest.mark.parametrize("spell", ["kohya", "peft"])
def test_every_layer_has_its_own_alpha(
    spell: str, ours: Networks, theirs: diffusers.StableDiffusionPipeline, plain: Networks, tmp_path: Path
) -> None:
    """diffusers loses such alphas of attention layers, and refuses them in peft's layout: it gets α/r within B."""
    adapters = random_factors(ours)
    tensors = as_kohya(adapters)
    if spell == "peft":
        tensors = as_peft(adapters) | {f"{name}.alpha": torch.tensor(f.alpha) for name, f in adapters.items()}
    path = write(tmp_path / "style.safetensors", tensors)
    scaled = {name: dataclasses.replace(f, up=f.up * (f.alpha / f.down.shape[0])) for name, f in adapters.items()}
    theirs.load_lora_weights(as_peft(scaled), adapter_name="style")
    assert merge_lora(ours, path, 1.0) == len(adapters)
    assert_same(ours, theirs, plain, "unet", "text_encoder")


def test_attention_processors_without_the_networks_name(
    ours: Networks, theirs: diffusers.StableDiffusionPipeline, plain: Networks, tmp_path: Path
) -> None:
    tensors = as_attention_processors(only(random_factors(ours), "unet."))
    path = write(
        tmp_path / "pytorch_lora_weights.safetensors", {k.removeprefix("unet."): v for k, v in tensors.items()}
    )
    theirs.load_lora_weights(tensors)
    merge_lora(ours, path, 1.0)
    assert_same(ours, theirs, plain, "unet")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_alphas_in_the_header_that_diffusers_writes(
    use_rslora: bool, ours: Networks, theirs: diffusers.StableDiffusionPipeline, plain: Networks, tmp_path: Path
) -> None:
    """The file comes from the functions that diffusers' training scripts save their adapters with."""
    trainer = copy.deepcopy(theirs)
    settings = {"r": 4, "lora_alpha": 6, "use_rslora": use_rslora, "init_lora_weights": False}
    torch.manual_seed(1)
    trainer.unet.add_adapter(
        peft.LoraConfig(
            target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"],
            alpha_pattern={"to_q": 3, r"mid_block.*to_k": 9, "down_blocks.0.resnets.0.conv1": 1},
            rank_pattern={"to_v": 2},
            **settings,
        )
    )
    trainer.text_encoder.add_adapter(
        peft.LoraConfig(target_modules=["q_proj", "fc1"], alpha_pattern={"encoder.layers.1.mlp.fc1": 2}, **settings)
    )
    networks = {"unet": trainer.unet, "text_encoder": trainer.text_encoder}
    theirs.save_lora_weights(
        tmp_path,
        *(peft.get_peft_model_state_dict(network) for network in networks.values()),
        **_collate_lora_metadata(networks),
    )
    theirs.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    merge_lora(ours, tmp_path / "pytorch_lora_weights.safetensors", 1.0)
    assert_same(ours, theirs, plain, "unet", "text_encoder")


@pytest.mark.parametrize("where", ["{network}.base_model.model.", "base_model.model.{network}."])
def test_the_names_that_peft_puts_round_a_layer(
    where: str, ours: Networks, theirs: diffusers.StableDiffusionPipeline, plain: Networks, tmp_path: Path
) -> None:
    adapters = random_factors(ours)
    wrapped = {
        where.format(network=name.partition(".")[0]) + name.partition(".")[2]: factors
        for name, factors in adapters.items()
    }
    path = write(tmp_path / "style.safetensors", as_peft(wrapped, ".lora_A.default.weight", ".lora_B.default.weight"))
    theirs.load_lora_weights(as_peft(adapters))
    merge_lora(ours, path, 1.0)
    assert_same(ours, theirs, plain, "unet", "text_encoder")


def test_several_adapters_add_up_by_their_weights(
    ours: Networks, theirs: diffusers.StableDiffusionPipeline, plain: Networks, tmp_path: Path
) -> None:
    for name, seed, weight in (("ink", 1, 0.8), ("snow", 2, -0.3)):
        path = write(tmp_path / f"{name}.safetensors", as_peft(random_factors(ours, seed)))
        theirs.load_lora_weights(tmp_path, weight_name=path.name, adapter_name=name)
        merge_lora(ours, path, weight)
    theirs.set_adapters(["ink", "snow"], [0.8, -0.3])
    assert_same(ours, theirs, plain, "unet", "text_encoder")


SGM = {  # a layer of each kind of the U-Net below, as SDXL's own code and as diffusers name it
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.in_layers.2": "down_blocks.1.resnets.0.conv1",
    "input_blocks.4.0.emb_layers.1": "down_blocks.1.resnets.0.time_emb_proj",
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks.5.1.proj_in": "down_blocks.1.attentions.1.proj_in",
    "middle_block.1.transformer_blocks.0.attn2.to_k": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "middle_block.1.transformer_blocks.1.attn1.to_out.0": "mid_block.attentions.0.transformer_blocks.1.attn1.to_out.0",
    "output_blocks.1.1.transformer_blocks.1.ff.net.2": "up_blocks.0.attentions.1.transformer_blocks.1.ff.net.2",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "out.2": "conv_out",
}


@pytest.mark.parametrize("original", [True, False])
def test_kohya_files_for_sdxl(original: bool, tmp_path: Path) -> None:
    """Two text encoders, and the U-Net's layers by the names of either code.

    diffusers knows "label_emb" of such files, but not its own name for it, "add_embedding".
    """
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=48,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    ).eval()
    theirs = diffusers.StableDiffusionXLPipeline(
        vae=None,
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)).eval(),
        text_encoder_2=transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**CLIP)).eval(),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        add_watermarker=False,
    )
    plain: Networks = {
        name: copy.deepcopy(getattr(theirs, name)) for name in ("unet", "text_encoder", "text_encoder_2")
    }
    # These two of diffusers have our names and stand for ours.
    ours = {**copy.deepcopy(plain), "text_encoder": text_encoder_like(theirs.text_encoder)}
    known = {f"unet.{layer}": f"unet.{name}" for name, layer in SGM.items()}
    adapters = {
        name: dataclasses.replace(factors, alpha=2.0)
        for name, factors in random_factors(ours).items()
        if name.startswith("text_encoder") or (name in known and (original or "add_embedding" not in name))
    }
    spelt = {known.get(name, name) if original else name: factors for name, factors in adapters.items()}
    path = write(tmp_path / "style.safetensors", as_kohya(spelt, "lora_te1"))
    theirs.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="style")
    theirs.set_adapters("style", 0.6)

    def compute(unet: nn.Module, text_encoder: nn.Module, text_encoder_2: nn.Module, **_: None) -> list[Tensor]:
        torch.manual_seed(5)
        ids, latents, context = torch.randint(0, 100, (2, 16)), torch.randn(2, 4, 16, 16), torch.randn(2, 7, 48)
        extra = {"text_embeds": torch.randn(2, 24), "time_ids": torch.rand(2, 6) * 100}
        with torch.no_grad():
            return [
                unet(latents, 500, context, added_cond_kwargs=extra).sample,
                text_encoder(ids).last_hidden_state,
                text_encoder_2(ids).text_embeds,
            ]

    before = compute(**plain)
    assert merge_lora(ours, path, 0.6, SGM if original else {}) == len(adapters)
    for name, network in plain.items():
        load(network, ours[name])
    for got, expected, old in zip(compute(**plain), compute(**theirs.components), before, strict=True):
        assert relative_error(got, expected) <= 1e-4
        assert relative_error(old, expected) > 1e-2


# -- what it does to the weights -------------------------------------------------------------------------


def test_linear_factors_fit_a_1x1_convolution_and_the_other_way_round(ours: Networks, tmp_path: Path) -> None:
    names = "unet.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    adapters = {name: factors for name, factors in random_factors(ours).items() if name in names}
    turned = {
        name: dataclasses.replace(
            f,
            **{
                part: t.flatten(1) if t.ndim == 4 else t[..., None, None]
                for part, t in (("down", f.down), ("up", f.up))
            },
        )
        for name, f in adapters.items()
    }
    twin = copy.deepcopy(ours)
    merge_lora(ours, write(tmp_path / "a.safetensors", as_peft(adapters)), 1.0)
    merge_lora(twin, write(tmp_path / "b.safetensors", as_peft(turned)), 1.0)
    for name in names:
        layer = name.removeprefix("unet.")
        assert torch.equal(ours["unet"].get_submodule(layer).weight, twin["unet"].get_submodule(layer).weight)


def test_the_sum_is_float32_whatever_the_weights_are(ours: Networks, tmp_path: Path) -> None:
    for network in ours.values():
        network.to(torch.bfloat16).requires_grad_(False)
    adapters = random_factors(ours)
    layer, factors = ours["unet"].get_submodule("conv_in"), adapters["unet.conv_in"]
    old = layer.weight
    kept = old.clone()
    delta = torch.einsum("or,rihw->oihw", factors.up[..., 0, 0], factors.down)
    merge_lora(ours, write(tmp_path / "style.safetensors", as_peft(adapters)), 0.5)
    assert torch.equal(old, kept), "the tensor that was the weight may be a view of the checkpoint's file"
    assert layer.weight.dtype == torch.bfloat16
    assert not layer.weight.requires_grad
    assert torch.equal(layer.weight, (kept.float() + 0.5 * delta).bfloat16())


# -- errors ----------------------------------------------------------------------------------------------

ATTENTION = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TWO = torch.zeros(2, 32)
FAULTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "another model": (
        {f"unet.down_blocks.7.layer{i}.lora_A.weight": TWO for i in range(5)},
        r"5 keys \(unet\.down_blocks\.7\.layer0\.lora_A\.weight, .*, …\) .*another model family",
    ),
    "a kohya name": ({"lora_te2_text_projection.lora_down.weight": TWO}, r"1 key \(lora_te2_.*another model family"),
    "a whole model": ({"unet.conv_in.weight": TWO}, r"1 key \(unet\.conv_in\.weight\).*low-rank factors"),
    "another width": (
        {f"{ATTENTION}.lora_A.weight": torch.zeros(2, 1024), f"{ATTENTION}.lora_B.weight": torch.zeros(32, 2)},
        r"\(2, 1024\) and \(32, 2\) for the layer unet\.mid_block.* \(32, 32\); .*another model family",
    ),
    "other ranks": (
        {f"{ATTENTION}.lora_A.weight": TWO, f"{ATTENTION}.lora_B.weight": torch.zeros(32, 3)},
        r"\(2, 32\) and \(32, 3\)",
    ),
    "rank 0": (
        {f"{ATTENTION}.lora_A.weight": torch.zeros(0, 32), f"{ATTENTION}.lora_B.weight": torch.zeros(32, 0)},
        r"\(0, 32\) and \(32, 0\)",
    ),
    "a vector": (
        {f"{ATTENTION}.lora_A.weight": torch.zeros(32), f"{ATTENTION}.lora_B.weight": torch.zeros(32, 2)},
        r"\(32,\) and \(32, 2\)",
    ),
    "half a pair": ({f"{ATTENTION}.lora_A.weight": TWO}, r"lacks the 'up' factor of the layer unet\.mid_block"),
    "a layer twice": (
        {f"{ATTENTION}.lora_A.weight": TWO, f"{ATTENTION}.lora.down.weight": TWO},
        r"a second 'down' tensor for the layer unet\.mid_block",
    ),
    "two alphas in one": (
        {
            f"{ATTENTION}.lora_A.weight": TWO,
            f"{ATTENTION}.lora_B.weight": torch.zeros(32, 2),
            f"{ATTENTION}.alpha": torch.ones(2),
        },
        "an alpha that is not a single number",
    ),
    "empty": ({}, "is empty"),
    "LoHa": ({"lora_unet_conv_in.hada_w1_a": TWO}, r"not supported, LoHa, .*lora_unet_conv_in\.hada_w1_a"),
    "LoKr": ({"lora_unet_conv_in.lokr_w1": TWO}, "not supported, LoKr"),
    "DoRA of kohya": ({"lora_unet_conv_in.dora_scale": TWO}, "not supported, DoRA"),
    "DoRA of peft": ({"unet.conv_in.lora_magnitude_vector": TWO}, "not supported, DoRA"),
    "LoCon": ({"lora_unet_conv_in.lora_mid.weight": TWO}, "not supported, LoCon"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_changes_nothing(fault: str, ours: Networks, tmp_path: Path) -> None:
    tensors, message = FAULTS[fault]
    good = as_peft({"unet.conv_in": random_factors(ours)["unet.conv_in"]}) if tensors else {}
    path = write(tmp_path / "style.safetensors", good | tensors)
    before = {name: copy.deepcopy(network.state_dict()) for name, network in ours.items()}
    with pytest.raises(ModelError, match=message) as error:
        merge_lora(ours, path, 1.0)
    assert str(path) in str(error.value)
    for name, network in ours.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, before[name][key])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [("{", "is not JSON"), ('{"unet.lora_alpha": "high"}', "alpha"), ('{"unet.alpha_pattern": {"(": 2}}', "alpha")],
)
def test_metadata_that_can_not_be_read(metadata: str, message: str, ours: Networks, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", as_peft(random_factors(ours)), {"lora_adapter_metadata": metadata})
    with pytest.raises(ModelError, match=message):
        merge_lora(ours, path, 1.0)


def test_files_that_are_not_safetensors(ours: Networks, tmp_path: Path) -> None:
    for name in ("style.pt", "style.bin", "style.ckpt"):
        with pytest.raises(ModelError, match=rf"{name} is a pickle.*convert it to \.safetensors"):
            merge_lora(ours, tmp_path / name, 1.0)
    with pytest.raises(ModelError, match=r"missing\.safetensors can't be read"):
        merge_lora(ours, tmp_path / "missing.safetensors", 1.0)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ModelError, match=r"cut\.safetensors can't be read"):
        merge_lora(ours, tmp_path / "cut.safetensors", 1.0)
