"""Training finds what was planted, goes on to the bit after a stop, and leaves no wreck."""

import dataclasses
import itertools
import os
import signal

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from manifold_unlearn.dictionary import (
    Crosscoder,
    CrossLayerTranscoder,
    DictionaryTraining,
    SparseAutoencoder,
    Transcoder,
    stream_activations,
    stream_rows,
    train_dictionaries,
)
from manifold_unlearn.dictionary.learner import Learner, geometric_median
from manifold_unlearn.dictionary.together import Together

N, D, TRUE, LATENTS = 8192, 32, 40, 64


def directions(n, d, seed):
    """Seeds far from those of the dictionaries, which draw their own alike."""
    seed += 1000
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def codes(n_latents=TRUE, mean_l0=2.0, seed=0, n=N):
    draw = torch.Generator().manual_seed(seed)
    on = torch.rand(n, n_latents, generator=draw) < mean_l0 / n_latents
    return on * (0.5 + torch.rand(n, n_latents, generator=draw))


@pytest.fixture(scope="module")
def planted():
    """Rows, and the directions they are sparse sums of."""
    true = directions(TRUE, D, 1)
    return codes() @ true + 0.3 * directions(1, D, 2), true


def recovery(found, true):
    """Mean over the true directions of the best cosine."""
    return float((normalize(found.detach(), dim=1) @ true.T).max(0).values.mean())


def unexplained(coder, x, y=None):
    y = x if y is None else y
    with torch.no_grad():
        return float((y - coder(x)).square().sum() / (y - y.mean(0)).square().sum())


QUICK = DictionaryTraining(n_steps=300, batch_size=128, lr=2e-2)
JUMP = {"name": "jumprelu", "threshold": 0.3, "bandwidth": 0.3}
SHAPES = {
    "topk": ({"name": "topk", "k": 3}, {}),
    "batch_topk": ({"name": "batch_topk", "k": 2}, {}),
    "jumprelu": (JUMP, {"sparsity_coefficient": 0.04}),
    "gated": ({"name": "gated"}, {"sparsity_coefficient": 0.4}),
    "relu": ({"name": "relu"}, {"sparsity_coefficient": 0.15}),
}


@pytest.mark.parametrize("shape", SHAPES)
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
    assert last.fvu == pytest.approx(unexplained(sae, rows), rel=0.35, abs=0.01)
    assert history.of()[0].fvu > 1.5 * last.fvu


def test_a_target_for_the_sparsity_is_met(planted):
    rows, _ = planted
    sae = SparseAutoencoder(D, LATENTS, JUMP, random_state=1)
    config = dataclasses.replace(QUICK, target_l0=4.0, sparsity_coefficient=1.0)
    train_dictionaries(sae, rows, config)
    assert float((sae.encode(rows) != 0).float().sum(1).mean()) == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("skip", [False, True])
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


STOPS = {
    "topk": ({"name": "topk", "k": 2}, {}),
    "batch_topk": (
        {"name": "batch_topk", "k": 2},
        {"resample_every": 4, "dead_after": 300, "k_start": 6, "k_anneal": 1.0},
    ),
    "jumprelu": (JUMP, {}),
}


def pair(shape):
    return {
        "a": SparseAutoencoder(D, 48, shape, random_state=0),
        "b": Transcoder(D, 48, D, shape, random_state=1),
    }


def state(coders):
    return {f"{n}/{k}": v for n, coder in coders.items() for k, v in coder.state_dict().items()}


class Stopping:
    """A stream that is interrupted after so many batches."""

    def __init__(self, stream, after):
        self.stream, self.after, self.batch_size = stream, after, stream.batch_size

    def walk(self, *args):
        for k, found in enumerate(self.stream.walk(*args)):
            if k == self.after:
                raise KeyboardInterrupt
            yield found


