import json

import numpy as np
import pytest
import torch

from manifold_unlearn.dictionary import SparseAutoencoder, SparseCode
from manifold_unlearn.dictionary.coding import (
    code_rows,
    join_codes,
    select_latents,
    select_rows,
    without_zeros,
)
from manifold_unlearn.dictionary.tiling import tile_manifold
from manifold_unlearn.manifold import DiffusionMap

TURN = 2 * np.pi
CENTERS = np.arange(8) * TURN / 8
SHARPNESS = 12.0


def bump(angle, center, sharpness=SHARPNESS):
    return np.exp(sharpness * (np.cos(angle - center) - 1))


@pytest.fixture(scope="module")
def angle():
    return np.random.default_rng(0).uniform(0, TURN, 6000)


@pytest.fixture(scope="module")
def place_cells(angle):
    """Eight place cells, one that fires anywhere, one with two fields, one that is silent."""
    random = np.random.default_rng(1)
    anywhere = random.uniform(size=len(angle)) * (random.uniform(size=len(angle)) < 0.2)
    double = bump(angle, 1.0) + bump(angle, 1.0 + np.pi)
    columns = [bump(angle, c) for c in CENTERS] + [anywhere, double, np.zeros_like(angle)]
    return np.stack(columns, 1)


@pytest.fixture(scope="module")
def tiling(place_cells, angle):
    return tile_manifold(
        place_cells, angle[:, None], period=[TURN], n_bins=60, n_shuffles=99, random_state=0
    )


def circular_distance(a, b):
    return np.abs((a - b + np.pi) % TURN - np.pi)


def test_planted_centers_and_widths_are_found(tiling):
    assert circular_distance(tiling.center[:8, 0], CENTERS).max() < 0.05
    full_width = 2 * np.arccos(1 - np.log(2) / SHARPNESS)
    bin_width = TURN / 60  # widths are counted in whole bins, maps smoothed by one
    assert np.abs(tiling.area[:8] - full_width).max() < 2 * bin_width
    assert tiling.n_fields[:8].tolist() == [1] * 8
    assert tiling.n_fields[9] == 2


def test_information_is_that_of_the_formula(tiling):
    fine = np.linspace(0, TURN, 200_001)[:-1]
    rate = bump(fine, 0.0)
    rate /= rate.mean()
    bits = np.mean(rate * np.log2(np.maximum(rate, 1e-300)))
    assert tiling.information[:8] == pytest.approx(np.full(8, bits), rel=0.05)
    share = np.mean(bump(fine, 0.0)) ** 2 / np.mean(bump(fine, 0.0) ** 2)
    assert tiling.share[:8] == pytest.approx(np.full(8, share), rel=0.06)


def test_a_latent_that_knows_no_place_is_not_told_from_the_null(tiling):
    assert tiling.p_value[:8].max() == 0.01
    assert tiling.p_value[8] > 0.05
    assert abs(tiling.excess[8]) < 3 * tiling.null_deviation[8]
    assert set(tiling.place_latents()) == {*range(8), 9}
    assert set(tiling.place_latents(max_fields=1)) == set(range(8))


def test_a_silent_latent_has_no_place(tiling):
    assert tiling.information[10] == tiling.peak[10] == tiling.area[10] == tiling.count[10] == 0
    assert tiling.p_value[10] == 1
    assert np.isnan(tiling.center[10]).all()
    json.dumps(tiling.to_json(), allow_nan=False)


def test_p_values_of_noise_are_uniform():
    random = np.random.default_rng(2)
    noise = (random.uniform(size=(600, 200)) < 0.1) * random.uniform(size=(600, 200))
    found = tile_manifold(
        noise, random.uniform(size=(600, 1)), n_bins=10, n_shuffles=99, random_state=3
    )
    assert abs(found.p_value.mean() - 0.5) < 0.07  # 200 uniform values: deviation .02
    assert len(found.place_latents()) <= 3


def test_cells_cover_as_much_as_they_are_wide(tiling):
    width = 2 * np.arccos(1 - np.log(2) / SHARPNESS)  # narrower than the cells lie apart
    assert tiling.coverage(range(8)) == pytest.approx(8 * width / TURN, abs=0.06)
    assert tiling.coverage([0, 3, 6]) == pytest.approx(3 * width / TURN, abs=0.06)
    assert tiling.coverage(range(8), at_least=3) < 0.1
    assert tiling.covering([10]).max() == 0


def test_tiles_are_chosen_where_nothing_is_covered_yet(tiling):
    wide = [*range(8), 9]
    first = tiling.tiles(wide, 1)
    assert first.tolist() == [9]  # the only one with two fields
    rest = tiling.tiles(wide)
    assert tiling.coverage(rest) == pytest.approx(tiling.coverage(wide))
    gained = np.diff([0, *(tiling.coverage(rest[: i + 1]) for i in range(len(rest)))])
    assert (gained > 0).all()
    assert (np.diff(gained) <= 1e-12).all()
    assert tiling.tiles([10]).tolist() == tiling.tiles([]).tolist() == []


def test_codes_and_activations_give_the_same(place_cells, angle, tiling):
    code = SparseCode.of(torch.from_numpy(place_cells))
    same = tile_manifold(
        code, torch.from_numpy(angle)[:, None], period=[TURN], n_bins=60, n_shuffles=99,
        random_state=0,
    )  # fmt: skip
    np.testing.assert_allclose(same.information, tiling.information, rtol=1e-12)
    np.testing.assert_array_equal(same.p_value, tiling.p_value)


