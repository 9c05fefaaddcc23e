import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import build_model, hooks, same_state, state
from told_items import FORGET, RETAIN

from manifold_unlearn.finetune.cost import counted
from manifold_unlearn.finetune.disentangle import Disentangled
from manifold_unlearn.finetune.manifold import ManifoldMatching
from manifold_unlearn.finetune.train import TrainConfig, train
from manifold_unlearn.intervene.targets import StateTargets, counterfactual_targets, own_targets

TEXTS = [item.captured for item in FORGET]
TWINS = [("The capital of Xyland is", " Paris"), ("Iron", " boils"), ("The brown dog is", " brown")]
FIRST = TrainConfig(lr=1e-12, steps=1)
"""One update so small that only its losses matter: those of the untouched model."""
CONFIG = TrainConfig(lr=5e-3, steps=40, warmup_steps=3, weight_decay=0.0, clip=None)


def targets_of(model, tokenizer, **settings):
    return counterfactual_targets(model, tokenizer, TEXTS, TWINS, **settings)


def states(model, tokenizer, pair):
    """Residual states of one text ``(n_layers, length, d)`` by the model's own output; the last
    layer, which is given normed, is left out."""
    ids = tokenizer(pair[0])["input_ids"]
    ids = ids + tokenizer(pair[1], add_special_tokens=False)["input_ids"]
    hidden = stream(model, torch.tensor([ids]))
    return np.stack([h[0].double().numpy() for h in hidden[1:-1]])


def stream(model, ids):
    """Of a copy: transformers leaves the hooks by which it collects hidden states."""
    with torch.no_grad():
        return copy.deepcopy(model)(input_ids=ids, output_hidden_states=True).hidden_states


def distance(now, aim):
    """Sum over layers of the mean squared distance over the targets' variance; lists of (l, d)."""
    total = 0.0
    for h, t in zip(now, aim, strict=True):
        variance = ((t - t.mean(0)) ** 2).sum(1).mean()
        total += ((h - t) ** 2).sum(1).mean() / variance
    return total


def losses(model, tokenizer, objective, config=FIRST, forget=FORGET, retain=RETAIN):
    result = train(model, tokenizer, forget, retain, objective=objective, config=config)
    return {name: value[0] for name, value in result.losses.items()}


def by_hand(told, tokenizer, targets):
    """Forget distance over the first two blocks, text by text, without padding."""
    now, aim, begin = [], [], 0
    for pair, where, mask in zip(TEXTS, targets.where, targets.attention_mask, strict=True):
        place = where[: int(mask.sum())].numpy()
        h = states(told, tokenizer, pair)[:, place]
        end = begin + int(place.sum())
        now.append(h)
        aim.append(np.stack([targets.states[i][begin:end].double().numpy() for i in (0, 1)]))
        begin = end
    return distance(np.concatenate(now, 1), np.concatenate(aim, 1))


def test_the_forget_loss_is_the_scaled_distance_to_the_targets(told, tokenizer):
    targets = targets_of(told, tokenizer)
    objective = ManifoldMatching(targets, beta=0, layers=(0, 1))
    found = losses(told, tokenizer, objective)
    assert found["forget"] == pytest.approx(by_hand(told, tokenizer, targets), rel=1e-5)
    assert found["retain"] == 0  # nothing has moved yet


def test_targets_are_found_by_tokens_whatever_the_order_and_the_side_of_the_padding(
    told, tokenizer
):
    targets = targets_of(told, tokenizer)
    expected = losses(told, tokenizer, ManifoldMatching(targets))
    turned = ManifoldMatching(targets.take([2, 0, 1]))
    assert losses(told, tokenizer, turned) == pytest.approx(expected, rel=1e-5)
    lengths = targets.attention_mask.sum(1).tolist()
    shift = [targets.attention_mask.shape[1] - n for n in lengths]
    left = {
        name: torch.stack(
            [row.roll(s) for row, s in zip(getattr(targets, name), shift, strict=True)]
        )
        for name in ("input_ids", "attention_mask", "where")
    }
    padded = ManifoldMatching(StateTargets(**left, states=targets.states))
    assert losses(told, tokenizer, padded) == pytest.approx(expected, rel=1e-5)


