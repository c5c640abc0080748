"""The latent diffusion model by itself: torch and safetensors, no Ray, no job, no storage.

>>> from sdbatch.diffusion import LatentDiffusion
>>> model = LatentDiffusion.from_pretrained("builtin:shapes")
>>> pictures = model.generate(["a red circle on a white background"], seeds=[7])
"""

from sdbatch.diffusion.pipeline import LatentDiffusion, ModelInfo, describe, to_uint8
from sdbatch.diffusion.samplers import SAMPLERS
from sdbatch.diffusion.schedule import NoiseSchedule

__all__ = ["SAMPLERS", "LatentDiffusion", "ModelInfo", "NoiseSchedule", "describe", "to_uint8"]