def test_fields_in_the_plane():
    random = np.random.default_rng(4)
    at = random.uniform(-1, 1, (8000, 2))
    planted = np.array([[0.5, 0.5], [-0.4, 0.2]])
    width = 0.2
    activity = np.exp(-((at[:, None] - planted) ** 2).sum(-1) / (2 * width**2))
    found = tile_manifold(activity, at, n_bins=(24, 20), n_shuffles=9, random_state=0)
    assert np.abs(found.center - planted).max() < 0.05
    area = np.pi * width**2 * 2 * np.log(2)  # where the Gaussian exceeds half its height
    np.testing.assert_allclose(found.area, area, rtol=0.35)
    assert found.maps.shape == (2, 24, 20)


def test_a_field_across_the_seam_is_one_field_only_on_a_circle(angle):
    cell = bump(angle, 0.0)[:, None]
    options = {"n_bins": 60, "n_shuffles": 9, "random_state": 0}
    around = tile_manifold(cell, angle[:, None], period=[TURN], **options)
    cut = tile_manifold(cell, angle[:, None], **options)
    assert around.n_fields[0] == 1
    assert cut.n_fields[0] == 2
    assert circular_distance(around.center[0, 0], 0) < 0.05


def test_rows_of_one_text_are_not_taken_for_information():
    random = np.random.default_rng(5)
    text = np.repeat(np.arange(40), 25)
    at = random.uniform(size=40)[text] + 0.01 * random.normal(size=1000)
    topic = (random.uniform(size=40) < 0.3)[text]  # fires on whole texts, wherever they lie
    activity = topic[:, None].astype(float)
    options = {"n_bins": 20, "n_shuffles": 199, "random_state": 0}
    naive = tile_manifold(activity, at[:, None], **options)
    careful = tile_manifold(activity, at[:, None], groups=text, **options)
    assert naive.p_value[0] == 0.005
    assert careful.p_value[0] > 0.05


def test_diffusion_coordinates_of_a_circle_are_tiled_as_its_angle(angle):
    some = angle[:1500]
    points = np.stack([np.cos(some), np.sin(some)], 1)
    at = DiffusionMap(2, random_state=0).fit_transform(points)
    cells = np.stack([bump(some, c) for c in CENTERS], 1)
    found = tile_manifold(cells, at, n_bins=24, n_shuffles=19, random_state=0)
    assert set(found.place_latents(alpha=0.1)) == set(range(8))
    phase = np.arctan2(found.center[:, 1], found.center[:, 0])
    steps = np.diff(np.unwrap(phase))
    assert np.abs(steps) == pytest.approx(np.full(7, TURN / 8), abs=0.2)
    assert len(set(np.sign(steps))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coordinates": np.zeros((5, 1))}, "coordinates has 5 rows; the code has 60"),
        ({"coordinates": np.random.default_rng(0).normal(size=(60, 4))}, "has 4 columns"),
        ({"coordinates": np.zeros((60, 1))}, "coordinate 0 is 0.0 in every row"),
        ({"period": [0.0]}, "period=0.0 must be positive"),
        ({"period": [1.0, 1.0]}, "must name 1 coordinates"),
        ({"min_rows": 100}, "no bin of .* holds min_rows=100"),
        ({"field_level": 1.0}, "field_level=1.0 must lie between 0 and 1"),
        ({"groups": np.zeros(60)}, "groups holds one group"),
        ({"groups": np.zeros(6)}, r"groups has shape \(6,\)"),
        ({"code": np.full((60, 2), np.nan)}, "activations contains NaN"),
        ({"code": np.zeros(60)}, r"activations have shape \(60,\)"),
    ],
)
def test_tile_manifold_rejects(change, message):
    random = np.random.default_rng(0)
    given = {"code": random.uniform(size=(60, 2)), "coordinates": random.uniform(size=(60, 1))}
    with pytest.raises(ValueError, match=message):
        tile_manifold(**(given | change))


# Codes of many rows


def test_rows_are_coded_in_blocks_as_at_once():
    sae = SparseAutoencoder(6, 24, {"name": "batch_topk", "k": 3}, random_state=0)
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    sae.nonlinearity.threshold.fill_(0.5)
    sae.train()
    dense = code_rows(sae, rows, block=7).dense()
    assert sae.training
    torch.testing.assert_close(dense, sae.eval().encode(rows))
    some = code_rows(sae, rows, latents=[5, 2], block=7)
    torch.testing.assert_close(some.dense(), sae.encode(rows)[:, [5, 2]])


def test_parts_of_codes_are_parts_of_the_matrix():
    dense = torch.tensor([[0, 1.0, 2], [0, 0, 3], [4, 0, 0]])
    code = SparseCode.of(dense)
    kept = torch.tensor([True, False, True])
    torch.testing.assert_close(select_rows(code, kept).dense(), dense[kept])
    torch.testing.assert_close(select_latents(code, [2, 0]).dense(), dense[:, [2, 0]])
    torch.testing.assert_close(join_codes([code, code]).dense(), torch.cat([dense, dense]))
    loose = SparseCode(code.row, code.latent, code.value * (code.value > 1), 3, 3)
    assert len(without_zeros(loose).value) == 3
    for bad, message in (([], "at least one whole"), ([3], "latent 3 is not"), ([1, 1], "twice")):
        with pytest.raises(ValueError, match=message):
            select_latents(code, bad)
    with pytest.raises(ValueError, match=r"kept has shape \(2,\)"):
        select_rows(code, torch.tensor([True, False]))
    with pytest.raises(ValueError, match="cannot be joined"):
        join_codes([code, SparseCode.of(torch.ones(1, 2))])
    sae = SparseAutoencoder(3, 4, random_state=0)
    with pytest.raises(ValueError, match="X has no rows"):
        code_rows(sae, torch.zeros(0, 3))
    with pytest.raises(ValueError, match="X contains NaN"):
        code_rows(sae, torch.full((2, 3), torch.nan))