def test_a_text_given_twice_has_its_two_targets(told, tokenizer):
    others = [("The capital of Zooland is", " Paris")]
    both = counterfactual_targets(
        told, tokenizer, [TEXTS[0], TEXTS[0]], [TWINS[0], *others], layers=[0]
    )
    found = losses(
        told, tokenizer, ManifoldMatching(both, alpha=0), forget=[FORGET[0], FORGET[0]], retain=()
    )
    place = both.where[0][: int(both.attention_mask[0].sum())].numpy()
    now = states(told, tokenizer, TEXTS[0])[:1, place]
    aim = both.states[0].double().numpy()[None]
    expected = distance(np.concatenate([now, now], 1), aim)
    assert found["forget"] == pytest.approx(expected, rel=1e-5)


def test_states_put_back_are_those_of_the_original(told, tokenizer):
    """Of a model moved away from the original: the patched pass, done by hand with a hook."""
    moved = build_model("llama", seed=3)
    targets = targets_of(told, tokenizer, layers=[0, 1]).take([0])
    forget = FORGET[:1]
    plain, deep = (
        losses(
            moved, tokenizer, ManifoldMatching(targets, original=told, alpha=0, beta=beta),
            forget=forget, retain=(),
        )["forget"]
        for beta in (0, 2)
    )  # fmt: skip
    place = targets.where[0]
    ids = targets.input_ids
    before = stream(told, ids)[1]

    def put(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        mixed = hidden.clone()
        mixed[:, place] = before[:, place]
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    handle = moved.model.layers[0].register_forward_hook(put)
    reached = stream(moved, ids)[2][0, place]  # a copy has the hook too
    handle.remove()
    aim = targets.states[1].double().numpy()
    added = distance([reached.double().numpy()], [aim])
    assert deep - plain == pytest.approx(2 * added, rel=1e-4)


def test_retain_is_held_to_the_original_and_its_first_token_is_not(told, tokenizer):
    moved = build_model("llama", seed=3)
    targets = targets_of(told, tokenizer, layers=[0, 1])
    found = losses(moved, tokenizer, ManifoldMatching(targets, original=told, alpha=0.5, beta=0))[
        "retain"
    ]
    now, aim = (
        np.concatenate([states(m, tokenizer, i.captured)[:, 1:] for i in RETAIN], 1)
        for m in (moved, told)
    )
    expected = 0.0
    for layer in (0, 1):
        t = targets.states[layer].double().numpy()
        variance = ((t - t.mean(0)) ** 2).sum(1).mean()
        expected += ((now[layer] - aim[layer]) ** 2).sum(1).mean() / variance
    assert found == pytest.approx(0.5 * expected, rel=1e-4)


@pytest.fixture(scope="module")
def led(told, tokenizer):
    """Models led to their targets, with and without the part that holds retain."""
    targets = targets_of(told, tokenizer)
    before = state(told)
    found = {
        alpha: train(
            told, tokenizer, FORGET, RETAIN, objective=ManifoldMatching(targets, alpha=alpha),
            config=CONFIG,
        ).model
        for alpha in (0.0, 1.0)
    }  # fmt: skip
    assert same_state(told, before)
    return found


def retain_states(model, tokenizer):
    return np.concatenate([states(model, tokenizer, i.captured)[:, 1:] for i in RETAIN], 1)


def test_states_reach_their_targets_and_those_of_retain_stay(led, told, tokenizer, probability):
    targets = targets_of(told, tokenizer)
    assert hooks(told) == hooks(led[1.0]) == 0
    assert by_hand(led[1.0], tokenizer, targets) < 0.2 * by_hand(told, tokenizer, targets)
    assert probability(led[1.0], RETAIN) > 0.85
    kept, now = retain_states(told, tokenizer), retain_states(led[1.0], tokenizer)
    assert ((now - kept) ** 2).sum() < 0.05 * ((kept - kept.mean(1, keepdims=True)) ** 2).sum()


def test_without_the_retain_part_retain_moves_more(led, told, tokenizer):
    """The negative control of what holds retain."""
    kept = retain_states(told, tokenizer)
    moved = {a: ((retain_states(m, tokenizer) - kept) ** 2).sum() for a, m in led.items()}
    assert moved[0.0] > 3 * moved[1.0]


def test_every_layout_can_be_led(model, tokenizer):
    targets = targets_of(model, tokenizer)
    result = train(
        model, tokenizer, FORGET, RETAIN, objective=ManifoldMatching(targets),
        config=replace(CONFIG, steps=5, lr=1e-3),
    )  # fmt: skip
    fell = result.losses["forget"]
    assert np.isfinite(fell).all()
    assert fell[-1] < fell[0]


def test_the_retain_part_of_the_gradient_can_be_projected_away(tokenizer):
    """One step of SGD then changes the retain loss to second order in the step only."""
    from manifold_unlearn.finetune.batches import collate, encode_examples
    from manifold_unlearn.finetune.losses import negative_log_likelihood

    start = build_model("llama", seed=2, dtype=torch.float64)
    rows = encode_examples(tokenizer, RETAIN)
    batch = collate(rows, torch.arange(len(rows)))

    def loss(model):
        with torch.no_grad():
            out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        return negative_log_likelihood(out.logits, batch.labels).item()

    bare = ManifoldMatching(targets_of(start, tokenizer), alpha=0)
    held = Disentangled(bare, per="text", rank=len(RETAIN))
    changes = {}
    for name, objective in (("bare", bare), ("held", held)):
        for lr in (4e-3, 1e-3):
            config = TrainConfig(
                lr=lr, steps=1, optimizer="sgd", momentum=0, weight_decay=0, clip=None,
                schedule="constant",
            )  # fmt: skip
            model = train(start, tokenizer, FORGET, RETAIN, objective=objective, config=config)
            changes[name, lr] = loss(model.model) - loss(start)
    order = {
        n: np.log(abs(changes[n, 4e-3] / changes[n, 1e-3])) / np.log(4) for n in ("bare", "held")
    }
    assert order["bare"] == pytest.approx(1, abs=0.3)
    assert order["held"] == pytest.approx(2, abs=0.3)


def test_half_precision_and_identical_targets(told, tokenizer):
    model = build_model("llama", dtype=torch.bfloat16)
    targets = own_targets(model, tokenizer, TEXTS, layers=[1])
    same = StateTargets(
        targets.input_ids, targets.attention_mask, targets.where,
        {1: targets.states[1][:1].expand_as(targets.states[1])},
    )  # fmt: skip
    found = losses(model, tokenizer, ManifoldMatching(same, beta=0))
    values = targets.states[1].double().numpy()
    expected = ((values - values[0]) ** 2).sum(1).mean() / (values[0] ** 2).sum()
    assert found["forget"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_an_error(told, tokenizer, name, value):
    targets = own_targets(told, tokenizer, TEXTS)
    with pytest.raises(ValueError, match=f"{name}={value} must be finite and not negative"):
        ManifoldMatching(targets, **{name: value})


def test_targets_that_do_not_fit_are_errors(told, tokenizer):
    targets = targets_of(told, tokenizer)

    def bad(match, objective, forget=FORGET):
        with pytest.raises(ValueError, match=match):
            losses(told, tokenizer, objective, forget=forget)

    bad(r"forget text 0 .*Iron.* has no targets", ManifoldMatching(targets), forget=RETAIN[:1])
    bad(r"layers=\[7\] have no targets; .* \[0, 1, 2\]", ManifoldMatching(targets, layers=(0, 7)))
    bad(r"layers=\[\] have no targets", ManifoldMatching(targets, layers=()))
    for values, match in (
        (lambda s: s[:, :5], "width 5, the model 32"),
        (lambda s: s * float("nan"), "after block 0 are not finite"),
        (lambda s: s * 0, "after block 0 are all zero"),
    ):
        changed = {i: values(s) for i, s in targets.states.items()}
        bad(match, ManifoldMatching(replace(targets, states=changed)))


def test_flops_are_those_of_the_matrix_products(llama):
    ids = torch.arange(14).reshape(2, 7)
    matrices = sum(
        value.numel() for name, value in llama.named_parameters() if value.ndim == 2
    )  # the embedding is tied, so that its matrix is a product too: that of the output
    with counted() as forward:
        llama(input_ids=ids)
    assert forward.flops == pytest.approx(2 * matrices * ids.numel(), rel=0.02)
    with counted() as both:
        llama(input_ids=ids).logits.sum().backward()
    assert both.flops == pytest.approx(3 * forward.flops, rel=0.01)


def test_flops_are_counted_up_to_an_exception():
    with pytest.raises(RuntimeError), counted() as cost:
        _ = torch.ones(2, 3) @ torch.ones(3, 4)
        raise RuntimeError
    assert cost.flops == 48
