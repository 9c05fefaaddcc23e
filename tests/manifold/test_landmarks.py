import pytest
import torch

from manifold_unlearn.manifold.landmarks import LandmarkStream, choose_landmarks, farthest_points


def test_farthest_points_cover_the_data():
    X = torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    chosen = farthest_points(X, 30)
    assert len(set(chosen.tolist())) == 30
    random = torch.randperm(500, generator=torch.Generator().manual_seed(1))[:30]
    assert torch.cdist(X, X[chosen]).amin(1).max() < torch.cdist(X, X[random]).amin(1).max()


@pytest.mark.parametrize("n_landmarks", [None, 20, 21])
def test_without_fewer_landmarks_than_rows_all_rows_are_landmarks(n_landmarks):
    assert choose_landmarks(torch.rand(20, 2), n_landmarks).tolist() == list(range(20))


def test_landmarks_are_random_only_when_a_state_is_given():
    X = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose_landmarks(X, 10), farthest_points(X, 10))
    drawn = choose_landmarks(X, 10, random_state=0)
    assert torch.equal(drawn, choose_landmarks(X, 10, random_state=0))
    assert not torch.equal(drawn, choose_landmarks(X, 10, random_state=1))
    assert drawn.tolist() == sorted(set(drawn.tolist()))


def test_random_landmarks_do_not_see_how_the_stream_was_cut():
    X = torch.arange(1000.0)[:, None]
    whole = choose_landmarks(X, 50, 7)
    for size in (1, 33, 400):
        stream = LandmarkStream(50, 7)
        for batch in X.split(size):
            stream = stream.add(batch)
        assert stream.n_seen == 1000
        assert torch.equal(stream.numbers, whole)
        assert torch.equal(stream.rows, X[whole])
    assert not torch.equal(choose_landmarks(X, 50, 8), whole)


def test_random_landmarks_are_even():
    counts = torch.zeros(200)
    for seed in range(400):
        counts[choose_landmarks(torch.zeros(200, 1), 50, seed)] += 1
    assert float(((counts - 100) ** 2 / 75).mean()) == pytest.approx(1, abs=0.3)
