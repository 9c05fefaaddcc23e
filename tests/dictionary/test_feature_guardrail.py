"""A clamp behind the share of tokens that fire: causal, calibrated, the same with a cache."""

import math

import numpy as np
import pytest
import torch

from manifold_unlearn.dictionary import SparseAutoencoder
from manifold_unlearn.dictionary.clamp import FeatureClamp
from manifold_unlearn.dictionary.feature_eraser import FeatureEraser
from manifold_unlearn.dictionary.guardrail import FeatureGuardrail, GuardedClamp
from manifold_unlearn.intervene.hooks import intervene


def identity_coder(d=8):
    """The dictionary whose latents are the positive coordinates."""
    coder = SparseAutoencoder(d, d, {"name": "relu"}, centered=False)
    with torch.no_grad():
        coder.encoder.copy_(torch.eye(d))
        coder.decoder.copy_(torch.eye(d))
    return coder


def texts(n=120, length=12, d=8, forget_rate=0.7, retain_rate=0.08, seed=0):
    """Rows of texts; the first latent fires at a rate of its own on either side."""
    draw = np.random.default_rng(seed)
    y = np.repeat(np.arange(n) < n // 2, length).astype(int)
    X = draw.uniform(0.5, 1.0, size=(n * length, d)) * (draw.random((n * length, d)) < 0.3)
    rate = np.where(y == 1, forget_rate, retain_rate)
    X[:, 0] = (draw.random(len(y)) < rate) * 1.0
    return X, y, np.repeat(np.arange(n), length)


def shares(fires, min_tokens):
    """Largest share of tokens that fired, at every token, written out one by one."""
    found, most = [], 0.0
    for t in range(1, len(fires) + 1):
        most = max(most, sum(fires[:t]) / max(t, min_tokens))
        found.append(most)
    return np.array(found)


def fitted(**how):
    X, y, sequence = texts()
    eraser = FeatureEraser(identity_coder(), 1, max_retain_rate=0.15)
    guardrail = FeatureGuardrail(eraser, random_state=0, **{"false_positive_rate": 0.1, **how})
    return guardrail.fit(X, y, sequence=sequence), X, y, sequence


def test_it_acts_where_the_share_so_far_exceeds_the_threshold_and_nowhere_else():
    guardrail, X, _, sequence = fitted()
    assert guardrail.eraser_.latents_.tolist() == [0]
    opened = np.concatenate(
        [shares(X[sequence == s, 0] > 0, 4) > guardrail.threshold_ for s in range(120)]
    )
    assert 0 < opened.mean() < 1
    erased = guardrail.transform(X, sequence)
    expected = X.copy()
    expected[opened, 0] = 0
    assert np.array_equal(erased, expected)
    assert np.array_equal(guardrail.gate(X, sequence), opened.astype(float))


def test_the_threshold_is_the_conformal_quantile_of_retain_texts_that_chose_nothing():
    guardrail, X, y, sequence = fitted()
    retain = np.unique(sequence[y == 0])
    most = {s: shares(X[sequence == s, 0] > 0, 4)[-1] for s in retain}
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:30]
    held = sorted(most[retain[i]] for i in order.tolist())
    rank = math.ceil(31 * 0.9)
    assert guardrail.threshold_ == pytest.approx(held[rank - 1], rel=1e-6)
    assert guardrail.promised_rate_ == pytest.approx(1 - rank / 31)
    assert guardrail.promised_rate_ <= 0.1
    forget = [shares(X[sequence == s, 0] > 0, 4)[-1] for s in np.unique(sequence[y == 1])]
    assert guardrail.opened_ == pytest.approx(np.mean(np.array(forget) > guardrail.threshold_))
    assert guardrail.opened_ > 0.9


def test_further_retain_texts_open_it_no_more_often_than_promised():
    rates = []
    for seed in range(20):
        X, y, sequence = texts(seed=seed)
        eraser = FeatureEraser(identity_coder(), 1, max_retain_rate=0.15)
        guardrail = FeatureGuardrail(eraser, false_positive_rate=0.1, random_state=seed)
        guardrail.fit(X, y, sequence=sequence)
        fresh, labels, of = texts(seed=100 + seed)
        gate = guardrail.gate(fresh, of)
        opened = [gate[of == s].max() for s in np.unique(of[labels == 0])]
        rates.append(np.mean(opened))
    # mean of 20 draws of a rate promised to be at most .1: standard error below .02
    assert np.mean(rates) < 0.1 + 2 * 0.02


