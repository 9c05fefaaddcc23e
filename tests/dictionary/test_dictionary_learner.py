"""One dictionary in training: scale, center, norms, and what becomes of dead latents."""

import dataclasses

import numpy as np
import pytest
import torch
from planted_rows import JUMP, LATENTS, QUICK, TRUE, D, codes, directions, planted_rows
from torch.nn.functional import normalize

from manifold_unlearn.dictionary import SparseAutoencoder, train_dictionaries
from manifold_unlearn.dictionary import criterion as criterion_module
from manifold_unlearn.dictionary.criterion import Criterion
from manifold_unlearn.dictionary.learner import Learner, geometric_median
from manifold_unlearn.dictionary.together import Together


@pytest.fixture
def planted():
    return planted_rows()


def learner(coder, **options):
    config = dataclasses.replace(QUICK, n_steps=100, **options)
    return Learner("", coder, config, 100, 256, Together())


def test_decoder_rows_keep_norm_1_and_their_gradient_is_perpendicular(planted):
    rows, _ = planted
    sae = SparseAutoencoder(D, 48, {"name": "topk", "k": 2}, random_state=0)
    train_dictionaries(sae, rows, dataclasses.replace(QUICK, n_steps=10, normalize=False))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    one = learner(sae, normalize=False, lr=1e-30)
    one.step(rows[:256], 5)
    along = (sae.decoder.grad * sae.decoder).sum(1)
    assert float(along.abs().max()) < 1e-6 < float(sae.decoder.grad.abs().max())
    free = SparseAutoencoder(D, 48, {"name": "topk", "k": 2}, random_state=0)
    config = dataclasses.replace(QUICK, n_steps=10, normalize=False, unit_norm=False)
    train_dictionaries(free, rows, config)
    assert float((free.W_dec.norm(dim=1) - 1).abs().max()) > 1e-3


def test_rows_are_scaled_and_centered_by_the_first(planted):
    rows = planted[0] * 17 + 3
    sae = SparseAutoencoder(D, 48, random_state=0)
    one = learner(sae)
    one.begin([rows[:1000], rows[1000:3000]])
    first = rows[:3000].double().numpy()
    scale = float(one.scale_in)
    median = sae.b_dec.detach().double().numpy()
    distances = np.sqrt(((first * scale - median) ** 2).sum(1))
    assert distances.mean() == pytest.approx(np.sqrt(D), rel=1e-4)

    def distance(point):
        return np.sqrt(((first * scale - point) ** 2).sum(1)).sum()

    steps = np.eye(D)[:6] * 1e-2
    assert all(distance(median) < distance(median + step) for step in [*steps, *-steps])


def test_geometric_median_withstands_an_outlier():
    rows = torch.cat([torch.zeros(9, 2), torch.tensor([[100.0, 0.0]])])
    assert float(geometric_median(rows).norm()) < 1e-3 < float(rows.mean(0).norm())


def test_k_comes_down(planted):
    rows, _ = planted
    sae = SparseAutoencoder(D, 64, {"name": "topk", "k": 2}, random_state=0)
    config = dataclasses.replace(QUICK, n_steps=20, k_start=22, k_anneal=0.5, log_every=1)
    found = [m.l0 for m in train_dictionaries(sae, rows.abs() + 1, config).of()]
    assert [config.k_at(step, 20, 2) for step in (0, 5, 10, 19)] == [22, 12, 2, 2]
    assert found[0] > found[5] > found[12] and max(found[10:]) <= 2
    assert sae.nonlinearity.k == 2


