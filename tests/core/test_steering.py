"""What replaces a conditional prediction."""

import numpy as np
import pytest
import torch

from memorization_guard.core.steering import rescaled, steered


def pair(batch=3, shape=(4, 8, 8), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, *shape, generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("guidance_scale", [0.6, 1.0, 7.5])
@pytest.mark.parametrize("target", [-1.0, 0.0, 2.0])
def test_guidance_gives_what_it_would_have_given_at_the_target(guidance_scale, target):
    cond, uncond = pair()
    chosen = np.array([True, False, True])
    given = steered(cond, uncond, chosen, guidance_scale=guidance_scale, target=target)
    guided = uncond + guidance_scale * (given - uncond)
    wanted = uncond + target * (cond - uncond)
    torch.testing.assert_close(guided[chosen], wanted[chosen], rtol=1e-4, atol=1e-4)
    assert torch.equal(given[1], cond[1])


def test_without_a_second_prediction_the_norm_is_brought_back():
    cond, _ = pair()
    given = rescaled(cond, np.array([False, True, False]), 2.5)
    assert float(given[1].norm()) == pytest.approx(2.5, rel=1e-5)
    torch.testing.assert_close(given[1] / given[1].norm(), cond[1] / cond[1].norm())
    assert torch.equal(given[0], cond[0])
    assert not torch.isnan(rescaled(torch.zeros(1, 4, 2, 2), np.array([True]), 1.0)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_of_number_is_kept(dtype):
    cond, uncond = pair(dtype=dtype)
    chosen = np.array([True, True, False])
    assert steered(cond, uncond, chosen, guidance_scale=7.5, target=-1.0).dtype == dtype
    assert rescaled(cond, chosen, 1.0).dtype == dtype
