import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.sequences import padded, row_labels


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30))
def test_rows_of_interleaved_sequences_stand_in_their_order(labels):
    layout = padded(torch.tensor(labels))
    filled = layout.fill(torch.arange(len(labels)), -1)
    assert layout.labels.tolist() == sorted(set(labels))
    for label, line in zip(layout.labels.tolist(), filled.tolist(), strict=True):
        own = [i for i, other in enumerate(labels) if other == label]
        assert line == own + [-1] * (layout.n_columns - len(own))


def test_without_rows_the_rectangle_is_empty():
    assert padded(torch.empty(0, dtype=torch.int64)).fill(torch.empty(0), 0.0).shape == (0, 0)


def test_labels_are_integers_one_a_row():
    assert row_labels(None, 3, "text").tolist() == [0, 1, 2]
    assert row_labels(np.array([2, 7], dtype=np.int16), 2, "text").dtype == torch.int64
    for bad in ([1, 2], [1.0, 2.0, 3.0], [[1], [2], [3]]):
        with pytest.raises(ValueError, match="text has shape"):
            row_labels(bad, 3, "text")