def dead_start():
    """A dictionary half of whose latents cannot fire."""
    sae = SparseAutoencoder(D, LATENTS, {"name": "topk", "k": 3}, random_state=0)
    with torch.no_grad():
        sae.b_enc[: LATENTS // 2] = -100.0
    return sae


def test_the_auxiliary_loss_reaches_the_dead_alone():
    rows = codes() @ directions(TRUE, D, 1)
    moved = {}
    for coefficient in (0.0, 1 / 32):
        sae = dead_start()
        with torch.no_grad():
            sae.b_enc[: LATENTS // 2] = -8.0  # a few rows reach it: relu lets a gradient pass
            sae.encoder[: LATENTS // 2] *= 20
        one = learner(sae, aux_coefficient=coefficient, dead_after=10, normalize=False)
        one.silent[0, : LATENTS // 2] = 11
        sae.b_enc.data[LATENTS // 2 :] = 50.0  # the living always win
        start = sae.encoder.detach().clone()
        one.step(rows[:256], 50)
        moved[coefficient] = (sae.encoder.detach() - start)[: LATENTS // 2].abs().max()
    assert float(moved[0.0]) == 0 < float(moved[1 / 32])


def test_dead_latents_are_counted(planted):
    sae = dead_start()
    config = dataclasses.replace(QUICK, n_steps=20, dead_after=1000, aux_coefficient=0.0)
    history = train_dictionaries(sae, planted[0], config)
    assert 0.5 <= history.of()[-1].dead < 0.8


def test_resampling_points_the_dead_at_rows_badly_rebuilt(planted):
    rows, _ = planted
    sae = dead_start()
    one = learner(sae, dead_after=10, normalize=False)
    one.step(rows[:256], 0)
    one.silent[0] = torch.arange(LATENTS - 1, -1, -1) // (LATENTS // 2) * 11
    batch = rows[256:512]
    wrote = normalize(batch - sae.b_dec.detach(), dim=1)
    living = sae.encoder[LATENTS // 2 :].detach().norm(dim=1).mean()
    one.resample(batch, batch, 7)
    dead = slice(0, LATENTS // 2)
    cosines = sae.decoder[dead].detach() @ wrote.T
    torch.testing.assert_close(cosines.max(1).values, torch.ones(LATENTS // 2))
    torch.testing.assert_close(
        sae.encoder[dead].detach(), 0.2 * living * sae.decoder[dead].detach()
    )
    assert float(sae.b_enc[dead].detach().abs().max()) == 0 and int(one.silent[0, dead].max()) == 0
    for parameter in (sae.encoder, sae.decoder, sae.b_enc):
        for name in ("exp_avg", "exp_avg_sq"):
            moment = one.optimizer.state[parameter][name]
            assert float(moment[dead].abs().max()) == 0 < float(moment.abs().max())


@pytest.mark.slow
def test_resampling_revives(planted):
    rows, true = planted
    found = {}
    for every in (0, 50):
        sae = dead_start()
        config = dataclasses.replace(
            QUICK, dead_after=5000, aux_coefficient=0.0, resample_every=every
        )
        found[every] = train_dictionaries(sae, rows, config).of()[-1].dead
    assert found[50] < 0.4 < 0.5 <= found[0]


@pytest.mark.parametrize(
    "shape", [{"name": "relu"}, {"name": "gated"}, JUMP], ids=lambda s: s["name"]
)
def test_few_that_fire_are_summed_sparsely_with_the_same_gradients(planted, shape, monkeypatch):
    rows = planted[0][:64]
    found = {}
    for share in (-1.0, 1.0):
        monkeypatch.setattr(criterion_module, "SPARSE_ENOUGH", share)
        sae = SparseAutoencoder(D, LATENTS, shape, random_state=0)
        judged = Criterion(sae, QUICK)(rows, rows, [torch.arange(5)], 0.01)
        assert isinstance(judged.parts[0].code, torch.Tensor) == (share < 0)
        judged.loss.backward()
        found[share] = [judged.loss.detach(), *(p.grad for p in sae.parameters())]
    for dense, sparse in zip(*found.values(), strict=True):
        torch.testing.assert_close(dense, sparse, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("normalization", ["layer_norm", "unit_rms"])
def test_dictionaries_that_normalize_each_row_train(planted, normalization):
    rows = planted[0] * 9
    sae = SparseAutoencoder(
        D, LATENTS, {"name": "topk", "k": 3}, normalization=normalization, deep=8, random_state=0
    )
    config = dataclasses.replace(QUICK, n_steps=120, dead_after=500, group_sizes=(32, 32))
    history = train_dictionaries(sae, rows, config).of()
    assert history[-1].fvu < 0.6 * history[0].fvu


def test_the_encoder_begins_at_the_size_that_rebuilds_best(planted):
    rows, _ = planted
    sae = SparseAutoencoder(D, LATENTS, {"name": "topk", "k": 8}, random_state=0)
    one = learner(sae)
    one.begin([rows[:1024]])
    scaled = rows[:1024] * one.scale_in
    with torch.no_grad():
        wrote = sae(scaled) - sae.b_dec
        wanted = scaled - sae.b_dec
    factors = np.linspace(0.8, 1.2, 41)
    errors = [float((wanted - factor * wrote).square().sum()) for factor in factors]
    assert factors[int(np.argmin(errors))] == pytest.approx(1.0, abs=0.011)
    assert float(sae.encoder.detach().norm(dim=1).mean()) < 0.9


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_latents_begin_turned_toward_rows(planted, share):
    rows, _ = planted
    sae = SparseAutoencoder(D, LATENTS, {"name": "topk", "k": 8}, random_state=0)
    fresh = sae.decoder.detach().clone()
    one = learner(sae, from_rows=share, center="mean")
    one.begin([rows[:1024]])
    centered = normalize(rows[:1024] - rows[:1024].mean(0), dim=1)
    nearest = (sae.decoder.detach() @ centered.T).max(1).values
    assert float(nearest.mean()) > {0.0: 0.4, 0.5: 0.68, 1.0: 0.9999}[share]
    assert float((fresh @ centered.T).max(1).values.mean()) < 0.65
    torch.testing.assert_close(sae.decoder.detach().norm(dim=1), torch.ones(LATENTS))
