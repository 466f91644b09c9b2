"""A sampler around any scheduler, recorders of what a pipeline does, and profiles made up around a run."""

import inspect
from contextlib import contextmanager

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from memorization_guard import StabilityProfile  # noqa: E402
from memorization_guard.core.profile import Norms  # noqa: E402
from memorization_guard.core.reference import Reference  # noqa: E402
from memorization_guard.core.signals import Signals  # noqa: E402

STEPS = 7


class Network(torch.nn.Module):
    """A fixed function that stands in for a UNet, evaluated on conditional and unconditional halves.

    From its call ``loud_from`` on, the prompt has twenty times as much to say.
    """

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.loud_from = 1000
        self.calls = 0

    def forward(self, x, t):
        uncond, cond = x.chunk(2)
        uncond = 0.4 * uncond.sin() + 0.1 * uncond
        added = 0.1 * cond.cos() * cond + 0.05
        cond = uncond + (20 * added if self.calls >= self.loud_from else added)
        self.calls += 1
        return (torch.cat([uncond, cond]),)


class Sampler:
    """The loop of a pipeline, with guidance 3, around any scheduler."""

    do_classifier_free_guidance = True
    guidance_scale = 3.0
    interrupt = False

    def __init__(self, scheduler):
        self.scheduler, self.unet = scheduler, Network()
        self._interrupt = False

    def __call__(self, batch=2, shape=(4, 8, 8), seed=0, steps=STEPS, begin=0, dtype=torch.float32, take=None):
        self.unet.calls, self._interrupt = 0, False
        generator = torch.Generator().manual_seed(seed)
        scheduler = self.scheduler
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps[begin * scheduler.order :][:take]
        if begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin * scheduler.order)
        self.num_timesteps = len(timesteps)
        x = torch.randn(batch, *shape, generator=generator).to(dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
        extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        with torch.no_grad():
            for t in timesteps:
                if self._interrupt:
                    continue
                scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                uncond, cond = self.unet(torch.cat([scaled] * 2), t)[0].chunk(2)
                prediction = uncond + 3.0 * (cond - uncond)
                x = scheduler.step(prediction, t, x, **extra, return_dict=False)[0]
        return x


class Record:
    """What the network said, and what reached the scheduler, at every step."""

    def __init__(self):
        self.outputs = []  # of every call since the last step
        self.steps = []  # (outputs of the network, guided prediction, sample)


@contextmanager
def recorded(pipe, *, network=None):
    """Looks on from below any guard that is entered later."""
    record, scheduler = Record(), pipe.scheduler
    original = scheduler.step

    def step(*arguments, **keywords):
        given = inspect.signature(original).bind(*arguments, **keywords).arguments
        record.steps.append((record.outputs, given["model_output"].clone(), given["sample"].clone()))
        record.outputs = []
        return original(*arguments, **keywords)

    step.__signature__ = inspect.signature(original)
    scheduler.step = step
    network = network or getattr(pipe, "unet", None) or pipe.transformer
    handle = network.register_forward_hook(
        lambda module, inputs, output: record.outputs.append(
            (output[0] if isinstance(output, tuple) else output.sample).clone()
        )
    )
    try:
        yield record
    finally:
        handle.remove()
        del scheduler.step


def profile_around(trace, scale=1.0):
    """Sixteen reference runs that did almost what a run did; at another scale it is far off from the first evaluation on."""
    rng = np.random.default_rng(0)

    def spread(values):
        return scale * values * (1 + 0.05 * rng.standard_normal((16, len(values))))

    evaluations, steps = trace.evaluations, trace.steps
    angles = trace._angles()
    last = {round(angle, 6): number for number, angle in enumerate(angles)}
    chosen = [last[angle] for angle in sorted(last, reverse=True)]
    signals = Signals(*(spread(getattr(evaluations, name))[:, chosen] for name in Signals._fields))
    asked = [] if trace.asked is None else spread(np.array([trace.asked]))[:, 0]
    patches = np.stack([evaluations.patch_mean, evaluations.patch_std], axis=1)[chosen]
    mean = Norms(*(np.maximum(scale * values, 1e-3) for values in (steps.latent_norm, steps.update_norm, steps.denoised_norm)))
    return StabilityProfile(
        mean=mean,
        std=Norms(*(0.02 * values for values in mean)),
        count=16,
        settings=trace.settings,
        reference=Reference(signals, angles[chosen], patches, [], asked),
    )


def near(found, wanted, tolerance=1e-4):
    """Whether two tensors agree, relative to the larger numbers in them."""
    return bool((found.float() - wanted.float()).abs().max() <= tolerance * wanted.float().abs().max())


def images_of(pipe, prompt="a red cat", *, seeds=(0,), **keywords):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    keywords = {"num_inference_steps": 4, "output_type": "np", "height": 16, "width": 16} | keywords
    return pipe(prompt, generator=generators if len(seeds) > 1 else generators[0], **keywords).images
