import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from manifold_unlearn.dictionary import SparseAutoencoder
from manifold_unlearn.evaluate import spurious_removal

D = 10


def world(n=800, cue_size=2.0, seed=0):
    """Directions 0 and 1 tell the target, 2 and 3 the cue, which is louder; rotated."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(D, D)))[0]
    target, cue = rng.random(n) < 0.5, rng.random(n) < 0.5
    codes = np.zeros((n, D))
    codes[np.arange(n), np.where(target, 0, 1)] = rng.uniform(1, 1.5, size=n)
    codes[np.arange(n), np.where(cue, 2, 3)] = cue_size * rng.uniform(1, 1.5, size=n)
    codes[np.arange(n), rng.integers(4, D, size=n)] = 1
    sae = SparseAutoencoder(D, D, {"name": "topk", "k": 3}).double()
    with torch.no_grad():
        for weight in (sae.encoder, sae.decoder):
            weight.copy_(torch.tensor(turn))
    return sae, torch.tensor(codes @ turn), target, cue, np.arange(n) % 2 == 0


def test_a_cue_of_its_own_latents_is_taken_out():
    sae, rows, target, cue, held_out = world()
    found = spurious_removal(sae, rows, target, cue, held_out, top_n=(2,))
    assert set(found.latents) == {2, 3}
    assert found.unbiased == 1
    assert found.biased < 0.6  # it reads the cue
    assert found.freed == (1.0,)
    assert found.scores == {2: 1.0}
    assert abs(found.random_scores[2]) < 0.5
    written = json.loads(json.dumps(found.to_json()))
    assert written["scores"] == {"2": 1.0} and set(written["latents"]) == {2, 3}


def test_figures_are_those_of_probes_by_hand():
    sae, rows, target, cue, held_out = world(cue_size=1.0)
    found = spurious_removal(sae, rows, target, cue, held_out, top_n=(1, 2))
    X, agree = rows.numpy(), ~held_out & (target == cue)
    weight = np.where(target[agree], 1 / target[agree].sum(), 1 / (~target[agree]).sum())
    weight *= agree.sum() / weight.sum()
    probe = LogisticRegression(max_iter=1000).fit(X[agree], target[agree], sample_weight=weight)

    def accuracy(given):
        right = probe.predict(given) == target[held_out]
        t, c = target[held_out], cue[held_out]
        return np.mean([right[(t == a) & (c == b)].mean() for a in (0, 1) for b in (0, 1)])

    assert found.biased == pytest.approx(accuracy(X[held_out]))
    f, W = sae.encode(rows).detach().numpy(), sae.W_dec.detach().numpy()
    for k, value in zip((1, 2), found.freed, strict=True):
        gone = list(found.latents[:k])
        changed = X[held_out] - f[held_out][:, gone] @ W[gone]
        assert value == pytest.approx(accuracy(changed))
    expected = (found.freed[1] - found.biased) / (found.unbiased - found.biased)
    assert found.scores[2] == pytest.approx(expected)


def test_where_the_cue_does_no_harm_there_is_no_score():
    sae, rows, target, cue, held_out = world(cue_size=1e-6)
    found = spurious_removal(sae, rows, target, cue, held_out, top_n=(2,))
    assert found.biased == found.unbiased == 1
    assert np.isnan(found.scores[2]) and found.to_json()["scores"] == {"2": None}


def test_bad_input_is_refused():
    sae, rows, target, cue, held_out = world()
    with pytest.raises(ValueError, match=r"training rows lack .* \[\(False, True\), \(True, Fal"):
        spurious_removal(sae, rows, np.where(held_out, target, cue), cue, held_out)
    with pytest.raises(ValueError, match="800 rows with 3 targets"):
        spurious_removal(sae, rows, target[:3], cue, held_out)
    with pytest.raises(ValueError, match="every count at least 1"):
        spurious_removal(sae, rows, target, cue, held_out, top_n=(0,))