@pytest.mark.parametrize("shape", STOPS)
def test_stopped_and_resumed_is_the_same_to_the_bit(planted, shape, tmp_path):
    rows, _ = planted
    nonlinearity, options = STOPS[shape]
    config = dataclasses.replace(QUICK, n_steps=20, log_every=3, **options)
    stream = stream_rows({"a": rows, "b": (rows, -rows)}, batch_size=128)
    whole, part = pair(nonlinearity), pair(nonlinearity)
    expected = train_dictionaries(whole, stream, config, checkpoint=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_dictionaries(part, Stopping(stream, 7), config, checkpoint=tmp_path / "part")
    assert not any(torch.equal(state(part)[n], v) for n, v in state(whole).items() if "coder" in n)
    part = pair(nonlinearity)
    history = train_dictionaries(part, stream, config, checkpoint=tmp_path / "part")
    for name, value in state(whole).items():
        assert torch.equal(state(part)[name], value), name
    assert history.measured == expected.measured
    saved = [(tmp_path / n / "tensors.safetensors").read_bytes() for n in ("whole", "part")]
    assert saved[0] == saved[1]  # moments, counts and scales included


def test_a_stream_from_a_model_resumes_to_the_bit(llama, tokenizer, tmp_path):
    texts = [f"number {i} is {i * i}" for i in range(12)]
    config = DictionaryTraining(n_steps=20, first_rows=8)

    def run(directory, after=None):
        sae = SparseAutoencoder(32, 48, {"name": "topk", "k": 4}, random_state=0)
        stream = stream_activations(
            llama, tokenizer, texts, "layers.1", batch_size=8, block_tokens=60
        )
        stream = stream if after is None else Stopping(stream, after)
        train_dictionaries(sae, stream, config, checkpoint=directory)
        return sae.state_dict()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", after=9)
    whole, part = run(tmp_path / "whole"), run(tmp_path / "part")
    assert all(torch.equal(part[name], value) for name, value in whole.items())


def test_plain_batches_resume_and_are_read_again(planted, tmp_path):
    rows, _ = planted
    batches = [{"": rows[i : i + 64]} for i in range(0, 512, 64)]
    config = dataclasses.replace(QUICK, n_steps=20, first_rows=64)
    whole, part = (SparseAutoencoder(D, 48, random_state=0) for _ in range(2))
    train_dictionaries(whole, batches, config)

    class Stop:
        def __iter__(self):
            yield from batches[:7]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_dictionaries(part, Stop(), config, checkpoint=tmp_path / "c")
    train_dictionaries(part, batches, config, checkpoint=tmp_path / "c")
    assert torch.equal(whole.decoder, part.decoder)
    with pytest.raises(ValueError, match="used up cannot be read again"):
        train_dictionaries(part, iter(batches), dataclasses.replace(config, n_steps=9))


def test_an_interrupt_within_a_step_waits_for_its_end(planted, tmp_path):
    rows, _ = planted
    config = dataclasses.replace(QUICK, n_steps=9, first_rows=128)

    def batches(interrupt):
        for k in itertools.count():
            if k == 4 and interrupt:
                os.kill(os.getpid(), signal.SIGINT)
            yield {"": rows[k * 128 : (k + 1) * 128]}

    def coder():
        return SparseAutoencoder(D, 48, {"name": "topk", "k": 2}, random_state=0)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_dictionaries(coder(), batches(True), config, checkpoint=tmp_path / "c")
    assert signal.getsignal(signal.SIGINT) is before
    whole, part = coder(), coder()
    train_dictionaries(whole, batches(False), config)
    train_dictionaries(part, batches(False), config, checkpoint=tmp_path / "c")
    assert torch.equal(whole.decoder, part.decoder)


def test_a_finished_training_is_read_and_another_is_refused(planted, tmp_path):
    rows, _ = planted
    config = dataclasses.replace(QUICK, n_steps=5)
    done, again = (SparseAutoencoder(D, 48, random_state=i) for i in range(2))
    train_dictionaries(done, rows, config, checkpoint=tmp_path / "c", checkpoint_every=2)
    history = train_dictionaries(again, rows, config, checkpoint=tmp_path / "c")
    assert torch.equal(done.decoder, again.decoder) and history.of()[-1].step == 5
    with pytest.raises(ValueError, match=r"another training: settings differ"):
        train_dictionaries(
            done, rows, dataclasses.replace(config, lr=1.0), checkpoint=tmp_path / "c"
        )
    with pytest.raises(ValueError, match=r"another training: dictionaries differ"):
        train_dictionaries(SparseAutoencoder(D, 49), rows, config, checkpoint=tmp_path / "c")


def test_a_loss_that_is_not_finite_leaves_the_last_good_weights(planted):
    rows, _ = planted
    batches = [{"a": rows[i * 64 : (i + 1) * 64]} for i in range(6)]
    config = dataclasses.replace(QUICK, n_steps=6, first_rows=64, normalize=False, decay=0.0)
    good, bad = (SparseAutoencoder(D, 48, random_state=0) for _ in range(2))
    train_dictionaries({"a": good}, batches, dataclasses.replace(config, n_steps=3, warmup=0.0))
    batches[3] = {"a": batches[3]["a"].clone().fill_(torch.nan)}
    with pytest.raises(FloatingPointError, match=r"dictionary 'a', step 3: the loss is nan"):
        train_dictionaries({"a": bad}, batches, dataclasses.replace(config, warmup=0.0))
    assert torch.equal(good.decoder, bad.decoder) and torch.equal(good.encoder, bad.encoder)


def learner(coder, **options):
    config = dataclasses.replace(QUICK, n_steps=100, **options)
    return Learner("", coder, config, 100, 256, Together())


def test_decoder_rows_keep_norm_1_and_their_gradient_is_perpendicular(planted):
    rows, _ = planted
    sae = SparseAutoencoder(D, 48, {"name": "topk", "k": 2}, random_state=0)
    train_dictionaries(sae, rows, dataclasses.replace(QUICK, n_steps=10, normalize=False))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    one = learner(sae, normalize=False, lr=1e-30)
    one.step(rows[:256], 5)
    along = (sae.decoder.grad * sae.decoder).sum(1)
    assert float(along.abs().max()) < 1e-6 < float(sae.decoder.grad.abs().max())
    free = SparseAutoencoder(D, 48, {"name": "topk", "k": 2}, random_state=0)
    config = dataclasses.replace(QUICK, n_steps=10, normalize=False, unit_norm=False)
    train_dictionaries(free, rows, config)
    assert float((free.W_dec.norm(dim=1) - 1).abs().max()) > 1e-3


def test_rows_are_scaled_and_centered_by_the_first(planted):
    rows = planted[0] * 17 + 3
    sae = SparseAutoencoder(D, 48, random_state=0)
    one = learner(sae)
    one.begin([rows[:1000], rows[1000:3000]])
    first = rows[:3000].double().numpy()
    scale = float(one.scale_in)
    median = sae.b_dec.detach().double().numpy()
    distances = np.sqrt(((first * scale - median) ** 2).sum(1))
    assert distances.mean() == pytest.approx(np.sqrt(D), rel=1e-4)

    def distance(point):
        return np.sqrt(((first * scale - point) ** 2).sum(1)).sum()

    steps = np.eye(D)[:6] * 1e-2
    assert all(distance(median) < distance(median + step) for step in [*steps, *-steps])


def test_geometric_median_withstands_an_outlier():
    rows = torch.cat([torch.zeros(9, 2), torch.tensor([[100.0, 0.0]])])
    assert float(geometric_median(rows).norm()) < 1e-3 < float(rows.mean(0).norm())


def test_k_comes_down(planted):
    rows, _ = planted
    sae = SparseAutoencoder(D, 64, {"name": "topk", "k": 2}, random_state=0)
    config = dataclasses.replace(QUICK, n_steps=20, k_start=22, k_anneal=0.5, log_every=1)
    found = [m.l0 for m in train_dictionaries(sae, rows.abs() + 1, config).of()]
    assert [config.k_at(step, 20, 2) for step in (0, 5, 10, 19)] == [22, 12, 2, 2]
    assert found[0] > found[5] > found[12] and max(found[10:]) <= 2
    assert sae.nonlinearity.k == 2


def dead_start():
    """A dictionary half of whose latents cannot fire."""
    sae = SparseAutoencoder(D, LATENTS, {"name": "topk", "k": 3}, random_state=0)
    with torch.no_grad():
        sae.b_enc[: LATENTS // 2] = -100.0
    return sae


def test_the_auxiliary_loss_reaches_the_dead_alone():
    rows = codes() @ directions(TRUE, D, 1)
    moved = {}
    for coefficient in (0.0, 1 / 32):
        sae = dead_start()
        with torch.no_grad():
            sae.b_enc[: LATENTS // 2] = -8.0  # a few rows reach it: relu lets a gradient pass
            sae.encoder[: LATENTS // 2] *= 20
        one = learner(sae, aux_coefficient=coefficient, dead_after=10, normalize=False)
        one.silent[0, : LATENTS // 2] = 11
        sae.b_enc.data[LATENTS // 2 :] = 50.0  # the living always win
        start = sae.encoder.detach().clone()
        one.step(rows[:256], 50)
        moved[coefficient] = (sae.encoder.detach() - start)[: LATENTS // 2].abs().max()
    assert float(moved[0.0]) == 0 < float(moved[1 / 32])


def test_dead_latents_are_counted(planted):
    sae = dead_start()
    config = dataclasses.replace(QUICK, n_steps=20, dead_after=1000, aux_coefficient=0.0)
    history = train_dictionaries(sae, planted[0], config)
    assert 0.5 <= history.of()[-1].dead < 0.8


def test_resampling_points_the_dead_at_rows_badly_rebuilt(planted):
    rows, _ = planted
    sae = dead_start()
    one = learner(sae, dead_after=10, normalize=False)
    one.step(rows[:256], 0)
    one.silent[0] = torch.arange(LATENTS - 1, -1, -1) // (LATENTS // 2) * 11
    batch = rows[256:512]
    wrote = normalize(batch - sae.b_dec.detach(), dim=1)
    living = sae.encoder[LATENTS // 2 :].detach().norm(dim=1).mean()
    one.resample(batch, batch, 7)
    dead = slice(0, LATENTS // 2)
    cosines = sae.decoder[dead].detach() @ wrote.T
    torch.testing.assert_close(cosines.max(1).values, torch.ones(LATENTS // 2))
    torch.testing.assert_close(
        sae.encoder[dead].detach(), 0.2 * living * sae.decoder[dead].detach()
    )
    assert float(sae.b_enc[dead].detach().abs().max()) == 0 and int(one.silent[0, dead].max()) == 0
    for parameter in (sae.encoder, sae.decoder, sae.b_enc):
        for name in ("exp_avg", "exp_avg_sq"):
            moment = one.optimizer.state[parameter][name]
            assert float(moment[dead].abs().max()) == 0 < float(moment.abs().max())


def test_resampling_revives(planted):
    rows, true = planted
    found = {}
    for every in (0, 50):
        sae = dead_start()
        config = dataclasses.replace(
            QUICK, dead_after=5000, aux_coefficient=0.0, resample_every=every
        )
        found[every] = train_dictionaries(sae, rows, config).of()[-1].dead
    assert found[50] < 0.4 < 0.5 <= found[0]


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
