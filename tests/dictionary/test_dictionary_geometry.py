import json

import numpy as np
import pytest
import torch

from manifold_unlearn.dictionary import SparseAutoencoder, SparseCode
from manifold_unlearn.dictionary.coding import code_rows
from manifold_unlearn.dictionary.geometry import (
    cluster_reconstruction,
    co_activation,
    correlated_latents,
    decoder_coherence,
    duplicated_latents,
    latent_clusters,
)
from manifold_unlearn.phenomenology.irreducible import irreducible_planes

TURN = 2 * np.pi
D, ON_CIRCLE, ALONE = 48, 12, 20


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def of_rows(*groups):
    return {frozenset(group) for group in groups}


@pytest.fixture(scope="module")
def decoder():
    """Twelve directions around a circle, twelve around another, twenty at random; mixed."""
    random = np.random.default_rng(0)
    planes = np.linalg.qr(random.normal(size=(D, 4)))[0].T
    angle = np.arange(ON_CIRCLE) * TURN / ON_CIRCLE
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    rest = random.normal(size=(ALONE, D))
    rest -= rest @ planes.T @ planes
    rows = np.concatenate([ring @ planes[:2], ring @ planes[2:], unit(rest)])
    return rows * random.uniform(0.5, 2, (len(rows), 1))


RINGS = of_rows(range(ON_CIRCLE), range(ON_CIRCLE, 2 * ON_CIRCLE))


@pytest.mark.parametrize(
    "how",
    [{"method": "spectral", "n_clusters": 3}, {"method": "components", "threshold": 0.8}],
    ids=lambda how: how["method"],
)
def test_circles_of_directions_are_clusters_of_two_dimensions(decoder, how):
    shuffled = np.random.default_rng(5).permutation(len(decoder))
    found = latent_clusters(decoder[shuffled], **how)
    groups = [frozenset(shuffled[m].tolist()) for m in found.members]
    assert set(groups) >= RINGS
    at = [i for i, group in enumerate(groups) if group in RINGS]
    assert found.dimension[at] == pytest.approx([2, 2])
    assert (found.random_dimension[at] > 4).all()
    cosine = np.cos(np.arange(1, ON_CIRCLE) * TURN / ON_CIRCLE).clip(0)
    assert found.affinity[at] == pytest.approx(np.full(2, cosine.mean()), abs=1e-6)
    np.testing.assert_array_equal(found.latents[found.label == 0], found.members[0])
    json.dumps(found.to_json())


def test_average_linkage_cuts_rings_into_arcs_and_mixes_none(decoder):
    found = latent_clusters(decoder, method="agglomerative", threshold=0.4)
    groups = [frozenset(m.tolist()) for m in found.members]
    arcs = [group for group in groups if any(group <= ring for ring in RINGS)]
    assert frozenset().union(*arcs) == frozenset(range(2 * ON_CIRCLE))
    assert all(group & frozenset(range(2 * ON_CIRCLE)) in (group, set()) for group in groups)
    assert len(latent_clusters(decoder, method="agglomerative", n_clusters=2).members) == 2


def test_a_cluster_s_reconstruction_is_irreducible_where_its_feature_is(decoder):
    """A circle coded by latents around it; against two latents that fire independently."""
    random = np.random.default_rng(1)
    n, angle = 1500, random.uniform(0, TURN, 1500)
    centers = np.arange(ON_CIRCLE) * TURN / ON_CIRCLE
    codes = np.zeros((n, len(decoder)))
    tuned = np.maximum(np.cos(angle[:, None] - centers) - 0.7, 0)
    codes[:, :ON_CIRCLE] = tuned / np.linalg.norm(decoder[:ON_CIRCLE], axis=1)
    pair = [2 * ON_CIRCLE, 2 * ON_CIRCLE + 1]
    codes[:, pair] = random.exponential(size=(n, 2)) * (random.uniform(size=(n, 2)) < 0.5)
    sae = SparseAutoencoder(D, len(decoder), {"name": "relu"}, random_state=0)
    with torch.no_grad():
        sae.decoder.copy_(torch.from_numpy(decoder))
    code = SparseCode.of(torch.from_numpy(codes).float())
    (ring, *_) = latent_clusters(decoder, method="components", threshold=0.8).members
    if 0 not in ring:
        ring = np.arange(ON_CIRCLE)
    rows, written = cluster_reconstruction(sae, code, ring)
    expected = codes[:, ring] @ decoder[ring]
    np.testing.assert_allclose(written.numpy(), expected[rows.numpy()], atol=1e-5)
    options = {"n_components": 2, "n_resamples": 10}
    (circle,) = irreducible_planes(written.double().numpy(), **options)
    rows, apart = cluster_reconstruction(sae, code, pair)
    assert len(rows) == (codes[:, pair].sum(1) > 0).sum()
    both = apart[(code.dense()[rows][:, pair] > 0).all(1)]
    (two,) = irreducible_planes(both.double().numpy(), **options)
    assert not circle.separability.is_separable
    assert circle.separability.index > 4 * two.separability.index
    assert circle.mixture.index < 0.4  # a uniform circle: 0.219


