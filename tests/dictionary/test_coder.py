import copy

import numpy as np
import pytest
import torch

from manifold_unlearn.dictionary import (
    Crosscoder,
    CrossLayerTranscoder,
    SparseAutoencoder,
    SparseCoder,
    Transcoder,
)

SHAPES = [
    {"name": "relu"},
    {"name": "topk", "k": 4},
    {"name": "abs_topk", "k": 4},
    {"name": "groupmax", "k": 4},
    {"name": "batch_topk", "k": 4},
    {"name": "jumprelu"},
    {"name": "gated"},
]
OPTIONS = [
    {},
    {"centered": True},
    {"normalization": "layer_norm"},
    {"normalization": "unit_rms"},
    {"rank_by_norm": True},
    {"skip": True},
    {"deep": 6},
]


def stirred(coder, seed=1):
    """The coder with every weight moved, so that nothing is zero by chance."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.add_(0.3 * torch.rand(parameter.shape, generator=draw))
    coder.constrain()
    return coder


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape["name"])
class TestEveryCoder:
    def test_sparse_and_dense_are_the_same_numbers(self, shape, options):
        coder, x = (
            stirred(SparseCoder(8, 20, 8, shape, random_state=0, **options)).eval(),
            rows(30, 8),
        )
        dense = coder.encode(x)
        code = coder.code(x)
        assert torch.allclose(dense, code.dense(), atol=1e-5)
        assert torch.allclose(coder.decode(dense, x), coder.decode(code, x), atol=1e-5)
        assert torch.allclose(coder(x), coder.decode(dense, x), atol=1e-5)
        assert torch.allclose(coder(x.reshape(5, 6, 8)), coder(x).reshape(5, 6, 8), atol=1e-5)
        assert torch.allclose(coder.encode(x.reshape(5, 6, 8)).flatten(0, 1), dense, atol=1e-5)

    def test_sparse_gradients_are_those_of_the_dense_product(self, shape, options):
        coder, x = stirred(SparseCoder(8, 20, 8, shape, random_state=0, **options)), rows(30, 8)
        wanted = [p for p in coder.parameters() if p.requires_grad]
        again = copy.deepcopy(coder)
        sparse = torch.autograd.grad(coder(x).square().sum(), wanted, allow_unused=True)
        pre = again.pre_activations(x)
        out = again.decode(again.activations(pre), x)
        dense = torch.autograd.grad(out.square().sum(), list(again.parameters()), allow_unused=True)
        for one, other in zip(sparse, dense, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert torch.allclose(one, other, rtol=1e-3, atol=1e-2)

    def test_it_comes_back_from_disk_to_the_bit(self, shape, options, tmp_path):
        coder = stirred(SparseCoder(8, 20, 8, shape, random_state=0, **options)).eval()
        coder.origin = {"site": "layers.1"}
        coder.to(torch.float64).save(tmp_path / "coder")
        again = SparseCoder.load(tmp_path / "coder").eval()
        x = rows(9, 8)
        assert again.dtype == torch.float64
        assert again.origin == {"site": "layers.1"}
        assert torch.equal(again(x), coder(x))
        assert torch.equal(again.encode(x), coder.encode(x))

    def test_a_folded_scale_reads_the_data_as_they_are(self, shape, options):
        if options.get("normalization"):
            pytest.skip("what normalizes each row needs no scale of the data")
        coder, x = (
            stirred(SparseCoder(8, 20, 8, shape, random_state=0, **options)).eval(),
            rows(30, 8),
        )
        if shape["name"] == "batch_topk":
            coder.nonlinearity.threshold.fill_(0.5)
        folded = copy.deepcopy(coder).fold_scale(3.0, 3.0 if options.get("centered") else 0.5)
        scale = 3.0 if options.get("centered") else 0.5
        assert torch.allclose(folded.encode(x), coder.encode(3 * x), rtol=1e-4, atol=1e-4)
        assert torch.allclose(folded(x), coder(3 * x) / scale, rtol=1e-4, atol=1e-4)


def test_an_autoencoder_is_its_formula():
    sae, x = stirred(SparseAutoencoder(6, 12, {"name": "relu"}, random_state=0)), rows(10, 6)
    w_enc, w_dec, b_enc, b_dec = (
        t.detach().numpy() for t in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)
    )
    assert w_enc.shape == (6, 12) and w_dec.shape == (12, 6)
    f = np.maximum((x.numpy() - b_dec) @ w_enc + b_enc, 0)
    np.testing.assert_allclose(sae.encode(x).detach().numpy(), f, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sae(x).detach().numpy(), f @ w_dec + b_dec, rtol=1e-4, atol=1e-5)


def test_a_transcoder_is_its_formula():
    coder = stirred(Transcoder(6, 12, 5, {"name": "relu"}, skip=True, random_state=0))
    x = rows(10, 6)
    parts = (coder.W_enc, coder.W_dec, coder.b_enc, coder.b_dec, coder.W_skip)
    w_enc, w_dec, b_enc, b_dec, w_skip = (t.detach().numpy() for t in parts)
    f = np.maximum(x.numpy() @ w_enc + b_enc, 0)
    expected = f @ w_dec + b_dec + x.numpy() @ w_skip
    np.testing.assert_allclose(coder(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [3, 3e-4])  # the smaller tells where 1e-5 is added
def test_layer_norm_is_done_and_undone_row_by_row(size):
    options = {"normalization": "layer_norm"}
    sae = stirred(
        SparseAutoencoder(6, 12, {"name": "relu"}, random_state=0, centered=False, **options)
    )
    x = size * (1.5 + rows(10, 6))
    z = x.numpy().astype(np.float64)
    mean = z.mean(1, keepdims=True)
    std = z.std(1, ddof=1, keepdims=True)
    f = np.maximum(
        (z - mean) / (std + 1e-5) @ sae.W_enc.detach().numpy() + sae.b_enc.detach().numpy(), 0
    )
    expected = (f @ sae.W_dec.detach().numpy() + sae.b_dec.detach().numpy()) * std + mean
    np.testing.assert_allclose(sae(x).detach().numpy(), expected, rtol=1e-4, atol=1e-4 * size)


def test_new_weights_are_of_unit_rows_and_tied():
    sae = SparseAutoencoder(6, 12, random_state=0)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(12))
    assert torch.equal(sae.W_enc, sae.W_dec.mT)
    again = SparseAutoencoder(6, 12, random_state=0)
    assert torch.equal(again.W_dec, sae.W_dec)
    assert not torch.equal(SparseAutoencoder(6, 12, random_state=1).W_dec, sae.W_dec)


def test_a_deep_one_begins_as_a_plain_one():
    x = rows(10, 6)
    plain, deep = (SparseAutoencoder(6, 12, random_state=0, deep=d) for d in (0, 7))
    assert torch.equal(plain(x), deep(x))


class TestCrosscoder:
    def test_it_is_its_formula(self):
        coder = stirred(Crosscoder(2, 5, 12, {"name": "relu"}, random_state=0)).eval()
        x = rows(10, 2, 5)
        w_enc, w_dec = coder.W_enc.detach().numpy(), coder.W_dec.detach().numpy()
        assert w_enc.shape == (2, 5, 12) and w_dec.shape == (12, 2, 5)
        pre = sum(x[:, s].numpy() @ w_enc[s] for s in range(2)) + coder.b_enc.detach().numpy()
        f = np.maximum(pre, 0)
        expected = np.einsum("nf,fsd->nsd", f, w_dec) + coder.b_dec.detach().numpy().reshape(2, 5)
        np.testing.assert_allclose(coder.encode(x).detach().numpy(), f, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(coder(x).detach().numpy(), expected, rtol=1e-4, atol=1e-4)
        assert torch.allclose(coder.decode(coder.code(x)), coder(x), atol=1e-5)

    def test_ranks_by_the_sum_of_the_lengths(self):
        coder = stirred(Crosscoder(3, 4, 9, {"name": "topk", "k": 2}, random_state=0))
        x = rows(7, 3, 4)
        pre = coder.pre_activations(x).detach().numpy()
        lengths = np.linalg.norm(coder.W_dec.detach().numpy(), axis=2).sum(1)
        best = np.argsort(-pre * lengths, axis=1)[:, :2]
        found = coder.encode(x).detach().numpy()
        for row, keep in zip(range(7), best, strict=True):
            expected = np.zeros(9)
            expected[keep] = np.maximum(pre[row, keep], 0)
            np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-5)

    def test_exclusive_latents_neither_read_nor_write_other_streams(self):
        coder = stirred(Crosscoder(2, 5, 12, {"name": "relu"}, exclusive=(3, 2), random_state=0))
        assert coder.owner.tolist() == [-1] * 7 + [0] * 3 + [1] * 2
        x = rows(10, 2, 5)
        moved = x.clone()
        moved[:, 1] += 5
        same = coder.encode(x) == coder.encode(moved)
        assert same[:, 7:10].all() and not same[:, 10:].all()
        assert (coder.W_dec[7:10, 1] == 0).all() and (coder.W_dec[10:, 0] == 0).all()
        assert (coder.W_dec[:7] != 0).all()

    def test_it_comes_back_from_disk(self, tmp_path):
        coder = stirred(Crosscoder(2, 5, 12, exclusive=(3, 2), random_state=0)).eval()
        coder.save(tmp_path / "coder")
        x = rows(10, 2, 5)
        again = Crosscoder.load(tmp_path / "coder").eval()
        assert torch.equal(again(x), coder(x)) and again.exclusive == (3, 2)


class TestCrossLayerTranscoder:
    def test_it_is_its_formula(self):
        clt = stirred(CrossLayerTranscoder(3, 4, 9, 5, {"name": "relu"}, random_state=0))
        x = rows(10, 3, 4)
        assert clt.W_enc.shape == (3, 4, 9)
        assert [tuple(w.shape) for w in clt.W_dec] == [(9, 3, 5), (9, 2, 5), (9, 1, 5)]
        expected = np.broadcast_to(clt.b_dec.detach().numpy(), (10, 3, 5)).copy()
        for i, (coder, wrote) in enumerate(zip(clt.coders, clt.W_dec, strict=True)):
            pre = x[:, i].numpy() @ coder.W_enc.detach().numpy() + coder.b_enc.detach().numpy()
            f = np.maximum(pre, 0)
            expected[:, i:] += np.einsum("nf,fld->nld", f, wrote.detach().numpy())
            expected[:, i:] += coder.b_dec.detach().numpy().reshape(-1, 5)
        np.testing.assert_allclose(clt(x).detach().numpy(), expected, rtol=1e-4, atol=1e-4)
        assert torch.allclose(clt.decode(clt.encode(x)), clt(x), atol=1e-5)

    def test_a_skip_goes_from_each_layer_to_itself(self):
        clt = stirred(CrossLayerTranscoder(3, 4, 9, 5, {"name": "relu"}, skip=True))
        x = rows(10, 3, 4)
        plain = CrossLayerTranscoder(3, 4, 9, 5, {"name": "relu"})
        weights = {n: w for n, w in clt.state_dict().items() if n != "W_skip"}
        plain.load_state_dict(weights)
        for i in range(3):
            expected = plain(x)[:, i] + x[:, i] @ clt.W_skip[i]
            torch.testing.assert_close(clt(x)[:, i], expected)
        torch.testing.assert_close(clt.decode(clt.encode(x), x), clt(x))
        with pytest.raises(ValueError, match="give the rows as x"):
            clt.decode(clt.encode(x))

    def test_no_layer_writes_before_itself(self):
        clt = CrossLayerTranscoder(3, 4, 9, nonlinearity={"name": "topk", "k": 2}, random_state=0)
        x = rows(10, 3, 4)
        moved = x.clone()
        moved[:, 1] += 1
        same = (clt(x) == clt(moved)).all(dim=2).all(dim=0)
        assert same.tolist() == [True, False, False]

    @pytest.mark.parametrize("skip", [False, True])
    def test_folded_scales_and_disk(self, tmp_path, skip):
        clt = stirred(CrossLayerTranscoder(3, 4, 9, None, {"name": "relu"}, skip=skip))
        for coder in clt.coders:
            torch.nn.init.zeros_(coder.b_dec)
        x, first, last = rows(10, 3, 4), torch.tensor([2.0, 3, 4]), torch.tensor([0.5, 5, 7])
        before = clt(x * first[:, None]) / last[:, None]
        clt.fold_scale(first, last)
        assert torch.allclose(clt(x), before, rtol=1e-4, atol=1e-4)
        clt.save(tmp_path / "clt")
        assert torch.equal(CrossLayerTranscoder.load(tmp_path / "clt")(x), clt(x))

    def test_output_biases_of_the_layers_do_not_learn(self):
        clt = CrossLayerTranscoder(3, 4, 9, random_state=0)
        learning = {name for name, p in clt.named_parameters() if p.requires_grad}
        assert "b_dec" in learning and "layers.0.b_dec" not in learning


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseCoder(0, 4, 4), "d_in=0, d_sae=4, d_out=4 must be at least 1"),
        (lambda: SparseCoder(3, 4, 5, centered=True), "centered=True needs one width"),
        (lambda: SparseCoder(3, 4, 5, normalization="l2"), "normalization='l2' is not one of"),
        (lambda: Crosscoder(0, 3, 4), "n_streams=0 must be at least 1"),
        (lambda: Crosscoder(2, 3, 4, exclusive=(1,)), "needs a count for 2 streams"),
        (lambda: Crosscoder(2, 3, 4, exclusive=(3, 3)), "are more than d_sae=4 latents"),
        (lambda: CrossLayerTranscoder(0, 3, 4), "n_layers=0 must be at least 1"),
        (lambda: SparseCoder(3, 4, 3)(torch.zeros(2, 5)), "rows have 5 features; the dictionary"),
        (lambda: Crosscoder(2, 3, 4)(torch.zeros(2, 5)), r"reads \(..., 2, 3\)"),
        (lambda: CrossLayerTranscoder(2, 3, 4)(torch.zeros(2, 3, 3)), r"reads \(..., 2, 3\)"),
        (lambda: CrossLayerTranscoder(2, 3, 4).decode([]), "0 codes for 2 layers"),
        (lambda: SparseCoder(3, 4, 3).fold_scale(0.0), "scale_in=0.0, scale_out=0.0 must be"),
        (
            lambda: SparseCoder(3, 4, 3, normalization="unit_rms").decode(torch.zeros(1, 4)),
            "decodes relative to its input; give the rows as x",
        ),
        (lambda: SparseCoder(3, 4, 3).take({"encoder": torch.zeros(4, 3)}), "are not those of a"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_weights_of_another_shape_are_refused():
    coder = SparseCoder(3, 4, 3)
    wrong = {
        name: value[..., :1] if name == "decoder" else value
        for name, value in coder.state_dict().items()
    }
    with pytest.raises(ValueError, match=r"decoder has shape \(4, 1\), not \(4, 3\)"):
        coder.take(wrong)
