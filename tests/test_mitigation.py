"""Mitigation holds what it promises, for any latents."""

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memorization_guard.core.mitigation import correct

SHAPES = [(4, 4, 4), (4, 2, 4, 4)]
factors = st.floats(0.2, 5.0)


def latents(seed, shape, batch=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, generator=generator) for _ in range(3)]


def norms(x):
    return x.double().flatten(1).norm(dim=1)


def region(z_prev, z_next, x0, scales, width):
    """A band around the first sample's own norms, each scaled, so that some samples lie outside."""
    reference = [norms(z_next)[0], norms(z_next - z_prev)[0], norms(x0)[0]]
    mean = np.array([float(n) * s for n, s in zip(reference, scales, strict=True)])
    return mean, (mean * (1 - width), mean * (1 + width))


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 2**31),
    st.sampled_from(SHAPES),
    st.tuples(factors, factors, factors),
    st.floats(0.001, 0.5),
    st.floats(0.0, 1.0),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_every_clamped_norm_lies_in_its_band(seed, shape, scales, width, coefficient, strong):
    z_prev, z_next, x0 = latents(seed, shape)
    mean, (low, high) = region(z_prev, z_next, x0, scales, width)
    strong = torch.tensor(strong)
    z = correct(z_prev, z_next, x0, x0_coefficient=coefficient, x0_norm=float(mean[2]), bounds=(low, high), strong=strong)
    slack = 1e-5
    latent, update, start = norms(z).numpy(), norms(z - z_prev).numpy(), norms(z_prev).numpy()
    assert (latent >= low[0] * (1 - slack)).all()
    assert (latent <= high[0] * (1 + slack)).all()
    # Both norms can be had together only where the triangle of z_prev, z and the update closes.
    closes = np.maximum(low[1], np.abs(latent - start)) <= np.minimum(high[1], latent + start) * (1 - 1e-3)
    checked = strong.numpy() & closes & (np.abs(latent - start) * (1 + 1e-3) < high[1]) & (low[1] < (latent + start) * 0.999)
    assert (update[checked] >= low[1] * (1 - slack)).all()
    assert (update[checked] <= high[1] * (1 + slack)).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.sampled_from(SHAPES), st.tuples(factors, factors, factors))
def test_a_batch_gives_what_its_samples_give_one_by_one(seed, shape, scales):
    z_prev, z_next, x0 = latents(seed, shape)
    mean, bounds = region(z_prev, z_next, x0, scales, 0.1)
    strong = torch.tensor([True, False, True])
    keywords = {"x0_coefficient": 0.7, "x0_norm": float(mean[2]), "bounds": bounds}
    together = correct(z_prev, z_next, x0, strong=strong, **keywords)
    for i in range(3):
        one = correct(z_prev[i : i + 1], z_next[i : i + 1], x0[i : i + 1], strong=strong[i : i + 1], **keywords)
        torch.testing.assert_close(together[i : i + 1], one, rtol=1e-5, atol=1e-5)


def test_the_three_steps_are_those_of_the_paper():
    """One sample, written out: rescale x0, clamp the update, clamp the latent; no turn, since both bands are met."""
    z_prev, z_next, x0 = (x.double() for x in latents(0, (4, 4, 4), batch=1))
    c, mu_x0 = 0.6, float(norms(x0)) / 3
    moved = z_next + c * (x0 * (mu_x0 / norms(x0)) - x0)
    update = moved - z_prev
    limit = float(norms(update)) * 0.5
    clamped = z_prev + update * 0.5
    wide = (np.array([0.0, 0.0, 0.0]), np.array([1e6, limit, 1e6]))
    keywords = {"x0_coefficient": c, "x0_norm": mu_x0, "bounds": wide}
    arguments = [x.float() for x in (z_prev, z_next, x0)]
    mild = correct(*arguments, strong=torch.tensor([False]), **keywords)
    strong = correct(*arguments, strong=torch.tensor([True]), **keywords)
    torch.testing.assert_close(mild, moved.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(strong, clamped.float(), rtol=1e-5, atol=1e-5)
    ball = (np.zeros(3), np.array([float(norms(clamped)) * 0.8, 1e6, 1e6]))
    shrunk = correct(*arguments, strong=torch.tensor([False]), x0_coefficient=c, x0_norm=mu_x0, bounds=ball)
    torch.testing.assert_close(shrunk, (moved * (ball[1][0] / norms(moved))).float(), rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_a_turn_keeps_the_norm_and_the_plane(seed):
    """Where the latent's clamp takes the update out of its band, the result stays in the plane of z_prev and z."""
    z_prev, z_next, x0 = latents(seed, (4, 4, 4), batch=1)
    z_norm, start = float(norms(z_next)), float(norms(z_prev))
    d = float(norms(z_next - z_prev))
    low = np.array([z_norm * 1.3, 0.0, 0.0])
    high = np.array([z_norm * 1.3, d * 0.9, 1e6])
    assume(abs(z_norm * 1.3 - start) < d * 0.8)
    z = correct(z_prev, z_next, x0, x0_coefficient=0.0, x0_norm=1.0, bounds=(low, high), strong=torch.tensor([True]))
    assert float(norms(z - z_prev)) <= d * 0.9 * (1 + 1e-5)
    basis = torch.linalg.qr(torch.stack([z_prev.flatten(), z_next.flatten()], 1).double())[0]
    flat = z.flatten().double()
    torch.testing.assert_close(basis @ (basis.T @ flat), flat, rtol=1e-4, atol=1e-4)


def test_degenerate_latents_stay_finite():
    zero, one = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    bounds = (np.array([1.0, 1.0, 1.0]), np.array([2.0, 2.0, 2.0]))
    for z_prev, z_next, x0 in ((zero, zero, zero), (one, one, zero), (zero, one, one), (one, -one, one)):
        z = correct(z_prev, z_next, x0, x0_coefficient=1.0, x0_norm=1.0, bounds=bounds, strong=torch.tensor([True]))
        assert torch.isfinite(z).all()


def test_half_precision_stays_half_precision():
    z_prev, z_next, x0 = (x.half() for x in latents(1, (4, 4, 4)))
    mean, bounds = region(z_prev, z_next, x0, (1, 0.5, 0.5), 0.1)
    z = correct(z_prev, z_next, x0, x0_coefficient=0.5, x0_norm=float(mean[2]), bounds=bounds, strong=torch.tensor([True] * 3))
    assert z.dtype == torch.float16
    assert (norms(z - z_prev).numpy() <= bounds[1][1] * 1.002).all()
