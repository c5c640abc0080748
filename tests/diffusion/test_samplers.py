"""Each sampler against the diffusers scheduler of that name, step for step, on a small random U-Net."""

from __future__ import annotations

import dataclasses
from typing import Any

import diffusers
import pytest
import torch

from sdbatch.diffusion.configs import scheduler_json
from sdbatch.diffusion.grids import Step
from sdbatch.diffusion.samplers import SAMPLERS, Denoiser, most_steps, sample, start_scale, steps_of
from sdbatch.diffusion.schedule import NoiseSchedule
from sdbatch.diffusion.unet import UNet, UNetConfig

KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
_MULTISTEP = diffusers.DPMSolverMultistepScheduler
_SDE = {"algorithm_type": "sde-dpmsolver++"}
REFERENCES: dict[str, tuple[type, dict[str, Any]]] = {
    "ddpm": (diffusers.DDPMScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {}),
    "plms": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "lcm": (diffusers.LCMScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    **{
        name + suffix: (kind, {**settings, **levels})
        for name, kind, settings in (
            ("euler", diffusers.EulerDiscreteScheduler, {}),
            ("heun", diffusers.HeunDiscreteScheduler, {}),
            ("dpmpp_sde", diffusers.DPMSolverSDEScheduler, {}),
            ("dpmpp_2m", _MULTISTEP, {}),
            ("dpmpp_2m_sde", _MULTISTEP, _SDE),
            ("unipc", diffusers.UniPCMultistepScheduler, {}),
        )
        for suffix, levels in (("", {}), ("_karras", KARRAS), ("_exponential", EXPONENTIAL))
    },
}
#: Schedulers that know no zero terminal SNR, and so can't be asked what it should give.
NO_ZERO_SNR = {"plms", *(name for name in REFERENCES if name.startswith(("heun", "dpmpp_sde")))}
#: Schedulers that draw noise from the generators they are given.
DRAW = {"ddpm", "euler_ancestral", "lcm", *(name for name in REFERENCES if name.startswith("dpmpp_2m_sde"))}

SCHEDULES = {
    "sd15": NoiseSchedule(steps_offset=1, set_alpha_to_one=False),
    "leading": NoiseSchedule(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False),
    "trailing": NoiseSchedule(timestep_spacing="trailing"),
    "linspace": NoiseSchedule(timestep_spacing="linspace", beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "zero_snr": NoiseSchedule(timestep_spacing="trailing", rescale_betas_zero_snr=True),
}

SEEDS = (11, 12)
SHAPE = (4, 6, 6)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(16,),
        attention=(True,),
        num_attention_heads=(2,),
        layers_per_block=1,
        cross_attention_dim=16,
        norm_num_groups=8,
    )
    return UNet(config).eval().requires_grad_(False)


def generators() -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]


def ours(
    name: str, schedule: NoiseSchedule, count: int, unet: UNet, context: torch.Tensor, eta: float = 0.0
) -> torch.Tensor:
    streams = generators()

    def network(z: torch.Tensor, step: Step) -> torch.Tensor:
        return unet(z, torch.full((len(SEEDS),), step.t), context)

    def noise() -> torch.Tensor:
        return torch.stack([torch.randn(SHAPE, generator=stream) for stream in streams])

    steps = steps_of(name, schedule, count)
    start = start_scale(name, schedule, steps) * noise()
    return sample(name, Denoiser(network, schedule), start, steps, noise, eta=eta)


def runs_off(name: str, schedule: NoiseSchedule, count: int) -> bool:
    """Do the reference's first two steps fall on one time step? It looks its place up by the time step."""
    timesteps = [step.t for step in steps_of(name, schedule, count)]
    return timesteps[0] == timesteps[1]


class BrownianPath:
    """What the reference takes from a Brownian tree, from the images' own streams: half a step, then all of it."""

    def __init__(self, streams: list[torch.Generator]) -> None:
        self.streams = streams
        self.half: tuple[float, float] | None = None

    def __call__(self, level: float, level_next: float) -> torch.Tensor:
        start, end = float(level), float(level_next)
        if self.half is None:
            self.half = (start, end)
            self.noise = [
                torch.stack([torch.randn(SHAPE, generator=stream) for stream in self.streams]) for _ in range(2)
            ]
            return self.noise[0]
        middle, self.half = self.half[1], None
        both = (start - middle) ** 0.5 * self.noise[0] + (middle - end) ** 0.5 * self.noise[1]
        return both / (start - end) ** 0.5


