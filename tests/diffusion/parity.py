"""How far our networks are from diffusers' and transformers': family × network, as one table.

    python -m tests.diffusion.parity

Relative errors ‖ours - theirs‖ / ‖theirs‖ on random weights of small sizes, both in the same number format: in
bfloat16 either is a percent away from its own float32, which would tell rounding, not mistakes.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers

from sdbatch.diffusion import open_checkpoint
from sdbatch.diffusion.folder import ENCODERS, read_text_encoder, read_unet, read_vae
from sdbatch.diffusion.unet import Added
from tests.diffusion.families import SMALL, build_pipeline, relative_error

Errors = dict[str, float]
FAMILIES = [*SMALL, "shapes"]


@torch.no_grad()
def unet_errors(model: Path, dtype: torch.dtype) -> Errors:
    theirs = diffusers.UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=dtype)
    ours = read_unet(model / "unet").load("cpu", dtype)
    torch.manual_seed(1)
    config = ours.config
    context = torch.randn(2, 7, config.cross_attention_dim).to(dtype)
    timesteps = torch.tensor([999.0, 13.5])
    added, told = None, None
    if config.added_dim:
        count = config.added_dim % config.added_sizes_dim, config.added_dim // config.added_sizes_dim
        added = Added(torch.randn(2, count[0]).to(dtype), torch.randint(0, 1024, (2, count[1])).float())
        told = {"text_embeds": added.pooled, "time_ids": added.sizes}
    errors = {}
    for name, size in (("U-Net", (16, 24)), ("U-Net, odd size", (9, 13))):
        z = torch.randn(2, config.in_channels, *size).to(dtype)
        expected = theirs(z, timesteps, context, added_cond_kwargs=told).sample
        errors[name] = relative_error(ours(z, timesteps, context, added), expected)
    return errors


@torch.no_grad()
def vae_errors(model: Path, dtype: torch.dtype) -> Errors:
    theirs = diffusers.AutoencoderKL.from_pretrained(model / "vae", torch_dtype=dtype)
    component = read_vae(model / "vae")
    ours = dataclasses.replace(component, config=dataclasses.replace(component.config, sample_size=48)).load(
        "cpu", dtype
    )
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = 48, 48 // ours.config.downscale
    torch.manual_seed(1)
    images = (torch.rand(2, 3, 72, 104) * 2 - 1).to(dtype)
    latents = torch.randn(2, 4, 18, 26).to(dtype)
    errors = {}
    for name, tiled in (("", False), (", tiled", True)):
        theirs.use_tiling = tiled
        posterior = theirs.encode(images).latent_dist
        ours_mean, ours_variance = ours.encode(images, tiled=tiled)
        of_variance = relative_error(ours_variance, posterior.logvar)
        errors[f"VAE encode{name}"] = max(relative_error(ours_mean, posterior.mean), of_variance)
        errors[f"VAE decode{name}"] = relative_error(ours.decode(latents, tiled=tiled), theirs.decode(latents).sample)
    return errors


@torch.no_grad()
def text_errors(model: Path, dtype: torch.dtype) -> Errors:
    """The worst of the model's text encoders."""
    errors: Errors = {}
    for name in ENCODERS:
        if not (model / name).is_dir():
            continue
        ours = read_text_encoder(model / name).load("cpu", dtype)
        config = ours.config
        projects = config.projection_dim is not None
        kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
        theirs = kind.from_pretrained(model / name, dtype=dtype)
        eos = theirs.config.eos_token_id
        torch.manual_seed(1)
        ids = torch.randint(3, min(config.vocab_size, eos), (3, config.max_position_embeddings))
        for row, end in enumerate((2, 6, config.max_position_embeddings - 1)):
            ids[row, end:] = eos
        expected = theirs(ids, output_hidden_states=True)
        states = ours(ids)
        pooled = expected.text_embeds if projects else expected.pooler_output
        found = {
            "text, last": relative_error(ours.normalise(states[-1]), expected.last_hidden_state),
            "text, penultimate": relative_error(states[-2], expected.hidden_states[-2]),
            "text, pooled": relative_error(ours.pool(states[-1], ids, eos), pooled),
        }
        errors = {key: max(error, errors.get(key, 0.0)) for key, error in found.items()}
    return errors


NETWORKS: dict[str, Callable[[Path, torch.dtype], Errors]] = {
    "unet": unet_errors,
    "vae": vae_errors,
    "text": text_errors,
}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        rows = {}
        for name in FAMILIES:
            with tempfile.TemporaryDirectory() as folder:
                model = Path(folder) / "model"
                if name == "shapes":
                    model = open_checkpoint("builtin:shapes").path
                else:
                    build_pipeline(name, Path(folder) / "spelling").save_pretrained(model)
                rows[name] = {
                    key: error for measure in NETWORKS.values() for key, error in measure(model, dtype).items()
                }
        print(f"| {str(dtype).removeprefix('torch.')} | " + " | ".join(rows[FAMILIES[0]]) + " |")
        print("| --- |" + " ---: |" * len(rows[FAMILIES[0]]))
        for name, errors in rows.items():
            print(f"| {name} | " + " | ".join(f"{error:.1e}" for error in errors.values()) + " |")


if __name__ == "__main__":
    main()
