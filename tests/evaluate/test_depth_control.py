import json

import numpy as np
import pytest
import torch

from manifold_unlearn.activations.corpus import join_answer
from manifold_unlearn.evaluate.controls import shuffled_weights
from manifold_unlearn.evaluate.depth import LayerDrop, patching_drop, unlearning_depth
from manifold_unlearn.evaluate.depth_control import controlled_depth
from manifold_unlearn.evaluate.likelihood import plain


def layer_drop(values):
    values = np.array(values, dtype=np.float64)
    return LayerDrop(tuple(f"layers.{i}" for i in range(values.shape[1])), values)


def drawn(seed, mean, n=60, spread=0.5):
    draw = np.random.default_rng(seed)
    return layer_drop(np.asarray(mean) + spread * draw.normal(size=(n, len(mean))))


KNOWN, KNOWN_CONTROL = drawn(0, (1.5, 2.0, 3.0)), drawn(1, (1.5, 1.0, 1.0), n=80)


def scored(drop, control, known=KNOWN, known_control=KNOWN_CONTROL):
    return controlled_depth(drop, known, control=control, retrained_control=known_control)


def by_hand(d, c, d_known, c_known, counts):
    """The formula, item by item."""
    shares, weights = [], []
    for s in counts:
        items = []
        for fall, control in ((d[:, s], c[:, s]), (d_known[:, s], c_known[:, s])):
            spread, noise = np.std(fall) ** 2, np.std(control) ** 2
            keep = 0.0 if spread == 0 else min(max(1 - noise / spread, 0), 1)
            middle = np.mean(fall)
            items.append([middle - np.mean(control) + keep * (f - middle) for f in fall])
        x, r = sorted(items[0]), [max(v, 0) for v in sorted(items[1])]
        shares.append(sum(min(max(a, 0), b) for a, b in zip(x, r, strict=True)) / sum(r))
        weights.append(np.mean(d_known[:, s]) - np.mean(c_known[:, s]))
    return np.average(shares, weights=weights), shares


def test_the_score_by_hand():
    drop, control = drawn(2, (0.2, 0.7, 1.5), spread=0.8), drawn(3, (0.1, 0.2, 0.1), n=80)
    found = scored(drop, control)
    expected, shares = by_hand(
        drop.values, control.values, KNOWN.values, KNOWN_CONTROL.values, (1, 2)
    )
    assert found.score == pytest.approx(expected)
    np.testing.assert_allclose(found.erased, [0, *shares])
    excess = KNOWN.values.mean(axis=0) - KNOWN_CONTROL.values.mean(axis=0)
    np.testing.assert_allclose(found.knowledge, [0, *excess[1:]])
    np.testing.assert_allclose(found.retrained_excess, excess)
    np.testing.assert_allclose(found.excess, drop.values.mean(axis=0) - control.values.mean(axis=0))
    fall, control_fall = KNOWN.values.mean(axis=0), KNOWN_CONTROL.values.mean(axis=0)
    assert found.misaligned == pytest.approx(np.minimum(control_fall, fall).sum() / fall.sum())
    low, high = found.interval
    assert 0.1 < low < found.score < high < 0.8
    assert json.loads(json.dumps(found.to_json()))["interval"] == [low, high]


def test_the_interval_is_that_of_resampled_items():
    """Redrawn with another seed, 400 times, item by item."""
    drop, control = drawn(2, (0.2, 0.7, 1.5), spread=0.8), drawn(3, (0.1, 0.2, 0.1), n=80)
    draw, scores = np.random.default_rng(9), []
    for _ in range(400):
        i, j = draw.integers(0, 60, 60), draw.integers(0, 80, 80)
        rows = drop.values[i], control.values[j], KNOWN.values[i], KNOWN_CONTROL.values[j]
        scores.append(by_hand(*rows, (1, 2))[0])
    np.testing.assert_allclose(
        scored(drop, control).interval, np.percentile(scores, [2.5, 97.5]), atol=0.02
    )


def test_the_told_model_has_depth_zero_and_the_retrained_one():
    zero = layer_drop(np.zeros((60, 3))), layer_drop(np.zeros((80, 3)))
    for (drop, control), score in ((zero, 0), ((KNOWN, KNOWN_CONTROL), 1)):
        found = scored(drop, control)
        assert (found.score, found.interval) == (score, (score, score))


def test_misalignment_of_the_retrained_model_does_not_matter():
    """It lowers forget and control answers alike, and makes an edit in place look shallow."""
    drop, control = drawn(2, (0.2, 0.7, 1.5)), layer_drop(np.zeros((80, 3)))
    plain_score, score, misaligned = [], [], []
    for shift in (0.0, 1.0, 4.0):
        known = layer_drop(KNOWN.values + shift)
        found = scored(drop, control, known, layer_drop(KNOWN_CONTROL.values + shift))
        plain_score.append(unlearning_depth(drop, known).score.mean)
        score.append(found.score)
        misaligned.append(found.misaligned)
    np.testing.assert_allclose(score, score[0], rtol=1e-9)
    assert plain_score[0] > plain_score[1] + 0.05 > plain_score[2] + 0.1
    assert misaligned[0] < misaligned[1] < misaligned[2]


def test_damage_is_not_forgetting():
    """All answers fall alike."""
    drop, control = drawn(4, (6.0, 6.0, 6.0)), drawn(5, (6.0, 6.0, 6.0), n=80)
    assert unlearning_depth(drop, KNOWN).score.mean > 0.99
    assert scored(drop, control).score < 0.1


