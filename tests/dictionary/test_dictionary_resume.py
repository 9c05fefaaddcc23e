"""A training that stops goes on to the bit, and one that fails leaves no wreck."""

import dataclasses
import itertools
import os
import signal

import pytest
import torch
from planted_rows import JUMP, QUICK, D, planted_rows

from manifold_unlearn.dictionary import (
    DictionaryTraining,
    SparseAutoencoder,
    Transcoder,
    stream_activations,
    stream_rows,
    train_dictionaries,
)


@pytest.fixture
def planted():
    return planted_rows()


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


@pytest.fixture
def keyboard():
    """Interrupts arrive also where the suite runs in the background, which ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_within_a_step_waits_for_its_end(planted, tmp_path, keyboard):
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
