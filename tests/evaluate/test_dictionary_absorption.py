import json

import numpy as np
import pytest
import torch

from manifold_unlearn.dictionary import Crosscoder, SparseAutoencoder, Transcoder
from manifold_unlearn.evaluate import AbsorptionRule, feature_absorption

N_KINDS, ABSORBED = 40, 10
PARENT, OTHER = N_KINDS, N_KINDS + 1
D = N_KINDS + 2


def world(n=2400, seed=0):
    """Rows that have the feature or its opposite, and each one of 40 kinds: all orthogonal."""
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.5
    kind = rng.integers(N_KINDS, size=n)
    rows = np.eye(D)[kind] + np.where(labels[:, None], np.eye(D)[PARENT], np.eye(D)[OTHER])
    return torch.tensor(rows), labels, kind


def absorbing(weak=0.0):
    """Exact dictionary whose feature latent is silent for 10 of the kinds: theirs carry it.

    With ``weak`` it fires there, but only so strongly; the rest is carried by the kind's latent.
    """
    eye = np.eye(D)
    encoder, decoder, bias = [], [], []

    def latent(reads, writes, shift=0.0):
        encoder.append(reads)
        decoder.append(writes)
        bias.append(shift)

    absorbed = eye[:ABSORBED].sum(0)
    latent(eye[PARENT] - (1 - weak) * absorbed, eye[PARENT])
    latent(eye[OTHER], eye[OTHER])
    for kind in range(ABSORBED):  # one latent for the kind with the feature, one without
        latent(eye[kind] + eye[PARENT], eye[kind] + (1 - weak) * eye[PARENT], -1)
        latent(eye[kind] - eye[PARENT], eye[kind])
    for kind in range(ABSORBED, N_KINDS):
        latent(eye[kind], eye[kind])
    sae = SparseAutoencoder(D, len(encoder), {"name": "relu"}).double()
    with torch.no_grad():
        sae.encoder.copy_(torch.tensor(np.array(encoder)))
        sae.decoder.copy_(torch.tensor(np.array(decoder)))
        sae.b_enc.copy_(torch.tensor(bias))
    return sae


@pytest.fixture(scope="module")
def planted():
    rows, labels, kind = world()
    return rows, labels, kind, np.arange(len(labels)) % 2 == 0


def test_the_planted_dictionaries_are_exact(planted):
    for weak in (0.0, 0.3):
        sae = absorbing(weak)
        torch.testing.assert_close(sae(planted[0]), planted[0])


def test_the_planted_rate_is_found(planted):
    rows, labels, kind, held_out = planted
    found = feature_absorption(absorbing(), rows, labels, held_out)
    asked = kind[held_out & labels]
    assert found.main == (0,)  # each absorbing latent is too special to be a split
    assert found.probe_f1 == 1
    np.testing.assert_array_equal(found.full.values, asked < ABSORBED)
    assert 0.2 < found.full.mean < 0.3
    np.testing.assert_allclose(found.fraction.values, found.full.values)
    expected = np.where(asked < ABSORBED, 2 + 2 * asked, -1)
    np.testing.assert_array_equal(found.absorbing, expected)
    recall = 1 - found.full.mean
    assert found.f1[0] == pytest.approx(2 * recall / (1 + recall))
    written = json.loads(json.dumps(found.to_json()))
    assert len(written["absorbing"]) == ABSORBED
    assert sum(written["absorbing"].values()) == found.full.values.sum()


def test_a_clean_dictionary_absorbs_nothing(planted):
    rows, labels, _, held_out = planted
    sae = SparseAutoencoder(D, D, {"name": "relu"}).double()
    with torch.no_grad():
        for weight in (sae.encoder, sae.decoder):
            weight.copy_(torch.eye(D))
    found = feature_absorption(sae, rows, labels, held_out)
    assert found.main == (PARENT,)  # and not the latent of the opposite, which tells as much
    assert found.f1[0] == 1
    assert found.full.mean == 0 and found.fraction.mean == 0
    assert (found.absorbing == -1).all()


def test_a_latent_that_fires_too_weakly_counts_by_its_fraction(planted):
    rows, labels, kind, held_out = planted
    weak = 0.3
    found = feature_absorption(absorbing(weak), rows, labels, held_out)
    assert found.full.mean == 0  # the main latent fires everywhere
    asked = kind[held_out & labels]
    # of the row's projection the main latent carries 0.3 and the other 0.7 of the feature, and the
    # kind itself next to nothing, for the probe does not point to it
    np.testing.assert_allclose(
        found.fraction.values, np.where(asked < ABSORBED, 1 - weak, 0), atol=0.03
    )


def test_what_is_lost_is_not_absorbed(planted):
    """The main latent is silent, but the latents of the kinds carry a fifth of the feature only."""
    rows, labels, kind, held_out = planted
    sae = absorbing()
    with torch.no_grad():
        sae.decoder[2 : 2 + 2 * ABSORBED : 2, PARENT] = 0.2
    found = feature_absorption(sae, rows, labels, held_out)
    assert found.main == (0,)
    assert found.full.mean == 0 and found.fraction.mean == 0
    lenient = feature_absorption(sae, rows, labels, held_out, rule=AbsorptionRule(least_share=0.1))
    np.testing.assert_array_equal(lenient.full.values, kind[held_out & labels] < ABSORBED)


def test_a_feature_that_is_split_into_equal_halves_is_not_absorbed(planted):
    """Two latents, each for half of the kinds, are both main ones."""
    rows, labels, kind, held_out = planted
    eye, encoder, decoder, bias = np.eye(D), [], [], []
    for half in (eye[: N_KINDS // 2].sum(0), eye[N_KINDS // 2 : N_KINDS].sum(0)):
        encoder.append(eye[PARENT] + half)
        decoder.append(eye[PARENT])
        bias.append(-1)
    for i in (OTHER, *range(N_KINDS)):
        encoder.append(eye[i])
        decoder.append(eye[i])
        bias.append(0)
    sae = SparseAutoencoder(D, len(encoder), {"name": "relu"}).double()
    with torch.no_grad():
        sae.encoder.copy_(torch.tensor(np.array(encoder)))
        sae.decoder.copy_(torch.tensor(np.array(decoder)))
        sae.b_enc.copy_(torch.tensor(bias))
    torch.testing.assert_close(sae(rows), rows)
    found = feature_absorption(sae, rows, labels, held_out)
    assert set(found.main) == {0, 1}
    assert found.f1[1] == 1
    assert found.full.mean == 0 and found.fraction.mean == 0


def test_what_cannot_be_judged_is_refused(planted):
    rows, labels, _, held_out = planted
    sae = absorbing()
    with pytest.raises(ValueError, match="the held-out rows have a single label"):
        feature_absorption(sae, rows, labels, held_out & labels)
    with pytest.raises(ValueError, match="2400 rows with 3 labels and 2400 of held_out"):
        feature_absorption(sae, rows, labels[:3], held_out)
    for coder in (
        Transcoder(D, 8, 5),
        Crosscoder(2, D // 2, 8),
        SparseAutoencoder(D, 8, normalization="layer_norm"),
        Transcoder(D, 8, skip=True),
        SparseAutoencoder(D, 8, deep=4),
    ):
        with pytest.raises(ValueError, match="does not write the rows it reads"):
            feature_absorption(coder, rows, labels, held_out)
    with pytest.raises(ValueError, match="the probe reads no held-out row of the feature right"):
        feature_absorption(sae, torch.where(torch.tensor(held_out)[:, None], -rows, rows), labels,
                           held_out)  # fmt: skip
