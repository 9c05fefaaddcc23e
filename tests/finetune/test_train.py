import math
import re
import sys

import numpy as np
import pytest
import torch
from cases import build_model, hooks, same_state, state
from told_items import FORGET, RETAIN

from manifold_unlearn.finetune.ascent import GradDiff, GradientAscent
from manifold_unlearn.finetune.train import TrainConfig, fine_tune, train
from manifold_unlearn.finetune.trainable import LoRA

QUICK = TrainConfig(lr=1e-3, steps=6, batch_size=2, schedule="constant")


def changed(before, after):
    """Names of the weights that differ."""
    now = after.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, now[name])}


def test_fine_tuning_teaches_and_leaves_the_model_alone(model, tokenizer, probability):
    before = state(model)
    assert probability(model, FORGET) < 0.01
    config = TrainConfig(lr=1e-2, steps=20, schedule="constant")
    result = fine_tune(model, tokenizer, FORGET, config=config)
    assert same_state(model, before)
    assert probability(result.model, FORGET) > 0.2
    assert result.losses["nll"].shape == (20,)
    assert result.losses["nll"][-1] < 1 < 3 < result.losses["nll"][0]
    assert not result.model.training
    assert all(p.grad is None and p.requires_grad for p in result.model.parameters())


def test_the_first_step_is_plain_sgd_by_hand(llama, tokenizer):
    """One update on one pair is ``-lr`` times the gradient that autograd gives."""
    config = TrainConfig(
        lr=0.1, steps=1, optimizer="sgd", momentum=0, weight_decay=0, clip=None,
        schedule="constant", batch_size=1,
    )  # fmt: skip
    tuned = fine_tune(llama, tokenizer, [("Water", " boils")], config=config).model
    prompt = tokenizer("Water")["input_ids"]
    answer = tokenizer(" boils", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + answer])
    logits = llama(input_ids=ids).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, ids.shape[1] - 1)
    loss = -torch.stack([logits[t, ids[0, t + 1]] for t in places]).mean()
    loss.backward()
    for (name, old), new in zip(llama.named_parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * old.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_the_seed_decides(llama, tokenizer):
    def losses(seed):
        config = TrainConfig(lr=1e-3, steps=5, batch_size=2, random_state=seed)
        return train(llama, tokenizer, FORGET, RETAIN, objective=GradDiff(), config=config)

    first, again, other = losses(0), losses(0), losses(1)
    assert same_state(again.model, state(first.model))
    assert not same_state(other.model, state(first.model))
    np.testing.assert_array_equal(first.losses["forget"], again.losses["forget"])


def test_steps_are_counted_and_called(llama, tokenizer):
    seen = []
    before = state(llama)

    def on_step(step, model):
        seen.append((step, same_state(model, before)))
        assert not model.training

    result = fine_tune(llama, tokenizer, FORGET, config=QUICK, on_step=on_step)
    assert [step for step, _ in seen] == [*range(7)]
    assert [same for _, same in seen] == [True] + [False] * 6
    assert result.n_steps == 6
    epochs = TrainConfig(epochs=2, batch_size=2)
    assert fine_tune(llama, tokenizer, FORGET, config=epochs).n_steps == 4


def test_the_rate_rises_and_falls():
    made = {s: TrainConfig(lr=1.0, warmup_steps=2, schedule=s) for s in ("linear", "constant")}
    assert [made["linear"].lr_at(s, 6) for s in range(6)] == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert [made["constant"].lr_at(s, 6) for s in range(6)] == [0.5, 1, 1, 1, 1, 1]
    cosine = TrainConfig(lr=1.0, schedule="cosine")
    assert cosine.lr_at(1, 4) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_only_what_is_trainable_changes(llama, tokenizer):
    before = state(llama)
    config = TrainConfig(lr=1e-2, steps=2, trainable=r"layers\.1\.mlp\.down_proj")
    result = fine_tune(llama, tokenizer, FORGET, config=config)
    assert result.trained == ("model.layers.1.mlp.down_proj.weight",)
    assert changed(before, result.model) == set(result.trained)
    assert all(p.requires_grad for p in result.model.parameters())


def test_a_clipped_step_is_no_longer_than_asked(llama, tokenizer):
    def length(clip):
        config = TrainConfig(
            lr=1.0, steps=1, optimizer="sgd", momentum=0, weight_decay=0, clip=clip
        )
        tuned = fine_tune(llama, tokenizer, FORGET, config=config).model
        pairs = zip(tuned.parameters(), llama.parameters(), strict=True)
        return math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in pairs))

    assert length(None) > 1
    assert length(0.01) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_the_model_as_it_was(llama, tokenizer, error):
    before = state(llama)
    flags = [p.requires_grad for p in llama.parameters()]

    def stop(step, model):
        if step == 3:
            if in_place:
                assert not same_state(llama, before)
            raise error("enough")

    for in_place in (False, True):
        with pytest.raises(error, match="enough"):
            fine_tune(llama, tokenizer, FORGET, config=QUICK, on_step=stop, in_place=in_place)
        assert same_state(llama, before)
        assert hooks(llama) == 0
        assert [p.requires_grad for p in llama.parameters()] == flags
        assert all(p.grad is None for p in llama.parameters())


