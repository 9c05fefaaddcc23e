"""Training finds what was planted, with every objective, and says what it does."""

import dataclasses

import pytest
import torch
from planted_rows import (
    JUMP,
    LATENTS,
    QUICK,
    SHAPES,
    TRUE,
    D,
    codes,
    directions,
    planted_rows,
    recovery,
    unexplained,
)
from torch.nn.functional import normalize

from manifold_unlearn.dictionary import (
    Crosscoder,
    CrossLayerTranscoder,
    DictionaryTraining,
    SparseAutoencoder,
    Transcoder,
    train_dictionaries,
)
from manifold_unlearn.dictionary.objectives import fraction_of_variance_unexplained


@pytest.fixture
def planted():
    return planted_rows()


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("batch_topk", "gated", "relu")]


@pytest.mark.parametrize("shape", ["topk", "jumprelu", *SLOWER])
def test_planted_directions_are_recovered(planted, shape):
    rows, true = planted
    nonlinearity, options = SHAPES[shape]
    sae = SparseAutoencoder(D, LATENTS, nonlinearity, random_state=1)
    before = recovery(sae.W_dec, true)
    history = train_dictionaries(sae, rows, dataclasses.replace(QUICK, **options))
    assert before < 0.7 and recovery(sae.W_dec, true) > 0.95
    assert unexplained(sae, rows) < 0.12
    last = history.of()[-1]
    fired = (sae.encode(rows) != 0).float()
    assert last.step == 300 and last.n_tokens == history.n_tokens == 300 * 128
    assert last.l0 == pytest.approx(float(fired.sum(1).mean()), rel=0.1)
    # a mean over the last 50 steps, in which the rate still falls
    assert unexplained(sae, rows) < last.fvu < 1.6 * unexplained(sae, rows) + 0.01
    assert history.of()[0].fvu > 1.5 * last.fvu


