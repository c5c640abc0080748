"""The latent diffusion model by itself: torch and safetensors, no Ray, no job, no storage.

>>> from sdbatch.diffusion import LatentDiffusion
>>> model = LatentDiffusion.from_pretrained("builtin:shapes")
>>> pictures = model.generate(["a red circle on a white background"], seeds=[7])
"""

from sdbatch.diffusion.adapters import Adaptation, Lora, TextualInversion
from sdbatch.diffusion.checkpoint import Checkpoint
from sdbatch.diffusion.conditioning import Reading
from sdbatch.diffusion.locate import open_checkpoint
from sdbatch.diffusion.pipeline import LatentDiffusion, to_uint8
from sdbatch.diffusion.samplers import SAMPLERS
from sdbatch.diffusion.schedule import NoiseSchedule

__all__ = [
    "SAMPLERS",
    "Adaptation",
    "Checkpoint",
    "LatentDiffusion",
    "Lora",
    "NoiseSchedule",
    "Reading",
    "TextualInversion",
    "open_checkpoint",
    "to_uint8",
]