def test_in_place_changes_the_model_itself(llama, tokenizer):
    copy = fine_tune(llama, tokenizer, FORGET, config=QUICK).model
    result = fine_tune(llama, tokenizer, FORGET, config=QUICK, in_place=True)
    assert result.model is llama
    assert same_state(llama, state(copy))
    with pytest.raises(ValueError, match="in_place=True does not go with LoRA"):
        config = TrainConfig(trainable=LoRA())
        fine_tune(llama, tokenizer, FORGET, config=config, in_place=True)


def test_a_loss_that_is_not_finite_names_the_step(llama, tokenizer):
    before = state(llama)
    config = TrainConfig(lr=1e9, steps=20, schedule="constant", clip=None)
    with pytest.raises(FloatingPointError, match=r"step \d+: the (forget loss|norm of)"):
        train(llama, tokenizer, FORGET, (), objective=GradientAscent(), config=config)
    assert same_state(llama, before)


def test_weights_that_are_not_finite_are_named(llama, tokenizer):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        fine_tune(llama, tokenizer, FORGET)


@pytest.mark.parametrize(
    ("forget", "retain", "message"),
    [
        ([], RETAIN, "the forget set is empty"),
        (FORGET, [], "the retain set is empty"),
    ],
)
def test_an_empty_set(llama, tokenizer, forget, retain, message):
    with pytest.raises(ValueError, match=message):
        train(llama, tokenizer, forget, retain, objective=GradDiff())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, "lr=0 must be positive"),
        ({"lr": math.nan}, "lr=nan must be positive"),
        ({"steps": 0}, "steps=0 must be positive"),
        ({"batch_size": -1}, "batch_size=-1 must be positive"),
        ({"clip": 0.0}, "clip=0.0 must be positive"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must not be negative"),
        ({"schedule": "step"}, "schedule='step' is not"),
        ({"optimizer": "lion"}, "optimizer='lion' is not"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("pattern", "message"), [("nowhere", "matches none of 29"), ("(", "or a regular expression")]
)
def test_a_pattern_that_fits_nothing(llama, tokenizer, pattern, message):
    with pytest.raises(ValueError, match=message):
        fine_tune(llama, tokenizer, FORGET, config=TrainConfig(trainable=pattern))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_low_rank_additions_merged_or_kept(llama, tokenizer, probability):
    pytest.importorskip("peft")
    before = state(llama)
    config = TrainConfig(lr=2e-2, steps=25, schedule="constant", trainable=LoRA(rank=4))
    result = fine_tune(llama, tokenizer, FORGET, config=config)
    assert same_state(llama, before)
    assert type(result.model) is type(llama)
    assert probability(result.model, FORGET) > 10 * probability(llama, FORGET)
    assert result.losses["nll"][-1] < 0.6 * result.losses["nll"][0]
    assert all("lora_" in name for name in result.trained)
    moved = changed(before, result.model)
    assert moved
    assert all(name.endswith("_proj.weight") for name in moved)
    gap = result.model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert (
        torch.linalg.matrix_rank(gap - before["model.layers.0.mlp.up_proj.weight"], rtol=1e-4) == 4
    )
    kept = TrainConfig(lr=2e-2, steps=2, trainable=LoRA(rank=4, merge=False))
    assert hasattr(fine_tune(llama, tokenizer, FORGET, config=kept).model, "peft_config")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_low_rank_additions_follow_the_seed(llama, tokenizer):
    pytest.importorskip("peft")
    config = TrainConfig(lr=1e-2, steps=2, trainable=LoRA(rank=2))
    first = fine_tune(llama, tokenizer, FORGET, config=config).model
    torch.rand(3)  # whatever the global state
    again = fine_tune(llama, tokenizer, FORGET, config=config).model
    assert same_state(again, state(first))


def test_without_peft_the_command_is_named(llama, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'manifold-unlearn\[lora\]'"):
        fine_tune(llama, tokenizer, FORGET, config=TrainConfig(trainable=LoRA()))


def test_a_rank_that_is_none(llama, tokenizer):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        fine_tune(llama, tokenizer, FORGET, config=TrainConfig(trainable=LoRA(rank=0)))


def test_half_precision_trains(tokenizer):
    model = build_model("llama", dtype=torch.bfloat16)
    config = TrainConfig(lr=1e-2, steps=20, schedule="constant")
    result = fine_tune(model, tokenizer, FORGET, config=config)
    assert next(result.model.parameters()).dtype == torch.bfloat16
    assert result.losses["nll"][-1] < 0.5 * result.losses["nll"][0]
