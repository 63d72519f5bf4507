"""Calibration: projected moments are the full ones, and a shrink in their metric is the best in it."""

from __future__ import annotations

import pytest
import torch

import rankalloc as ra
from rankalloc.errors import ConfigError, RankallocError
from tests.support.adapter_folders import dense, error_of
from tests.support.models import LABELS, assert_same, make_bert, randomize, token_data


def batches(count: int = 3):
    rows = token_data(8 * count)
    return [
        {key: torch.stack([row[key] for row in rows[i : i + 8]]) for key in rows[0]} for i in range(0, 8 * count, 8)
    ]


@pytest.fixture
def folder(tmp_path):
    adapters = ra.attach(make_bert(), rank=4)
    randomize(adapters)
    return ra.save(adapters, tmp_path / "a", pad_multiple=8)


def full_moments(model, adapters, data):
    """C and G of each layer by hand, whole."""
    seen = {name: ([], []) for name in adapters.modules}
    for name, adapter in adapters.modules.items():
        def watch(_m, args, out, name=name):
            seen[name][0].append(args[0].detach().flatten(0, -2).double())
            out.register_hook(lambda g: seen[name][1].append(g.flatten(0, -2).double()))
        adapter.register_forward_hook(watch)
    for batch in data:
        model(**batch).loss.backward()
    return [{n: (lambda x: x.T @ x / len(x))(torch.cat(s[k])) for n, s in seen.items()} for k in (0, 1)]


@pytest.mark.parametrize("inputs_only", [False, True])
def test_moments_through_the_factors_are_the_full_ones(inputs_only, folder, tmp_path):
    model, data = make_bert(), batches()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    seen = ra.calibrate(model, folder, data, inputs_only=inputs_only)
    assert model.training and seen.batches == 3
    assert_same(model.state_dict(), before)
    other = make_bert()
    adapters = ra.load(other, folder)
    c, g = full_moments(other, adapters, data)
    by_hand = ra.KroneckerMetric(c, {} if inputs_only else g)
    finished = ra.FinishedAdapter(folder)
    for name in finished.layers:
        ours, theirs = (m.grams(name, finished.stored(name)) for m in (seen, by_hand))
        for one, two in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6 * float(two.abs().max()))
    results = [ra.shrink(folder, ra.RankBudget(fraction=0.4), tmp_path / str(i), metric=m)
               for i, m in enumerate((seen, by_hand))]
    assert results[0].ranks == results[1].ranks


def test_the_truncation_is_the_best_in_its_metric_and_its_errors_are_true(folder, tmp_path):
    draw = torch.Generator().manual_seed(0)
    whole = dense(folder)
    moments = [
        {n: (lambda m: m @ m.T)(torch.randn(w.shape[k], w.shape[k] + 3, generator=draw).double())
         for n, w in whole.items()} for k in (1, 0)
    ]
    metric = ra.KroneckerMetric(*moments, damping=0.0)
    result = ra.shrink(folder, ra.RankBudget(fraction=0.3), tmp_path / "b", metric=metric)
    after = dense(tmp_path / "b")
    plain = ra.shrink(folder, ra.RankBudget(fraction=0.3), tmp_path / "c")
    lost = energy = 0.0
    for layer in result.layers:
        roots = [torch.linalg.cholesky(moments[k][layer.name]) for k in (0, 1)]
        weighted = roots[1].T @ whole[layer.name] @ roots[0]
        gone = roots[1].T @ (whole[layer.name] - after.get(layer.name, 0 * whole[layer.name])) @ roots[0]
        best = torch.linalg.svdvals(weighted)[layer.rank :].norm()
        assert float(gone.norm()) == pytest.approx(float(best), rel=1e-4)
        assert layer.metric_error == pytest.approx(float(best), rel=1e-4)
        true = float((whole[layer.name] - after.get(layer.name, 0 * whole[layer.name])).norm())
        assert layer.error == pytest.approx(true, rel=1e-4)
        lost, energy = lost + float(gone.norm()) ** 2, energy + float(weighted.norm()) ** 2
    assert result.metric_error == pytest.approx((lost / energy) ** 0.5, rel=1e-4)
    assert result.error > plain.error and result.ranks != plain.ranks
    # whatever the scale of the moments, what is written is in singular form, evenly shared: it can be trained on
    tiny = ra.KroneckerMetric(moments[0], {n: m * 1e-12 for n, m in moments[1].items()}, damping=0.0)
    ra.shrink(folder, ra.RankBudget(fraction=0.3), tmp_path / "d", metric=tiny)
    assert error_of(after, dense(tmp_path / "d")) < 1e-6
    written = ra.FinishedAdapter(tmp_path / "d")
    for name in written.layers:
        one, two = (factor.double() for factor in (written.factors(name).P.T, written.factors(name).Q))
        torch.testing.assert_close(one @ one.T, two @ two.T, rtol=1e-4, atol=1e-4)


def test_diagonal_moments_are_diagonal_matrices(folder):
    layers = ra.FinishedAdapter(folder).layers
    flat = [{n: torch.rand(getattr(v, side)) for n, v in layers.items()} for side in ("d_in", "d_out")]
    square = [{n: torch.diag(v) for n, v in each.items()} for each in flat]
    one, two = (ra.shrink(folder, ra.RankBudget(fraction=0.4), metric=ra.KroneckerMetric(*m)) for m in (flat, square))
    assert one.ranks == two.ranks and one.metric_error == pytest.approx(two.metric_error)


def test_what_cannot_be_calibrated_is_told(folder, tmp_path):
    model, data = make_bert(), batches(1)
    with pytest.raises(ConfigError, match="at least one batch"):
        ra.calibrate(model, folder, [])
    with pytest.raises(ConfigError, match="damping"):
        ra.calibrate(model, folder, data, damping=-1)
    with pytest.raises(RankallocError, match="no loss"):
        ra.calibrate(model, folder, [{"input_ids": data[0]["input_ids"]}])
    assert not any("lam" in name for name, _ in model.named_parameters())
    adapters = ra.attach(make_bert(labels=LABELS), rank=2)
    randomize(adapters)
    other = ra.save(adapters, tmp_path / "other")
    with pytest.raises(ConfigError, match="another adapter"):
        ra.shrink(other, ra.RankBudget(ranks=2), metric=ra.calibrate(model, folder, data))
    with pytest.raises(ConfigError, match="wide"):
        name = next(iter(ra.FinishedAdapter(folder).layers))
        ra.shrink(folder, ra.RankBudget(ranks=2), metric=ra.KroneckerMetric({name: torch.eye(3)}))
