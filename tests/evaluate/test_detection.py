import numpy as np
import pytest
import torch
from cases import TEXTS, two_classes
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from manifold_unlearn import SubspaceEraser, capture
from manifold_unlearn.evaluate.detection import detect_texts, detection_auroc
from manifold_unlearn.steer.vectors import SteeringVector


@pytest.fixture(scope="module")
def data():
    return two_classes()


def test_the_area_is_that_of_scikit_learn_whatever_the_detector(data):
    X, y = data
    direction = X[y == 1].mean(0) - X[y == 0].mean(0)
    probe = LogisticRegression().fit(X, y)
    eraser, vector = SubspaceEraser("leace").fit(X, y), SteeringVector().fit(X, y)
    cases = [
        (direction, X @ direction),
        (torch.tensor(direction).float(), X @ direction),
        (probe, probe.decision_function(X)),
        (eraser, X @ eraser.directions_[:, 0]),
        (vector, X @ vector.vector_),
        (lambda rows: rows[:, 3].round(), X[:, 3].round()),  # with ties
    ]
    for detector, scores in cases:
        found = detection_auroc(detector, X, y)
        assert found.auroc == pytest.approx(roc_auc_score(y, scores), abs=1e-6)
        low, high = found.interval
        assert low < found.auroc < high
    assert found.is_concept.sum() == (y == 1).sum()
    assert detection_auroc(-direction, X, y).auroc == pytest.approx(
        1 - detection_auroc(direction, X, y).auroc
    )


def test_a_useless_detector_is_at_chance_and_its_interval_says_so(data):
    X, y = data
    noise = torch.tensor(np.random.default_rng(0).normal(size=280))
    found = detection_auroc(lambda rows: noise, X, y)
    low, high = found.interval
    assert low < 0.5 < high
    standard = np.sqrt((120 + 160 + 1) / (12 * 120 * 160))  # of the Mann-Whitney statistic
    assert high - low == pytest.approx(2 * 1.96 * standard, rel=0.15)
    assert detection_auroc(lambda rows: rows[:, 0] * 0, X, y).auroc == 0.5


def test_texts_are_scored_by_their_rows():
    rows = np.array([[1.0], [5], [2], [3], [0], [4]])
    index = [0, 0, 1, 1, 2, 2]
    for pool, expected in (("max", [5, 3, 4]), ("mean", [3, 2.5, 2]), ("last", [5, 3, 4])):
        found = detection_auroc([1.0], rows, [1, 0, 0], text_index=index, pool=pool)
        np.testing.assert_allclose(found.scores, expected)
        assert found.auroc == 1
    last = detection_auroc([1.0], rows[::-1].copy(), [1, 0, 0], text_index=index, pool="last")
    np.testing.assert_allclose(last.scores, [0, 2, 1])


def test_texts_of_a_model_are_scored_without_their_first_tokens(llama, tokenizer):
    direction = np.random.default_rng(0).normal(size=32)
    y = [1, 0, 1, 0, 1]
    found = detect_texts(direction, llama, tokenizer, TEXTS, y, "layers.1")
    acts = capture(llama, tokenizer, TEXTS, "layers.1")
    scores = acts["layers.1"].double().numpy() @ direction
    index, position = acts.text_index.numpy(), acts.position.numpy()
    assert not acts.sink.any()
    expected = [scores[(index == i) & (position > 0)].max() for i in range(5)]
    np.testing.assert_allclose(found.scores, expected, rtol=1e-6)
    assert found.auroc == pytest.approx(roc_auc_score(y, expected))
    assert found.n_rows_left_out == 5
    assert found.to_json()["n_rows_left_out"] == 5


def test_what_does_not_detect_is_named(data):
    X, y = data
    with pytest.raises(ValueError, match="pool='sum' is not one of max, mean, last"):
        detection_auroc(X[0], X, y, pool="sum")
    with pytest.raises(ValueError, match=r"direction has shape \(5,\); the rows have 12"):
        detection_auroc(X[0, :5], X, y)
    with pytest.raises(ValueError, match=r"gives scores of shape \(280, 12\) for 280 rows"):
        detection_auroc(lambda rows: rows, X, y)
    with pytest.raises(ValueError, match="detector's scores contains NaN"):
        detection_auroc(lambda rows: rows[:, 0] * np.nan, X, y)
    with pytest.raises(ValueError, match="forget set is empty"):
        detection_auroc(X[0], X, y * 0)
    with pytest.raises(ValueError, match="text 1 has no rows"):
        detection_auroc([1.0], np.ones((2, 1)), [1, 0, 0], text_index=[0, 2])
    with pytest.raises(ValueError, match=r"0 \.\. 3; expected integers of shape \(2,\), 0 \.\. 2"):
        detection_auroc([1.0], np.ones((2, 1)), [1, 0, 0], text_index=[0, 3])
    with pytest.raises(
        ValueError, match=r"dtype float64 and values 0.0 \.\. 1.0; expected integers"
    ):
        detection_auroc([1.0], np.ones((2, 1)), [1, 0], text_index=[0.0, 1.0])
