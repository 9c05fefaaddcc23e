from dataclasses import dataclass

import pytest
import torch

from manifold_unlearn.arrays import working_dtype
from manifold_unlearn.erase.gated import GatedMap, UngatedMap
from manifold_unlearn.erase.landmark_map import landmark_map
from manifold_unlearn.intervene.maps import AffineMap


@dataclass(frozen=True)
class FirstColumn:
    """A gate whose log ratio is the first column, summed along a sequence, never below 0."""

    threshold: float
    sequential: bool

    def log_ratio(self, h):
        return h[..., 0]

    def accumulate(self, log_ratios, start, present):
        if not self.sequential:
            return log_ratios * present
        found = []
        for position in range(log_ratios.shape[1]):
            risen = (start + log_ratios[:, position]).clamp_min(0)
            start = torch.where(present[:, position], risen, start)
            found.append(start)
        return torch.stack(found, dim=1)

    def opening(self, evidence):
        return torch.where(evidence >= self.threshold, evidence.sigmoid(), 0.0)

    def to(self, device, dtype):
        return self


def gated(evidence="token", *, preserve_norm=False, threshold=1.0):
    draw = torch.Generator().manual_seed(0)
    landmarks = torch.randn(20, 4, generator=draw, dtype=torch.float64)
    targets = torch.randn(20, 4, generator=draw, dtype=torch.float64) - 5
    move = landmark_map(landmarks, targets, None, 4)
    return GatedMap(FirstColumn(threshold, evidence == "sequence"), move, preserve_norm)


def rows(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, 4, generator=torch.Generator().manual_seed(seed)).to(dtype) * 2


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_behind_a_closed_gate_rows_stay_to_the_bit_and_others_go_their_part_of_the_way(dtype):
    fitted, h = gated(), rows(5, 40, dtype=dtype)
    out = fitted.to("cpu", dtype)(h)
    open_ = h[..., 0].to(working_dtype(dtype)) >= 1
    assert 0 < int(open_.sum()) < open_.numel()
    assert out.dtype == dtype
    assert torch.equal(out[~open_], h[~open_])
    start = h[open_].double()
    posterior = 1 / (1 + torch.exp(-start[:, :1]))
    expected = start + posterior * (fitted.move(start) - start)
    tolerance = {torch.float16: 6e-3, torch.bfloat16: 5e-2}.get(dtype, 1e-5)  # an ulp at 8
    torch.testing.assert_close(out[open_].double(), expected, rtol=0, atol=tolerance)


def test_a_gate_that_stays_closed_returns_what_it_was_given():
    h = rows(3, 5)
    assert gated(threshold=1e9)(h) is h


def test_edited_rows_keep_their_length_when_asked():
    h = rows(200)
    plain, kept = gated()(h), gated(preserve_norm=True)(h)
    torch.testing.assert_close(kept.norm(dim=1), h.norm(dim=1))
    moved = (plain != h).any(1)
    assert not torch.allclose(plain[moved].norm(dim=1), h[moved].norm(dim=1))
    cosine = torch.nn.functional.cosine_similarity(plain, kept)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_steps_of_a_sequence_are_the_sequence_in_one():
    fitted, h = gated("sequence"), rows(3, 12)
    present, start = torch.ones(3, 12, dtype=torch.bool), torch.zeros(3, dtype=torch.float64)
    whole, evidence = fitted.step(h, start, present)
    parts, ends = [], []
    for piece, seen in zip(h.split([5, 1, 6], 1), present.split([5, 1, 6], 1), strict=True):
        out, trace = fitted.step(piece, start, seen)
        start = trace[:, -1]
        parts.append(out)
        ends.append(trace)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(torch.cat(ends, 1), evidence)
    assert (evidence[:, -1] > 0).any()


def test_padding_neither_counts_nor_is_edited():
    fitted, h = gated("sequence"), rows(2, 9)
    start, everyone = torch.zeros(2, dtype=torch.float64), torch.ones(2, 9, dtype=torch.bool)
    alone, trace = fitted.step(h, start, everyone)
    padding = torch.full((2, 3, 4), 50.0, dtype=torch.float64)
    present = torch.cat([torch.zeros(2, 3, dtype=torch.bool), everyone], 1)
    out, padded = fitted.step(torch.cat([padding, h], 1), start, present)
    assert torch.equal(out[:, :3], padding)
    torch.testing.assert_close(out[:, 3:], alone)
    torch.testing.assert_close(padded[:, 3:], trace)
    counted, _ = fitted.step(torch.cat([padding, h], 1), start, torch.ones_like(present))
    assert not torch.allclose(counted[:, 3:], alone)  # what would be if it did count


def test_rows_without_their_sequence_are_refused():
    with pytest.raises(ValueError, match="evidence='sequence' needs the rows of a sequence"):
        gated("sequence")(rows(2, 3))


@pytest.mark.parametrize("evidence", ["token", "sequence"])
def test_compiled_in_one_graph_it_answers_alike(evidence):
    fitted, h = gated(evidence), rows(2, 6)
    present, start = torch.ones(2, 6, dtype=torch.bool), torch.zeros(2, dtype=torch.float64)
    compiled = torch.compile(fitted.step, backend="eager", fullgraph=True)
    expected, answer = fitted.step(h, start, present), compiled(h, start, present)
    for one, other in zip(answer, expected, strict=True):
        torch.testing.assert_close(one, other)
    still = expected[0] == h
    assert torch.equal(answer[0][still], h[still])


def test_an_ungated_map_edits_all_but_padding():
    read = torch.tensor([[1.0], [0.0], [0.0], [0.0]], dtype=torch.float64)
    fitted = UngatedMap(AffineMap(read, read, torch.zeros(1, dtype=torch.float64)))
    h, present = rows(2, 3), torch.tensor([[False, True, True], [True, True, True]])
    out, evidence = fitted.to("cpu", torch.float64).step(h, torch.tensor([1.0, 2.0]), present)
    assert torch.equal(out[0, 0], h[0, 0])
    assert (out[present][:, 0] == 0).all()
    assert torch.equal(out[present], fitted(h)[present])
    assert evidence.tolist() == [[1.0] * 3, [2.0] * 3]