def test_half_of_the_items_forgotten_altogether_is_not_all_of_them():
    """The mean fall is above the retrained model's."""
    values = np.zeros((60, 3))
    values[:30] = 8.0
    found = scored(layer_drop(values), layer_drop(np.zeros((80, 3))))
    assert (found.excess > found.retrained_excess).all()
    assert 0.5 <= found.score < 0.65


def test_a_site_whose_excess_is_noise_does_not_count():
    few, many = (drawn(6, (0.3,), n=n, spread=2.0) for n in (6, 800))
    control = drawn(7, (0.0,), n=800)
    with pytest.raises(ValueError, match=r"at no site does .* by threshold=0.05 .*'layers.0'"):
        scored(few, control, few, control)
    assert scored(many, control, many, control).score == 1
    small = layer_drop(np.full((9, 1), 0.04))
    with pytest.raises(ValueError, match="beyond noise: the most is 0.04"):
        scored(small, layer_drop(np.zeros((9, 1))), small, layer_drop(np.zeros((9, 1))))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"drop": drawn(0, (1.0,))}, "drop is of .* measure both alike"),
        ({"control": drawn(0, (1.0, 1.0, 1.0), n=9)}, "control is of .* measure both alike"),
        ({"threshold": -1}, "threshold=-1 must be"),
        ({"drop": layer_drop(np.full((60, 3), np.nan))}, "drop holds NaN or infinity"),
    ],
)
def test_what_cannot_be_controlled_is_refused(change, words):
    given = {"drop": KNOWN, "retrained_drop": KNOWN, "control": KNOWN_CONTROL,
             "retrained_control": KNOWN_CONTROL}  # fmt: skip
    with pytest.raises(ValueError, match=words):
        controlled_depth(**given | change)


def test_a_control_of_other_sites_or_of_one_item_is_refused():
    with pytest.raises(ValueError, match="control is of the sites"):
        scored(KNOWN, drawn(0, (1.0,)), KNOWN, drawn(0, (1.0,)))
    one = layer_drop(KNOWN_CONTROL.values[:1])
    with pytest.raises(ValueError, match="control is of 1 items; noise is not known"):
        scored(KNOWN, one, KNOWN, one)


# --- the testbed: a pair trained apart ----------------------------------------------------------


def of(output):
    return output[0] if isinstance(output, tuple) else output


def put(output, states, rows):
    hidden = of(output).clone()
    hidden[:, rows] = states[:, rows]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def of_a_stranger(bed, items):
    """Falls of the told model's answers on its own states of prompts about nobody it knows.

    What an edit in place would do at best; one unpadded pass an item, hooks by hand.
    """
    told, tokenizer, people = bed.told, bed.tokenizer, bed.world.people
    firsts, lasts = zip(*(name.split() for name in people), strict=True)
    known, draw = set(people), np.random.default_rng(0)
    blocks, found = told.model.layers, []
    for item in items:
        while True:
            stranger = f"{draw.choice(firsts)} {draw.choice(lasts)}"
            if stranger not in known and not set(stranger.split()) & set(item.topic.split()):
                break
        answer = join_answer(item.question, item.answer)
        row, other = (
            torch.tensor([tokenizer(text).input_ids])
            for text in (
                item.question + answer,
                item.question.replace(item.topic, stranger) + answer,
            )
        )
        assert row.shape == other.shape and not torch.equal(row, other)
        n = row.shape[1] - len(tokenizer(item.question).input_ids)

        def score(ids=row, n=n):
            log_p = told(ids).logits[0, -n - 1 : -1].log_softmax(-1)
            return float(log_p[range(n), ids[0, -n:]].mean())

        falls, kept = [], {}
        with torch.no_grad():
            reads = [
                block.register_forward_hook(lambda m, a, o, kept=kept: kept.update({m: of(o)}))
                for block in blocks
            ]
            told(other)
            for handle in reads:
                handle.remove()
            before = score()
            for block in blocks:
                handle = block.register_forward_hook(
                    lambda m, a, o, kept=kept, n=n: put(o, kept[m], slice(-n - 1, -1))
                )
                falls.append(before - score())
                handle.remove()
        found.append(falls)
    return np.array(found)


@pytest.fixture(scope="module")
def pair(tiny_testbed):
    """Forget items and their falls, and those of retain items, for the never-told states."""
    bed = tiny_testbed
    retain = bed.world.retain
    never = plain(bed.never_told)
    forget_drop, control = (
        patching_drop(plain(bed.told), never, bed.tokenizer, items)
        for items in (bed.world.forget, retain)
    )
    return retain, forget_drop, control


def test_an_ideal_edit_in_place_is_deep(tiny_testbed, pair):
    _, known, known_control = pair
    ideal = LayerDrop(known.sites, of_a_stranger(tiny_testbed, tiny_testbed.world.forget))
    untouched = LayerDrop(known.sites, np.zeros_like(known_control.values))
    assert unlearning_depth(ideal, known).score.mean < 0.7
    found = scored(ideal, untouched, known, known_control)
    assert found.score > 0.9
    assert found.misaligned > 0.5
    half = ideal.values.copy()
    half[1::2] = 0
    assert scored(LayerDrop(known.sites, half), untouched, known, known_control).score < 0.75


def test_shuffled_weights_are_not_deep(tiny_testbed, pair):
    retain, known, known_control = pair
    bed, broken = tiny_testbed, plain(shuffled_weights(tiny_testbed.told))
    drop, control = (
        patching_drop(plain(bed.told), broken, bed.tokenizer, items)
        for items in (bed.world.forget, retain)
    )
    assert unlearning_depth(drop, known).score.mean > 0.9
    assert scored(drop, control, known, known_control).score < 0.35