def theirs(
    name: str, schedule: NoiseSchedule, count: int, unet: UNet, context: torch.Tensor, **extra: float
) -> torch.Tensor:
    kind, settings = REFERENCES[name]
    # A parameter that a scheduler class does not know is dropped, as its own loading does.
    scheduler = kind.from_config({**scheduler_json(schedule), **settings})
    scheduler.set_timesteps(count)
    if scheduler.timesteps[0] == 998:  # 998.9999, in float32, cut to a whole number
        scheduler.timesteps[0] = 999
    streams = generators()
    z = torch.stack([torch.randn(SHAPE, generator=stream) for stream in streams])
    z = z * scheduler.init_noise_sigma
    if name.startswith("dpmpp_sde"):
        scheduler.noise_sampler = BrownianPath(streams)
    arguments = {"generator": streams} if name in DRAW or extra else {}
    for t in scheduler.timesteps:
        output = unet(scheduler.scale_model_input(z, t), torch.full((len(SEEDS),), float(t)), context)
        z = scheduler.step(output, t, z, **arguments, **extra).prev_sample
    return z


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [10, 25])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("name", REFERENCES)
def test_sampler_follows_the_reference(name: str, schedule_name: str, prediction: str, count: int, unet: UNet) -> None:
    if schedule_name == "zero_snr" and prediction == "epsilon":
        pytest.skip("at zero terminal SNR ε says nothing about the picture: only v is defined")
    if schedule_name == "zero_snr" and name in NO_ZERO_SNR:
        pytest.skip("the reference does not know zero terminal SNR here")
    if runs_off(name, SCHEDULES[schedule_name], count):
        pytest.skip("two steps round to one time step, and the reference, taking the second for the first, runs off")
    schedule = dataclasses.replace(SCHEDULES[schedule_name], prediction_type=prediction)
    context = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    expected = theirs(name, schedule, count, unet, context)
    error = (ours(name, schedule, count, unet, context) - expected).norm() / expected.norm()
    assert error <= 1e-4


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("schedule_name", ["sd15", "trailing", "linspace"])
def test_ddim_with_noise_follows_the_reference(schedule_name: str, eta: float, unet: UNet) -> None:
    context = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    expected = theirs("ddim", SCHEDULES[schedule_name], 10, unet, context, eta=eta)
    error = (ours("ddim", SCHEDULES[schedule_name], 10, unet, context, eta) - expected).norm() / expected.norm()
    assert error <= 1e-4


def test_the_checkpoint_may_spread_the_noise_levels(unet: UNet) -> None:
    context = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    for levels in ("karras", "exponential"):
        habit = dataclasses.replace(SCHEDULES["sd15"], **{f"use_{levels}_sigmas": True})
        assert torch.equal(
            ours("euler", habit, 5, unet, context), ours(f"euler_{levels}", SCHEDULES["sd15"], 5, unet, context)
        )


def test_every_sampler_has_a_reference() -> None:
    assert SAMPLERS.keys() == REFERENCES.keys()


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("name", REFERENCES)
def test_as_many_steps_as_there_can_be(name: str, schedule_name: str) -> None:
    """Every step starts at a trained time step and goes down; none divides by the nothing between two equal levels."""
    schedule = dataclasses.replace(SCHEDULES[schedule_name], prediction_type="v_prediction")
    for count in (1, 2, most_steps(name, schedule)):
        steps = steps_of(name, schedule, count)
        assert all(0 <= step.t <= 999 and step.sigma >= step.sigma_next for step in steps)
        z = torch.ones(1, 1, 2, 2)
        denoiser = Denoiser(lambda z, step: torch.zeros_like(z), schedule)
        assert sample(name, denoiser, z, steps, lambda: torch.zeros(1, 1, 2, 2)).isfinite().all()


def test_forward_process_adds_noise_as_the_reference_does() -> None:
    schedule = SCHEDULES["sd15"]
    reference = diffusers.DDPMScheduler.from_config(scheduler_json(schedule))
    z0, noise, timesteps = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.tensor([0, 500, 999])
    assert torch.allclose(schedule.add_noise(z0, noise, timesteps), reference.add_noise(z0, noise, timesteps))
    velocity = dataclasses.replace(schedule, prediction_type="v_prediction")
    assert torch.allclose(
        velocity.target(z0, noise, timesteps), reference.get_velocity(z0, noise, timesteps), atol=1e-6
    )


def test_split_inverts_the_forward_process() -> None:
    z0, noise = torch.randn(1, *SHAPE), torch.randn(1, *SHAPE)
    for prediction in ("epsilon", "v_prediction"):
        schedule = NoiseSchedule(prediction_type=prediction)
        timesteps = torch.tensor([400])
        alpha = float(schedule.alphas_cumprod[400]) ** 0.5
        z = schedule.add_noise(z0, noise, timesteps)
        back, epsilon = schedule.split(schedule.target(z0, noise, timesteps), z, alpha, (1 - alpha**2) ** 0.5)
        assert torch.allclose(back, z0, atol=1e-5)
        assert torch.allclose(epsilon, noise, atol=1e-5)