@pytest.mark.slow
def test_a_target_for_the_sparsity_is_met(planted):
    rows, _ = planted
    sae = SparseAutoencoder(D, LATENTS, JUMP, random_state=1)
    config = dataclasses.replace(QUICK, target_l0=4.0, sparsity_coefficient=1.0)
    train_dictionaries(sae, rows, config)
    assert float((sae.encode(rows) != 0).float().sum(1).mean()) == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("skip", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_transcoder_learns_a_known_map(planted, skip):
    rows, true = planted
    written = directions(TRUE, 24, 3)
    target = codes() @ written + 5
    if skip:
        target = target + rows @ (directions(D, 24, 4) / 2)
    coder = Transcoder(D, LATENTS, 24, {"name": "topk", "k": 3}, skip=skip, random_state=0)
    train_dictionaries(coder, {"map": (rows, target)}, QUICK)
    assert unexplained(coder, rows, target) < 0.15
    if not skip:  # with one, what latents and skip write each is not determined
        assert recovery(coder.W_dec, written) > 0.9


def two_models(rows_of_b=4):
    """Streams of two models that share all latents but the last, which are the second's alone."""
    f = codes(TRUE, 3.0)
    a, b = directions(TRUE, D, 1), directions(TRUE, D, 1).clone()
    a[-rows_of_b:] = 0
    return torch.stack([f @ a, f @ b], dim=1), b[-rows_of_b:]


def test_exclusive_latents_find_what_one_model_has_alone():
    rows, own = two_models()
    rule = {"name": "batch_topk_parts", "k": [3, 1], "sizes": [56, 16]}
    coder = Crosscoder(2, D, 72, rule, exclusive=(8, 8), random_state=0)
    config = dataclasses.replace(QUICK, delta_coefficient=0.5)
    train_dictionaries(coder, rows, config)
    second = coder.W_dec[coder.owner == 1][:, 1]
    assert recovery(second, own) > 0.9
    first_only = coder.W_dec[coder.owner == 0]
    assert float(first_only[:, 1].detach().abs().max()) == 0  # exclusive latents stay exclusive
    assert unexplained(coder, rows) < 0.2


@pytest.mark.slow
def test_a_crosscoder_without_partition_shows_it_in_its_norms():
    rows, own = two_models()
    coder = Crosscoder(2, D, 72, {"name": "batch_topk", "k": 3}, random_state=0)
    train_dictionaries(coder, rows, QUICK)
    norms = coder.stream_norms()
    best = (normalize(coder.W_dec[:, 1].detach(), dim=1) @ own.T).argmax(0)
    share = norms[best, 0] / norms[best].sum(1)
    assert float(share.detach().mean()) < 0.25
    assert float((norms[:, 0] / norms.sum(1)).median()) == pytest.approx(0.5, abs=0.1)


def test_a_cross_layer_transcoder_learns_to_write_ahead():
    first, second = codes(12, 1.0, 1), codes(12, 1.0, 2)
    w = [directions(12, 16, 10 + i) for i in range(5)]
    x = torch.stack([first @ w[0], second @ w[1]], dim=1)
    y = torch.stack([first @ w[2], first @ w[3] + second @ w[4]], dim=1)
    coder = CrossLayerTranscoder(2, 16, 32, nonlinearity={"name": "topk", "k": 2}, random_state=0)
    history = train_dictionaries(coder, {"clt": (x, y)}, QUICK)
    assert unexplained(coder, x, y) < 0.15
    assert recovery(coder.W_dec[0][:, 1], w[3]) > 0.9
    assert history.of()[-1].l0 <= 2


def test_the_skip_of_a_cross_layer_transcoder_learns_what_is_linear():
    first, second = codes(12, 1.0, 1), codes(12, 1.0, 2)
    w = [directions(12, 16, 10 + i) for i in range(4)]
    x = torch.stack([first @ w[0], second @ w[1]], dim=1)
    turned = torch.stack([x[:, 0] @ w[2][:, :16].T @ w[2], x[:, 1] @ w[3].T @ w[3]], dim=1)
    both = [
        CrossLayerTranscoder(2, 16, 8, None, {"name": "topk", "k": 1}, skip=s, random_state=0)
        for s in (False, True)
    ]
    for coder in both:
        train_dictionaries(coder, {"clt": (x, turned)}, QUICK)
    without, around = (unexplained(coder, x, turned) for coder in both)
    assert around < 0.1 < without


@pytest.mark.slow
def test_jumprelu_cross_layer_transcoders_train_with_the_soft_count():
    first, second = codes(12, 1.0, 1), codes(12, 1.0, 2)
    w = [directions(12, 16, 10 + i) for i in range(2)]
    x = torch.stack([first @ w[0], second @ w[1]], dim=1)
    coder = CrossLayerTranscoder(2, 16, 32, nonlinearity=JUMP, random_state=0)
    config = dataclasses.replace(QUICK, sparsity="tanh", sparsity_coefficient=0.01)
    history = train_dictionaries(coder, {"clt": (x, x)}, config).of()
    assert history[-1].l0 < 0.7 * history[0].l0
    assert unexplained(coder, x) < 0.2


def test_many_dictionaries_in_one_pass_are_as_each_alone(planted):
    rows, _ = planted
    config = dataclasses.replace(QUICK, n_steps=15)

    def fresh():
        return SparseAutoencoder(D, 48, {"name": "topk", "k": 2}, random_state=0)

    together, alone = {"a": fresh(), "b": fresh()}, fresh()
    history = train_dictionaries(together, {"a": rows, "b": rows * 3 + 1}, config)
    train_dictionaries(alone, {"a": rows}, config)
    assert {m.name for m in history.measured} == {"a", "b"}
    for mine, other in zip(together["a"].parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "crosscoder", "clt"])
def test_the_scale_of_the_rows_changes_nothing(planted, kind):
    """Powers of two pass through training without rounding: codes of the folded are the same."""
    rows = planted[0].unflatten(1, (2, 16))
    make = {
        "sae": lambda: SparseAutoencoder(D, 48, {"name": "topk", "k": 2}, random_state=0),
        "transcoder": lambda: Transcoder(D, 48, D, {"name": "topk", "k": 2}, random_state=0),
        "crosscoder": lambda: Crosscoder(2, 16, 48, {"name": "topk", "k": 2}, random_state=0),
        "clt": lambda: CrossLayerTranscoder(
            2, 16, 48, nonlinearity={"name": "topk", "k": 2}, random_state=0
        ),
    }[kind]
    if kind in ("sae", "transcoder"):
        rows = rows.flatten(1)
        into, out = torch.tensor([64.0]), torch.tensor([8.0])
    else:
        into, out = torch.tensor([[64.0], [0.25]]), torch.tensor([[8.0], [2.0]])
    out = into if kind in ("sae", "crosscoder") else out

    def given(x, y):
        return x if kind in ("sae", "crosscoder") else (x, y)

    config = dataclasses.replace(QUICK, n_steps=12)
    plain, scaled = make(), make()
    train_dictionaries(plain, {"": given(rows, rows)}, config)
    train_dictionaries(scaled, {"": given(rows * into, rows * out)}, config)
    assert torch.equal(plain.encode(rows), scaled.encode(rows * into))
    assert torch.equal(plain(rows) * out, scaled(rows * into))


