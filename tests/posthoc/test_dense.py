"""The largest triplets of a matrix: near the best there is whatever the spectrum, checked, and the same every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rankalloc.posthoc import dense
from rankalloc.posthoc.dense import largest


def spectrum_matrix(rows, columns, sigma):
    generator = torch.Generator().manual_seed(1)
    count = len(sigma)
    u = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, count, generator=generator, dtype=torch.float64)).Q
    return ((u * sigma) @ v.T).float()


@pytest.mark.parametrize("shape", [(80, 60), (60, 80), (900, 820), (820, 900)])
def test_the_largest_triplets(shape):
    sigma = torch.from_numpy(np.concatenate([np.geomspace(3, 0.3, 12), np.full(40, 1e-3)]))
    delta = spectrum_matrix(*shape, sigma)
    found = largest(delta, 10, "x")
    assert found.exact == (min(shape) <= 512)
    torch.testing.assert_close(found.sigma, sigma[:10], rtol=1e-5, atol=0)
    best = sigma[10:].square().sum().sqrt().item()
    error = (delta - found.B @ found.A).double().norm().item()
    assert error == pytest.approx(best, rel=1e-4)
    assert found.norm == pytest.approx(sigma.norm().item(), rel=1e-6)
    torch.testing.assert_close(found.B.norm(dim=0), found.A.norm(dim=1), rtol=1e-4, atol=0)
    again = largest(delta, 10, "x")
    assert torch.equal(again.A, found.A) and torch.equal(again.B, found.B)


def noise(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


def falling(sigma):
    return lambda rows, columns: spectrum_matrix(rows, columns, sigma.double())


def rounded(rows, columns):
    """What rank 8 is in bfloat16: most of its energy, and noise in all directions."""
    weight = noise(rows, columns) / rows**0.5
    change = spectrum_matrix(rows, columns, torch.full((8,), 0.25, dtype=torch.float64))
    return (weight + change).bfloat16().float() - weight.bfloat16().float()


SPECTRA = {
    "noise": noise,
    "bfloat16": rounded,
    "slow": falling(torch.arange(1, 561) ** -0.3),
    "steep": falling(torch.exp(-torch.arange(560) / 6)),
    "equal": falling(torch.ones(560)),
    "clusters": falling(torch.tensor([1.0, 0.5, 0.1]).repeat_interleave(40)),
    # fewer directions than the blocks have columns: what is over is rounding, and must not count twice
    "rank 20": lambda rows, columns: noise(rows, columns) * (torch.arange(rows) < 20)[:, None],
    "one entry": lambda rows, columns: torch.zeros(rows, columns).index_fill_(0, torch.tensor(3), 1e-20),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_what_is_kept_is_within_a_thousandth_of_the_best(spectrum):
    delta = SPECTRA[spectrum](560, 640)
    exact = np.linalg.svd(delta.double().numpy(), compute_uv=False)
    for matrix, rank in ((delta, 8), (delta.T, 3)):
        found = largest(matrix, rank, "x")
        assert not found.exact
        best = (exact[:rank] ** 2).sum()
        left = (matrix.double() - found.B.double() @ found.A.double()).square().sum().item()
        kept = (exact**2).sum() - left
        assert 0.999 * best <= kept <= (1 + 1e-6) * best
        assert found.sigma.square().sum().item() == pytest.approx(kept, rel=1e-5)
        for side in (found.B, found.A.T):
            unit = side / found.sigma.sqrt().float()
            torch.testing.assert_close(unit.T @ unit, torch.eye(len(found.sigma)), rtol=0, atol=1e-5)
        again = largest(matrix.clone(), rank, "x")
        assert torch.equal(again.A, found.A) and torch.equal(again.B, found.B)


def test_no_completion_holds_more_energy_than_the_check_says():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for kept, width, rest in ((1, 1, 1), (3, 5, 9), (6, 2, 30), (8, 8, 8)):
        for size in (1e-3, 0.1, 1.0):
            values = 1 + draw(kept).abs().sort().values
            coupling = size * draw(width, kept)
            basis = torch.linalg.qr(draw(width + rest, width + rest)).Q
            for lower in (0.0, 0.9, 1.0):  # what the other directions hold of the smallest that is kept
                below = torch.rand(width + rest, generator=generator, dtype=torch.float64)
                spectrum = values[0] * (lower + (1 - lower) * below)
                whole = torch.zeros(kept + width + rest, kept + width + rest, dtype=torch.float64)
                whole[:kept, :kept] = values.diag()
                whole[kept : kept + width, :kept], whole[:kept, kept : kept + width] = coupling, coupling.T
                whole[kept:, kept:] = (basis * spectrum) @ basis.T
                best = torch.linalg.eigvalsh(whole)[-kept:].sum().item()
                bound = dense._most_energy(values, coupling)
                assert best <= bound * (1 + 1e-12)
                if lower == 1.0:
                    assert best == pytest.approx(bound)


def test_where_half_the_space_is_not_enough_it_is_done_exactly(monkeypatch):
    delta = noise(560, 560)
    found = largest(delta, 40)
    assert found.exact
    torch.testing.assert_close(found.sigma, torch.linalg.svdvals(delta.double())[:40], rtol=1e-6, atol=0)
    monkeypatch.setattr(dense, "_SHORT", 0.05)
    rough = largest(delta, 40)
    assert not rough.exact and rough.sigma[-1] < 0.99 * found.sigma[-1]
    assert 0.95 <= (rough.sigma.square().sum() / found.sigma.square().sum()).item() < 0.999


def test_the_norm_is_exact_and_tells_what_is_not_finite():
    delta = noise(300, 700)
    for matrix in (delta, delta.T, delta[:, ::3], 1e30 * delta, 1e-30 * delta, delta[:0]):
        assert dense.frobenius(matrix) == pytest.approx(np.linalg.norm(matrix.double().numpy()), rel=1e-12)
    for value in (float("nan"), float("inf"), -float("inf")):
        delta[299, 699] = value
        assert not np.isfinite(dense.frobenius(delta))
        with pytest.raises(ValueError, match="not finite"):
            largest(delta, 1)


def test_random_numbers_of_the_caller_stay():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    largest(spectrum_matrix(800, 800, torch.tensor([1.0, 0.5], dtype=torch.float64)), 2)
    assert torch.equal(torch.rand(3), expected)