def test_latents_that_fire_together_are_found_by_co_activation():
    random = np.random.default_rng(2)
    topic = random.integers(0, 3, 900)
    member = np.repeat(np.arange(3), 5)
    fires = (random.uniform(size=(900, 15)) < 0.6) & (topic[:, None] == member)
    codes = np.zeros((900, 16))
    codes[:, :15] = fires
    decoder = random.normal(size=(16, D))
    shuffled = random.permutation(16)
    for how in ({"method": "spectral", "n_clusters": 3}, {"method": "agglomerative"}):
        how = how | ({"threshold": 0.2} if how["method"] == "agglomerative" else {})
        found = latent_clusters(decoder[shuffled], codes[:, shuffled], **how)
        groups = {frozenset(shuffled[m].tolist()) for m in found.members}
        assert groups == of_rows(range(5), range(5, 10), range(10, 15))
        assert 15 not in shuffled[found.latents]  # it never fires


def test_co_activation_is_the_jaccard_index_and_correlation_is_pearson_s():
    random = np.random.default_rng(3)
    codes = random.normal(size=(80, 7)) * (random.uniform(size=(80, 7)) < 0.4)
    codes[:, 6] = 0
    fires = codes != 0
    both = (fires[:, :, None] & fires[:, None]).sum(0)
    either = (fires[:, :, None] | fires[:, None]).sum(0)
    np.testing.assert_allclose(
        co_activation(codes).toarray(), np.where(either, both / np.maximum(either, 1), 0)
    )
    latents, correlation, cosine = correlated_latents(codes, 5)
    expected = np.corrcoef(codes[:, :6].T) - 2 * np.eye(6)
    np.testing.assert_array_equal(latents[:6], np.argsort(-expected, axis=1)[:, :5])
    np.testing.assert_allclose(correlation[:6], -np.sort(-expected, axis=1)[:, :5], atol=1e-12)
    assert latents[6].tolist() == [-1] * 5
    columns = codes[:, :6] / np.linalg.norm(codes[:, :6], axis=0)
    np.testing.assert_allclose(
        cosine[:6], np.take_along_axis(columns.T @ columns, latents[:6], 1), atol=1e-12
    )


def test_duplicates_are_grouped_and_coherence_measured():
    random = np.random.default_rng(4)
    rows = unit(random.normal(size=(40, D)))
    rows[5] = unit(rows[1] + 0.1 * unit(random.normal(size=D)))
    rows[9] = 3 * rows[1]
    rows[20] = unit(rows[30] + 0.2 * unit(random.normal(size=D)))
    rows[33] = 0
    assert duplicated_latents(rows) == [[1, 5, 9], [20, 30]]
    found = decoder_coherence(rows)
    assert set(found.duplicates()) == {1, 5, 9, 20, 30}
    live = np.delete(np.arange(40), 33)
    cosine = unit(rows[live]) @ unit(rows[live]).T
    np.fill_diagonal(cosine, np.nan)
    np.testing.assert_allclose(found.cosine, np.nanmax(cosine, 1), atol=1e-12)
    np.testing.assert_array_equal(found.nearest, live[np.nanargmax(cosine, 1)])
    assert found.largest == pytest.approx(np.nanmax(np.abs(cosine)))
    assert found.mean_square == pytest.approx(np.nanmean(cosine**2))
    assert found.random_cosine.max() < 0.9
    assert duplicated_latents(rows, threshold=0.999) == [[1, 9]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "kmeans"}, "method='kmeans' is not one of"),
        ({}, "method='spectral' needs n_clusters"),
        ({"n_clusters": 99}, "n_clusters=99 must lie between"),
        ({"method": "components", "threshold": 1.5}, "threshold=1.5"),
        ({"latents": [0, 1], "n_clusters": 2}, "2 latents with a direction"),
        ({"n_clusters": 2, "n_neighbors": 99}, "n_neighbors=99"),
        ({"n_clusters": 2, "code": np.ones((3, 4))}, "the code has 4 latents"),
    ],
)
def test_latent_clusters_rejects(decoder, change, message):
    with pytest.raises(ValueError, match=message):
        latent_clusters(decoder, **change)


def test_the_others_reject():
    with pytest.raises(ValueError, match="threshold=0"):
        duplicated_latents(np.eye(3), threshold=0)
    with pytest.raises(ValueError, match="0 latents have a decoder row"):
        decoder_coherence(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="n_neighbors=0"):
        correlated_latents(np.eye(3), 0)
    sae = SparseAutoencoder(4, 6, {"name": "topk", "k": 1}, random_state=0)
    code = code_rows(sae, torch.ones(3, 4))
    silent = (~code.fires).nonzero()[:, 0]
    with pytest.raises(ValueError, match="none of the 5 latents fires on the 3 rows"):
        cluster_reconstruction(sae, code, silent)
