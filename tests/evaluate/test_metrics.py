from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn import load_model
from manifold_unlearn.activations.corpus import read_items
from manifold_unlearn.evaluate.likelihood import plain
from manifold_unlearn.evaluate.metrics import (
    TRUTH_RATIO_FORMS,
    answer_probability,
    answer_probability_published,
    answer_rank,
    forget_quality,
    geometric_mean,
    harmonic_mean,
    model_utility,
    option_probability,
    perplexity,
    truth_ratio,
    truth_ratio_preference,
    truth_ratio_probability,
    truth_ratio_published,
    truth_ratio_symmetric,
    truth_ratio_symmetric_published,
)
from manifold_unlearn.evaluate.suites import assess, summarize

SHARED = Path(__file__).parents[3] / "shared"


def logs(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_probability_is_the_geometric_mean_over_tokens():
    found = answer_probability([logs(0.5, 0.125), logs(0.3)])
    np.testing.assert_allclose(found, [0.25, 0.3])
    assert found.dtype == np.float64


def test_perplexity_is_over_tokens_not_over_texts():
    """-(log 1/2 + log 1/8 + log 1/4) / 3 = log 4."""
    assert perplexity([logs(0.5, 0.125), logs(0.25)]) == pytest.approx(4.0)
    assert perplexity([logs(0.5, 0.5, 0.5), logs(0.125)]) == pytest.approx(64 ** (1 / 4))


def test_perplexity_of_even_odds_is_the_vocabulary():
    assert perplexity([logs(*[1 / 300] * 7)]) == pytest.approx(300)


def test_rank_counts_the_alternatives_as_probable():
    assert answer_rank(0.5, [0.1, 0.2]) == 1
    assert answer_rank(0.5, [0.1, 0.7, 0.6]) == 3
    assert answer_rank(0.5, [0.5]) == 2
    assert answer_rank(0.5, []) == 1


def test_truth_ratio_by_hand():
    """Geometric mean of 0.1 and 0.4 is 0.2."""
    assert truth_ratio(0.8, [0.1, 0.4]) == pytest.approx(0.25)
    assert truth_ratio(0.1, [0.1, 0.4]) == pytest.approx(2)
    assert truth_ratio(0.3, [0.3]) == pytest.approx(1)


def test_truth_ratio_stays_finite_at_zero_probabilities():
    assert np.isfinite(truth_ratio(0.0, [1.0]))
    assert truth_ratio(1.0, [0.0]) > 0


def test_truth_ratio_needs_a_wrong_answer():
    with pytest.raises(ValueError, match="needs at least one perturbed_answer"):
        truth_ratio(0.5, [])


def test_the_two_published_forms():
    ratios = np.array([0.25, 1.0, 4.0])
    np.testing.assert_allclose(truth_ratio_symmetric(ratios), [0.25, 1, 0.25])
    np.testing.assert_allclose(truth_ratio_preference(ratios), [0.75, 0, 0])


def test_forget_quality_of_a_model_with_itself():
    ratios = np.linspace(0.1, 3, 40)
    same = forget_quality(ratios, ratios)
    assert (same["ks_statistic"], same["wasserstein"]) == (0, 0)
    assert same["p_value"] == pytest.approx(1)


def test_forget_quality_by_hand():
    """1 / (1 + r) is 1/2 against 1/4 everywhere; the distributions do not overlap."""
    apart = forget_quality(np.ones(30), np.full(30, 3.0))
    assert apart["ks_statistic"] == 1
    assert apart["wasserstein"] == pytest.approx(0.25)
    assert apart["p_value"] < 1e-10


def test_harmonic_mean_by_hand():
    assert harmonic_mean([1, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert harmonic_mean([1, 0, 0.5]) == 0


def test_harmonic_mean_smoothed_by_hand():
    assert harmonic_mean([0, 1], smoothing=0.5) == pytest.approx(2 / (1 / 0.5 + 1 / 1.5))
    assert harmonic_mean([0, 1], smoothing=1e-12) == pytest.approx(2e-12)


@pytest.mark.parametrize("values", [[], [0.5, np.nan], [np.inf]])
def test_a_harmonic_mean_that_is_not_defined_is_refused(values):
    with pytest.raises(ValueError, match="is not defined; give finite values"):
        harmonic_mean(values)


def test_the_published_probability_counts_the_label_that_nothing_predicts():
    rows = [logs(0.5, 0.125), logs(0.3)]
    found = answer_probability_published(rows, labels_first_token=True)
    np.testing.assert_allclose(found, [(1 / 16) ** (1 / 3), 0.3**0.5])
    same = answer_probability_published(rows, labels_first_token=False)
    np.testing.assert_allclose(same, answer_probability(rows))


def test_option_probability_by_hand():
    assert option_probability(0.2, [0.1, 0.1]) == pytest.approx(0.5)
    assert option_probability(1e-10, [1e-10], smoothing=1e-10) == pytest.approx(1 / 3)
    assert option_probability(0, [0], smoothing=1e-10) == 0
    with pytest.raises(ValueError, match="needs at least one wrong answer"):
        option_probability(0.5, [])
    with pytest.raises(ValueError, match="all options have probability 0"):
        option_probability(0, [0, 0])


def test_the_published_truth_ratio_parts_from_the_formula_at_tiny_probabilities_only():
    assert truth_ratio_published(0.8, [0.1, 0.4]) == pytest.approx(0.25, rel=1e-8)
    assert truth_ratio(1e-10, [1e-10]) == pytest.approx(1)
    assert truth_ratio_published(1e-10, [1e-10]) == pytest.approx(0.5)
    assert truth_ratio_published(0, [0.5]) == pytest.approx(0.5e10)
    with pytest.raises(ValueError, match="needs at least one perturbed_answer"):
        truth_ratio_published(0.5, [])


def test_every_form_of_the_truth_ratio_by_hand():
    """Once where the smoothing is nothing, once where it is as large as the probabilities."""
    plain, tiny = (0.4, 0.1), (1e-10, 3e-10)
    expected = {
        "ratio": (0.25, 3),
        "ratio_published": (0.25, 1.5),
        "symmetric": (0.25, 1 / 3),
        "symmetric_published": (0.25, 1 / 1.5),
        "preference": (0.75, 0),
        "preference_published": (0.75, 0),
        "probability": (0.8, 0.25),
        "probability_published": (0.8, 1 / 5),
    }
    assert TRUTH_RATIO_FORMS.keys() == expected.keys()
    correct, wrong = (np.array(side) for side in zip(plain, tiny, strict=True))
    for name, values in expected.items():
        np.testing.assert_allclose(TRUTH_RATIO_FORMS[name](correct, wrong), values, rtol=1e-8)


def test_single_forms_agree_with_the_table():
    ratios = np.array([0.2, 1.0, 7.0])
    np.testing.assert_allclose(truth_ratio_probability(ratios), [1 / 1.2, 1 / 2, 1 / 8])
    np.testing.assert_allclose(truth_ratio_symmetric_published(np.array([0.0, 4.0])), [0, 0.25])
    assert geometric_mean([0.1, 0.4]) == pytest.approx(0.2)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(c=st.floats(0, 1), w=st.floats(0, 1))
def test_truth_ratios_stay_finite_and_in_their_range(c, w):
    for name, form in TRUTH_RATIO_FORMS.items():
        (value,) = form(np.array([c]), np.array([w]))
        assert np.isfinite(value), name
        assert value >= 0
        assert value <= 1 or name.startswith("ratio"), name


def nine(value):
    sets, metrics = (
        ("retain", "real_authors", "world_facts"),
        ("probability", "rouge", "truth_ratio"),
    )
    return {f"{a}_{b}": value for a in sets for b in metrics}


def test_model_utility_is_the_harmonic_mean_of_nine():
    assert model_utility(nine(0.5)) == pytest.approx(0.5)
    parts = nine(1.0) | {"retain_rouge": 0.1, "world_facts_truth_ratio": 0.5}
    assert model_utility(parts) == pytest.approx(9 / (7 + 10 + 2))
    assert model_utility(nine(1.0) | {"retain_rouge": 0}) == 0
    assert model_utility(parts | {"another": 0.0}) == pytest.approx(9 / 19)


def test_model_utility_names_the_part_that_is_missing():
    parts = nine(0.5)
    del parts["real_authors_rouge"]
    with pytest.raises(ValueError, match="model_utility lacks real_authors_rouge"):
        model_utility(parts)


@pytest.mark.parametrize("sample", [[], [1.0, np.nan]])
def test_forget_quality_of_nothing_is_refused(sample):
    with pytest.raises(ValueError, match="reference_ratios must be finite and at least one"):
        forget_quality(np.ones(3), np.array(sample))


def test_forget_quality_is_invariant_where_it_is_published_to_be():
    """Every monotone form of the truth ratio gives the same KS statistic."""
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(size=60), rng.lognormal(0.7, size=50)
    plain = forget_quality(a, b)
    turned = forget_quality(1 / (1 + a), 1 / (1 + b))
    assert plain["ks_statistic"] == pytest.approx(turned["ks_statistic"])
    both = np.concatenate([a, b])
    gaps = [abs((a <= x).mean() - (b <= x).mean()) for x in both]
    assert plain["ks_statistic"] == pytest.approx(max(gaps))


# --- figures published with the checkpoints -------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.shared
@pytest.mark.skipif(
    not (SHARED / "models" / "tofu-stories15m").is_dir(),
    reason="../shared/models/tofu-stories15m is not there",
)
def test_the_figures_in_the_readme_of_the_checkpoints_are_reproduced():
    """Probability and truth ratio on the forget set, and the two-sample test between the two."""
    readme = {"told": (0.996, 0.369), "never_told": (0.003, 0.566)}
    path = SHARED / "data" / "tofu" / "forget05_perturbed.jsonl"
    items = [
        replace(item, paraphrased_question=())
        for item in read_items(path, template="Question: {question}\nAnswer:")
    ]
    ratios = {}
    for name, expected in readme.items():
        model, tokenizer = load_model(SHARED / "models" / "tofu-stories15m" / name)
        found = assess(plain(model), tokenizer, items, include_eos=True, generate=False)
        means = summarize(found)
        measured = [means["probability"], means["truth_ratio"]]
        np.testing.assert_allclose(measured, expected, atol=0.0015)
        ratios[name] = found["truth_ratio"].values
    quality = forget_quality(ratios["told"], ratios["never_told"])
    assert quality["ks_statistic"] == pytest.approx(0.405, abs=0.02)
    assert quality["p_value"] < 1e-12