def test_a_crosscoder_of_unequal_streams_folds_to_the_same_choice():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 2, 8, generator=draw)
    coder = Crosscoder(2, 8, 24, {"name": "topk", "k": 3}, random_state=0)
    with torch.no_grad():
        coder.decoder.mul_(torch.rand(24, 1, generator=draw) * 3 + 0.1)
    scale = torch.tensor([3.0, 0.2])
    before, out = coder.encode(x * scale[:, None]), coder(x * scale[:, None])
    norms = coder.stream_norms().sum(1)
    coder.fold_scale(scale)
    assert torch.equal(coder.encode(x) != 0, before != 0)
    torch.testing.assert_close(coder.encode(x), before * norms)
    torch.testing.assert_close(coder(x) * scale[:, None], out)
    with pytest.raises(ValueError, match="must be positive"):
        coder.fold_scale(torch.tensor([1.0, 0.0]))


def test_matryoshka_prefixes_do_alone(planted):
    rows, _ = planted
    found = {}
    for sizes in ((), (16, 48)):
        sae = SparseAutoencoder(D, LATENTS, {"name": "batch_topk", "k": 3}, random_state=0)
        train_dictionaries(sae, rows, dataclasses.replace(QUICK, n_steps=150, group_sizes=sizes))
        code = sae.encode(rows).detach()
        code[:, 16:] = 0
        rebuilt = sae.decode(code).detach()
        found[sizes] = float((rows - rebuilt).square().sum() / (rows - rows.mean(0)).square().sum())
    assert found[16, 48] < 0.9 * found[()]


def test_half_precision_is_close(planted):
    rows, true = planted
    found = {}
    for dtype in ("float32", "bfloat16"):
        sae = SparseAutoencoder(D, LATENTS, {"name": "topk", "k": 3}, random_state=1)
        config = dataclasses.replace(QUICK, n_steps=150, dtype=dtype)
        train_dictionaries(sae, rows, config)
        assert sae.dtype == torch.float32
        found[dtype] = unexplained(sae, rows)
    assert found["bfloat16"] != found["float32"]
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.2)


def test_nothing_is_printed_off_a_terminal(planted, capsys):
    sae = SparseAutoencoder(D, 48, random_state=0)
    train_dictionaries(sae, planted[0], dataclasses.replace(QUICK, n_steps=2))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    train_dictionaries(sae, planted[0], dataclasses.replace(QUICK, n_steps=2), progress=True)
    assert "L0=" in (shown := capsys.readouterr().err) and "FVU=" in shown and "dead=" in shown


