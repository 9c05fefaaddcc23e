import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from manifold_unlearn.dictionary import SparseAutoencoder
from manifold_unlearn.evaluate import targeted_perturbation
from manifold_unlearn.evaluate.dictionary_tpp import without_latents

N_CLASSES, D = 3, 12


def world(n=300, seed=0):
    """Rows of one class direction and one other direction each, rotated."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(D, D)))[0]
    labels = rng.integers(N_CLASSES, size=n)
    codes = np.zeros((n, D))
    codes[np.arange(n), labels] = rng.uniform(1, 2, size=n)
    codes[np.arange(n), rng.integers(N_CLASSES, D, size=n)] = rng.uniform(1, 2, size=n)
    return torch.tensor(codes @ turn), labels, codes, turn


def dictionary(directions, turn):
    """A latent for each row of ``directions``, rotated; exact where they are orthonormal."""
    weight = torch.tensor(np.asarray(directions) @ turn)
    sae = SparseAutoencoder(D, len(weight), {"name": "topk", "k": 2}).double()
    with torch.no_grad():
        sae.encoder.copy_(weight)
        sae.decoder.copy_(weight)
    return sae


def balanced(right, own):
    return (right[own].mean() + right[~own].mean()) / 2


def test_a_class_that_is_a_latent_can_be_taken_out_alone():
    rows, labels, codes, turn = world()
    held_out = np.arange(300) % 2 == 0
    sae = dictionary(np.eye(D), turn)
    found = targeted_perturbation(sae, rows, labels, held_out, top_n=(1, 4))
    assert [own[0] for own in found.latents] == [0, 1, 2]
    np.testing.assert_allclose(found.accuracy, 1)
    # without its latent a row of the class is read as of no class: own probe at one half
    drops = found.drops[0]
    np.testing.assert_allclose(np.diag(drops), 0.5)
    assert np.abs(drops[~np.eye(3, dtype=bool)]).max() < 0.05
    assert 0.45 < found.scores[1] <= 0.55
    assert abs(found.random_scores[1]) < 0.2
    low, high = found.score_intervals[1]
    assert low <= found.scores[1] <= high and high - low < 0.2


def test_figures_are_those_of_probes_on_rows_changed_by_hand():
    rows, labels, codes, turn = world()
    held_out = np.arange(300) % 3 == 0
    mixed = np.eye(D)
    mixed[0, 1] = 0.6  # the latent of class 0 writes class 1 too
    sae = dictionary(mixed, turn)
    found = targeted_perturbation(sae, rows, labels, held_out, top_n=(1, 2))
    X = rows.numpy()
    f = sae.encode(rows).detach().numpy()
    W = sae.W_dec.detach().numpy()
    probes = [
        LogisticRegression(max_iter=1000, class_weight="balanced").fit(
            X[~held_out], labels[~held_out] == c
        )
        for c in range(3)
    ]
    for c in range(3):
        own = labels[~held_out] == c
        difference = f[~held_out][own].mean(0) - f[~held_out][~own].mean(0)
        effect = np.maximum(difference, 0) * (W @ probes[c].coef_[0])
        order = np.argsort(-effect)[:2]
        assert found.latents[c] == tuple(order[effect[order] > 0])
        for i, k in enumerate((1, 2)):
            gone = list(found.latents[c][:k])
            changed = X[held_out] - f[held_out][:, gone] @ W[gone]
            for j in range(3):
                truth = labels[held_out] == j
                before = balanced(probes[j].predict(X[held_out]) == truth, truth)
                after = balanced(probes[j].predict(changed) == truth, truth)
                assert found.accuracy[j] == pytest.approx(before)
                assert found.drops[i, c, j] == pytest.approx(before - after)
    own = np.diagonal(found.drops, axis1=1, axis2=2)
    others = (found.drops.sum(2) - own) / 2
    assert list(found.scores.values()) == pytest.approx((own - others).mean(1).tolist())


def test_latents_that_mix_classes_score_less():
    rows, labels, _, turn = world()
    held_out = np.arange(300) % 2 == 0
    clean = targeted_perturbation(dictionary(np.eye(D), turn), rows, labels, held_out, top_n=(1,))
    mixed = np.eye(D)
    mixed[:3, :3] = 1 / np.sqrt(3)  # every class latent is the sum of all classes
    entangled = dictionary(mixed, turn)
    found = targeted_perturbation(entangled, rows, labels, held_out, top_n=(1,))
    assert found.scores[1] < clean.scores[1] - 0.2


def test_what_is_not_reconstructed_is_kept():
    rows, _, codes, turn = world()
    sae = dictionary(np.eye(D)[:4], turn)  # knows four of twelve directions
    changed = without_latents(sae, rows, [1])
    expected = rows.numpy() - codes[:, 1:2] @ turn[1:2]
    np.testing.assert_allclose(changed, expected, atol=1e-9)
    np.testing.assert_array_equal(without_latents(sae, rows, []), rows.numpy())


def test_figures_are_written_and_bad_input_is_refused():
    rows, labels, _, turn = world()
    held_out = np.arange(300) % 2 == 0
    sae = dictionary(np.eye(D), turn)
    names = np.array(["a", "b", "c"])[labels]
    found = targeted_perturbation(sae, rows, names, held_out, top_n=(1,))
    written = json.loads(json.dumps(found.to_json()))
    assert written["classes"] == ["a", "b", "c"]
    assert written["scores"]["1"]["score"] == found.scores[1]
    assert written["scores"]["1"]["intended_drop"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"held-out rows have 1 of 3 classes"):
        targeted_perturbation(sae, rows, labels, labels == 0)
    with pytest.raises(ValueError, match="300 rows with 2 labels"):
        targeted_perturbation(sae, rows, labels[:2], held_out)
    with pytest.raises(ValueError, match="every count at least 1"):
        targeted_perturbation(sae, rows, labels, held_out, top_n=(0,))
