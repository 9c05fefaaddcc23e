import json

import numpy as np
import pytest
import torch

from manifold_unlearn.dictionary import Crosscoder, SparseAutoencoder
from manifold_unlearn.evaluate import sparse_probing
from manifold_unlearn.evaluate.dictionary_probing import (
    code_matrix,
    columns,
    rank_by_difference,
)


def planted(n=400, d=24, per_row=4, noise=0.0, seed=0):
    """Rows of few rotated directions, a dictionary that knows them, and the codes."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(d, d)))[0]
    codes = np.zeros((n, d))
    for row in codes:
        row[rng.choice(d, size=per_row, replace=False)] = rng.uniform(1, 2, size=per_row)
    sae = SparseAutoencoder(d, d, {"name": "topk", "k": per_row}).double()
    with torch.no_grad():
        for weight in (sae.encoder, sae.decoder):
            weight.copy_(torch.tensor(directions))
    rows = codes @ directions + noise * rng.normal(size=(n, d))
    return sae, torch.tensor(rows), codes


def test_the_matrix_of_codes_is_what_the_dictionary_encodes():
    sae, rows, codes = planted()
    found = code_matrix(sae, rows)
    np.testing.assert_allclose(found.toarray(), codes, atol=1e-9)
    assert found.nnz == 400 * 4
    np.testing.assert_array_equal(columns(found, np.array([3, 1])), found.toarray()[:, [3, 1]])


def test_columns_are_ranked_by_the_difference_of_their_means():
    sae, rows, codes = planted()
    labels = codes[:, 5] > 0
    difference = np.abs(codes[labels].mean(0) - codes[~labels].mean(0))
    for X in (codes, code_matrix(sae, rows)):
        order = rank_by_difference(X, labels)
        assert order[0] == 5
        assert (np.diff(difference[order]) <= 1e-9).all()
    against = rank_by_difference(codes, ~labels, for_label=True)
    assert against[-1] == 5


def test_a_label_that_is_one_latent_is_read_from_one():
    sae, rows, codes = planted()
    found = sparse_probing(sae, rows, codes[:, 5] > 0, ks=(1, 2, 5))
    assert found.chosen[0] == (5,) and found.chosen[2][0] == 5
    assert found.few["latents"][0].mean == 1
    assert found.balanced()[1] == found.balanced()[5] == 1
    assert found.balanced("random_latents")[1] < 0.75
    assert 0.5 < found.balanced("coordinates")[1] < 0.9  # rotated: no coordinate is the label
    assert found.balanced_whole > 0.95


def test_a_label_of_two_latents_needs_two():
    sae, rows, codes = planted()
    labels = (codes[:, 5] > 0) | (codes[:, 6] > 0)
    found = sparse_probing(sae, rows, labels, ks=(1, 2))
    assert 0.65 < found.balanced()[1] < 0.85  # of the label's rows each latent has about half
    assert found.balanced()[2] == 1
    assert set(found.chosen[1]) == {5, 6}


def test_a_label_that_is_nothing_is_not_read():
    sae, rows, _ = planted()
    labels = np.random.default_rng(1).random(400) < 0.5
    found = sparse_probing(sae, rows, labels, ks=(1, 5))
    for reader in found.few:
        assert all(0.38 < value < 0.62 for value in found.balanced(reader).values())
    assert 0.38 < found.balanced_whole < 0.62


def test_groups_are_never_split():
    """Rows that only tell which group they are of tell nothing of another group's label."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(24), 10)
    labels = groups % 2 == 0
    rows = torch.tensor(np.eye(24)[groups] + 0.01 * rng.normal(size=(240, 24)))
    sae = SparseAutoencoder(24, 24, {"name": "topk", "k": 1}).double()
    with torch.no_grad():
        for weight in (sae.encoder, sae.decoder):
            weight.copy_(torch.eye(24))
    split = sparse_probing(sae, rows, labels, ks=(24,))
    whole = sparse_probing(sae, rows, labels, groups=groups, ks=(24,))
    assert split.balanced()[24] == 1
    assert whole.balanced()[24] < 0.7


def test_a_crosscoder_is_read_too_and_figures_are_written():
    coder = Crosscoder(2, 12, 40, {"name": "topk", "k": 4}, random_state=0)
    rows = torch.randn(120, 2, 12, generator=torch.Generator().manual_seed(0))
    labels = (coder.encode(rows)[:, 7] > 0).numpy()
    labels[:10] = True
    found = sparse_probing(coder, rows, labels, ks=(1, 100), n_splits=3)
    written = json.loads(json.dumps(found.to_json()))
    assert written["ks"] == [1, 100]
    assert written["latents"][0]["accuracy"] == found.few["latents"][0].mean
    assert len(written["chosen"][1]) == 40


def test_what_cannot_be_probed_is_refused():
    sae, rows, codes = planted()
    labels = codes[:, 5] > 0
    with pytest.raises(ValueError, match="n_splits=5 with 0 groups of the rarer label"):
        sparse_probing(sae, rows, np.zeros(400, dtype=bool))
    with pytest.raises(ValueError, match="400 rows with 3 labels"):
        sparse_probing(sae, rows, labels[:3])
    with pytest.raises(ValueError, match="every k at least 1"):
        sparse_probing(sae, rows, labels, ks=(0,))
    with pytest.raises(ValueError, match="reader='x' is not one of latents"):
        sparse_probing(sae, rows, labels, ks=(1,)).balanced("x")