def test_one_pass_or_two_with_what_the_first_gathered_give_the_same():
    guardrail, X, _, _ = fitted()
    h = torch.tensor(X[: 4 * 12]).reshape(4, 12, 8)
    present = torch.ones(4, 12, dtype=torch.bool)
    present[1, :5] = False
    start = torch.zeros(4, 3)
    whole, evidence = guardrail.step(h, start, present)
    first, between = guardrail.step(h[:, :7], start, present[:, :7])
    second, after = guardrail.step(h[:, 7:], between[:, -1], present[:, 7:])
    assert torch.equal(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(torch.cat([between, after], 1), evidence)
    assert torch.equal(whole[1, :5], h[1, :5])


def test_generation_with_a_cache_is_edited_as_one_pass_is(llama):
    width = llama.config.hidden_size
    coder = SparseAutoencoder(width, 2 * width, {"name": "relu"}, random_state=0)
    guarded = GuardedClamp(FeatureClamp(coder, [0, 1], -5.0), 0.3, 2)
    ids = torch.randint(3, 300, (3, 10), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        bare = llama(ids).logits
        with intervene(llama, {"layers.0": guarded}):
            whole = llama(ids).logits
            cache = llama(ids[:, :4], use_cache=True)
            parts = [cache.logits]
            for t in range(4, 10):
                cache = llama(ids[:, t : t + 1], past_key_values=cache.past_key_values)
                parts.append(cache.logits)
        assert torch.equal(llama(ids).logits, bare)
    assert not torch.allclose(whole, bare)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    guardrail, X, _, sequence = fitted(min_tokens=3)
    guardrail.save(tmp_path / "guardrail")
    loaded = FeatureGuardrail.load(tmp_path / "guardrail")
    assert np.array_equal(loaded.transform(X, sequence), guardrail.transform(X, sequence))
    assert (loaded.min_tokens, loaded.threshold_) == (3, guardrail.threshold_)
    assert loaded.promised_rate_ == guardrail.promised_rate_


def test_too_few_texts_for_the_rate_are_said_with_the_number_needed():
    X, y, sequence = texts()
    eraser = FeatureEraser(identity_coder(), 1, max_retain_rate=0.15)
    with pytest.warns(UserWarning, match=r"30 held-out .* rate of 0\.0323 at best; 0\.01 needs 99"):
        guardrail = FeatureGuardrail(eraser, false_positive_rate=0.01, random_state=0).fit(
            X, y, sequence=sequence
        )
    assert guardrail.promised_rate_ == pytest.approx(1 / 31)


def test_bad_input_is_refused():
    X, y, sequence = texts()
    eraser = FeatureEraser(identity_coder(), 1, max_retain_rate=0.15)
    with pytest.raises(ValueError, match="sequence is missing"):
        FeatureGuardrail(eraser).fit(X, y)
    with pytest.raises(ValueError, match="one a row"):
        FeatureGuardrail(eraser).fit(X, y, sequence=sequence[:-1])
    with pytest.raises(ValueError, match="1 retain sequences cannot both"):
        FeatureGuardrail(eraser).fit(X, y, sequence=np.where(y == 1, sequence, 200))
    with pytest.raises(ValueError, match="false_positive_rate=1"):
        FeatureGuardrail(eraser, false_positive_rate=1).fit(X, y, sequence=sequence)
    with pytest.raises(ValueError, match="min_tokens=0"):
        FeatureGuardrail(eraser, min_tokens=0).fit(X, y, sequence=sequence)
    with pytest.raises(ValueError, match="not a FeatureEraser"):
        FeatureGuardrail(None).fit(X, y, sequence=sequence)
    guardrail = FeatureGuardrail(eraser, random_state=0).fit(X, y, sequence=sequence)
    with pytest.raises(ValueError, match="needs the rows of a sequence in order"):
        guardrail(torch.tensor(X))