def test_names_must_fit(planted):
    config = dataclasses.replace(QUICK, n_steps=1)
    sae = SparseAutoencoder(D, 48)
    with pytest.raises(ValueError, match=r"no rows for dictionary 'b': the batches hold \['a'\]"):
        train_dictionaries({"b": sae}, {"a": planted[0]}, config)
    with pytest.raises(ValueError, match="no dictionary to train"):
        train_dictionaries({}, {"a": planted[0]}, config)
    history = train_dictionaries({"a": sae}, {"a": planted[0]}, config)
    with pytest.raises(ValueError, match=r"no dictionary 'b' was trained; there are \['a'\]"):
        history.of("b")


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ("topk", {"sparsity": "l1"}, "sparse by rank"),
        ("relu", {"sparsity": "l0"}, "is for jumprelu"),
        ("topk", {"group_sizes": (3, 4)}, "add up to 7"),
        ("topk", {"delta_coefficient": 1.0}, "crosscoder of two streams"),
        ("relu", {"k_start": 9}, "has no k to come down to"),
    ],
)
def test_objectives_must_fit(planted, shape, options, words):
    sae = SparseAutoencoder(D, 48, SHAPES[shape][0])
    with pytest.raises(ValueError, match=words):
        train_dictionaries(sae, planted[0], dataclasses.replace(QUICK, **options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give one of both"),
        ({"n_steps": 1, "n_tokens": 1}, "give one of both"),
        ({"n_steps": 0}, "n_steps=0 must be at least 1"),
        ({"n_steps": 1, "batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"n_steps": 1, "warmup": 1.5}, "warmup=1.5 is a share"),
        ({"n_steps": 1, "aux_coefficient": -1.0}, "aux_coefficient=-1.0 must not be negative"),
        ({"n_steps": 1, "resample_every": -1}, "resample_every=-1 must not be negative"),
        ({"n_steps": 1, "lr": 0.0}, "lr=0.0 must be positive"),
        ({"n_steps": 1, "sparsity": "l2"}, "sparsity='l2' is not one of"),
    ],
)
def test_settings_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        DictionaryTraining(**options)


def test_rates_rise_and_fall():
    config = DictionaryTraining(n_steps=100, lr=2.0, warmup=0.1, decay=0.2)
    found = [config.rate(step, 100, 64) for step in (0, 9, 50, 80, 90, 99)]
    assert found == pytest.approx([0.2, 2, 2, 2, 1, 0.1])
    assert DictionaryTraining(n_steps=9).rate(4, 9, 2**12) == pytest.approx(4e-4)
    tokens = DictionaryTraining(n_tokens=10**9)
    assert tokens.silence(10**9) == 10_000_000 and tokens.silence(1000) == 100


def test_tokens_become_steps(planted):
    sae = SparseAutoencoder(D, 48, random_state=0)
    history = train_dictionaries(sae, planted[0], DictionaryTraining(n_tokens=1000, batch_size=300))
    assert (history.n_steps, history.n_tokens) == (4, 1200)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.full((50, D), float("nan")), "what the dictionary reads contains NaN"),
        (torch.ones(50, D), "rows that the dictionary is to write are all alike"),
    ],
)
def test_first_rows_that_teach_nothing_leave_the_dictionary_as_it_was(rows, message):
    coder = SparseAutoencoder(D, 48, {"name": "topk", "k": 2}, random_state=0)
    before = {name: value.clone() for name, value in coder.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        train_dictionaries(coder, rows, QUICK)
    assert all(torch.equal(value, before[name]) for name, value in coder.state_dict().items())


def test_arrays_are_rows_too(planted):
    coders = [SparseAutoencoder(D, 48, {"name": "topk", "k": 2}, random_state=0) for _ in range(2)]
    config = dataclasses.replace(QUICK, n_steps=5)
    for coder, rows in zip(coders, (planted[0], planted[0].numpy()), strict=True):
        train_dictionaries(coder, rows, config)
    assert torch.equal(coders[0].encoder, coders[1].encoder)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "crosscoder", "clt"])
def test_training_goes_on_from_a_trained_dictionary(planted, kind):
    """The rows are scaled anew, and the dictionary with them: nothing is lost at the first step."""
    wide = 40 * planted[0] + 3
    rows = wide if kind in ("sae", "transcoder") else wide.unflatten(1, (2, 16))
    shape = {"name": "topk", "k": 3}
    coder = {
        "sae": lambda: SparseAutoencoder(D, 48, shape, random_state=0),
        "transcoder": lambda: Transcoder(D, 48, D, shape, random_state=0),
        "crosscoder": lambda: Crosscoder(2, 16, 48, shape, random_state=0),
        "clt": lambda: CrossLayerTranscoder(2, 16, 48, nonlinearity=shape, random_state=0),
    }[kind]()
    wanted = rows if kind in ("sae", "crosscoder") else rows / 8
    train_dictionaries(coder, {"": (rows, wanted)}, QUICK)
    before = fraction_of_variance_unexplained(wanted, coder(rows)).item()
    short = dataclasses.replace(QUICK, n_steps=1, lr=1e-12, batch_size=len(rows))
    history = train_dictionaries(coder, {"": (rows, wanted)}, short)
    assert history.of()[-1].fvu == pytest.approx(before, rel=1e-3)
    after = fraction_of_variance_unexplained(wanted, coder(rows)).item()
    assert after == pytest.approx(before, rel=1e-3)
