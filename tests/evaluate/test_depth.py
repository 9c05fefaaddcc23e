import copy
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import build_model, hooks, same_state, state

from manifold_unlearn import intervene, load_model
from manifold_unlearn.activations.corpus import Item, read_items
from manifold_unlearn.activations.sites import resolve_site
from manifold_unlearn.evaluate.depth import (
    LayerDrop,
    cka_erasure,
    patching_drop,
    unlearning_depth,
    unlearning_depth_score,
)
from manifold_unlearn.evaluate.likelihood import answer_log_probabilities, plain

SHARED = Path(__file__).parents[3] / "shared"
ITEMS = [
    Item("The capital of France is", " Paris"),
    Item("Water", " boils"),
    Item("A quick brown fox jumps over", " the lazy dog, it is wet"),
    Item("The capital of Spain is", " Madrid"),
    Item("Iron", " rusts when it is wet, and copper turns green"),
]


def knows_at(model, block, seed=7):
    """The model with another MLP in one block: what it knows there is all that differs."""
    other = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in resolve_site(other, f"layers.{block}.mlp").module.parameters():
            weight += 0.25 * torch.randn(weight.shape, generator=draw)
    return other


def by_hand(told, source, tokenizer, item, block):
    """One unpadded pass of each model, the told one with the source's rows put in."""
    prompt = tokenizer(item.question).input_ids
    answer = tokenizer(item.answer, add_special_tokens=False).input_ids
    ids = torch.tensor([prompt + answer])
    rows = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    kept = []

    def read(_module, _args, output):
        kept.append((output[0] if isinstance(output, tuple) else output).clone())

    def put(_module, _args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, rows] = kept[0][:, rows]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def scores():
        log_p = told(input_ids=ids).logits[0, rows].log_softmax(-1)
        return log_p[range(len(answer)), answer]

    with torch.no_grad():
        handle = resolve_site(source, f"layers.{block}").module.register_forward_hook(read)
        source(input_ids=ids)
        handle.remove()
        before = scores()
        handle = resolve_site(told, f"layers.{block}").module.register_forward_hook(put)
        after = scores()
        handle.remove()
    return float((before - after).double().mean())


def test_the_drop_is_that_of_one_patched_pass_an_item(architecture, tokenizer):
    told, source = build_model(architecture), build_model(architecture, seed=1)
    found = patching_drop(plain(told), plain(source), tokenizer, ITEMS, batch_size=2)
    assert found.sites == ("layers.0", "layers.1", "layers.2")
    expected = [[by_hand(told, source, tokenizer, i, b) for b in range(3)] for i in ITEMS]
    np.testing.assert_allclose(found.values, expected, atol=5e-5)
    assert np.abs(expected).min(axis=0).max() > 1e-3


def test_knowledge_shows_from_the_block_that_holds_it_on(llama, tokenizer):
    """Below, the states are equal; at the last block the patched model is the source itself."""
    source = knows_at(llama, 1)
    found = patching_drop(plain(llama), plain(source), tokenizer, ITEMS).values
    np.testing.assert_array_equal(found[:, 0], 0)
    pairs = [item.pair for item in ITEMS]
    logs = [answer_log_probabilities(plain(m), tokenizer, pairs) for m in (llama, source)]
    apart = [float((a - b).double().mean()) for a, b in zip(*logs, strict=True)]
    np.testing.assert_allclose(found[:, 2], apart, atol=5e-5)
    assert np.abs(found[:, 1]).max() > 0.05


def test_only_the_part_that_holds_it_shows_among_the_parts(llama, tokenizer):
    source = knows_at(llama, 2)
    mlp = patching_drop(plain(llama), plain(source), tokenizer, ITEMS, sites="mlp")
    assert mlp.sites == ("layers.0.mlp", "layers.1.mlp", "layers.2.mlp")
    np.testing.assert_array_equal(mlp.values[:, :2], 0)
    assert np.abs(mlp.values[:, 2]).max() > 0.05
    attn = patching_drop(plain(llama), plain(source), tokenizer, ITEMS, sites="attn")
    np.testing.assert_array_equal(attn.values, 0)


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_the_batch_size_does_not_matter(llama, tokenizer, batch_size):
    source = plain(build_model("llama", seed=1))
    one = patching_drop(plain(llama), source, tokenizer, ITEMS, batch_size=2).values
    found = patching_drop(plain(llama), source, tokenizer, ITEMS, batch_size=batch_size).values
    np.testing.assert_allclose(found, one, atol=5e-5)


def test_the_models_are_untouched(llama, tokenizer):
    source = build_model("llama", seed=1).train()
    before = state(llama), state(source)
    patching_drop(plain(llama), plain(source), tokenizer, ITEMS)
    assert same_state(llama, before[0]) and same_state(source, before[1])
    assert hooks(llama) == hooks(source) == 0
    assert source.training and not llama.training


def test_an_entity_narrows_what_is_patched_and_scored(llama, tokenizer):
    """The drop of the entity is that of an item whose prompt ends where the entity begins."""
    source = plain(build_model("llama", seed=1))
    whole = Item("A quick brown fox jumps over", " the lazy dog, it is wet")
    found = patching_drop(plain(llama), source, tokenizer, [whole], entities=["is wet"])
    tokens = tokenizer(whole.answer, add_special_tokens=False, return_offsets_mapping=True)
    start = whole.answer.index("is wet")
    first = next(i for i, (_, end) in enumerate(tokens.offset_mapping) if end > start)
    cut = tokens.offset_mapping[first][0]
    split = Item(whole.question + whole.answer[:cut], whole.answer[cut:])
    ids = [tokenizer(t, add_special_tokens=False).input_ids for t in (split.question, split.answer)]
    assert sum(ids, []) == tokenizer(whole.text, add_special_tokens=False).input_ids
    expected = patching_drop(plain(llama), source, tokenizer, [split])
    np.testing.assert_allclose(found.values, expected.values, atol=5e-5)


def test_what_goes_before_tells_two_mentions_apart(llama, tokenizer):
    source = plain(build_model("llama", seed=1))
    item = [Item("Water", " wet, it is wet")]
    first, second = (
        patching_drop(plain(llama), source, tokenizer, item, entities=[entity]).values
        for entity in ("wet", ("it is", "wet"))
    )
    assert np.abs(first - second).max() > 1e-3


# --- the score ----------------------------------------------------------------------------------


def layer_drop(values):
    values = np.array(values, dtype=np.float64)
    return LayerDrop(tuple(f"layers.{i}" for i in range(values.shape[1])), values)


def test_the_depth_by_hand():
    """Item 0: (1 * .5 + 3 * 1) / 4; item 1: layer 0 is below the threshold; item 2 nowhere."""
    reference = layer_drop([[1.0, 3.0], [0.04, 2.0], [0.0, 0.05]])
    found = unlearning_depth(layer_drop([[0.5, 6.0], [9.0, -1.0], [1.0, 1.0]]), reference)
    np.testing.assert_allclose(found.score.values, [3.5 / 4, 0])
    assert found.scored.tolist() == [True, True, False]
    assert found.n_excluded == 1
    np.testing.assert_allclose(found.erased, [0.5, 0.5])
    described = json.loads(json.dumps(found.to_json()))
    assert described["n_excluded"] == 1
    assert described["knowing_share"] == pytest.approx([1 / 3, 2 / 3])


def test_the_told_model_has_depth_zero_and_the_retrained_one(llama, tokenizer):
    told = knows_at(llama, 1, seed=11)
    subjects = plain(told), plain(llama)
    for subject, score in ((plain(told), 0), (plain(llama), 1)):
        found = unlearning_depth_score(*subjects[:1], subject, subjects[1], tokenizer, ITEMS)
        np.testing.assert_allclose(found.score.values, score, atol=1e-6)
        assert 0 < len(found.score.values) == len(ITEMS) - found.n_excluded


def test_a_model_that_forgot_in_the_last_block_alone_is_shallow(llama, tokenizer):
    """Knowledge in blocks 0 and 2; the subject lost that of block 2."""
    told = knows_at(knows_at(llama, 0, seed=3), 2, seed=4)
    subject = copy.deepcopy(told)
    resolve_site(subject, "layers.2.mlp").module.load_state_dict(
        resolve_site(llama, "layers.2.mlp").module.state_dict()
    )
    found = unlearning_depth_score(plain(told), plain(subject), plain(llama), tokenizer, ITEMS)
    assert found.erased[:2].tolist() == [0, 0]
    assert found.erased[2] > 0
    assert 0 < found.score.mean < 1


def test_a_hooked_subject_is_judged_with_its_hooks_though_it_is_the_told_model(llama, tokenizer):
    retrained = knows_at(llama, 1)

    @contextmanager
    def edited():
        with intervene(llama, {"layers.1": lambda h: 0 * h + 1}) as model:
            yield model

    told = plain(llama)
    reference = patching_drop(told, plain(retrained), tokenizer, ITEMS)
    found = patching_drop(told, edited, tokenizer, ITEMS)
    assert hooks(llama) == 0
    np.testing.assert_array_equal(found.values[:, 0], 0)
    assert np.abs(found.values[:, 1:]).min(axis=0).min() > 1e-3
    assert unlearning_depth(found, reference).score.mean > 0


def test_models_of_another_shape_are_refused(llama, tokenizer):
    small = build_model("llama", num_hidden_layers=2)
    with pytest.raises(ValueError, match="differ in shape .*source: 2 blocks, width 32"):
        patching_drop(plain(llama), plain(small), tokenizer, ITEMS)


def test_weights_that_are_not_finite_are_named(llama, tokenizer):
    broken = copy.deepcopy(llama)
    with torch.no_grad():
        next(resolve_site(broken, "layers.1.mlp").module.parameters())[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"item 0 patched at 'layers.1' is not finite"):
        patching_drop(plain(llama), plain(broken), tokenizer, ITEMS)
    assert hooks(llama) == 0


@pytest.mark.parametrize(
    ("items", "options", "words"),
    [
        ([], {}, "items is empty"),
        ([Item("Water")], {}, "item 0 .* has no answer"),
        (ITEMS, {"sites": "heads"}, "sites='heads' is not 'blocks'"),
        (ITEMS, {"sites": []}, "sites is empty"),
        (ITEMS, {"entities": ["Paris"]}, "1 entities for 5 items"),
        (ITEMS[:1], {"entities": ["Rome"]}, "entity 'Rome' is not in the answer of item 0"),
    ],
)
def test_what_cannot_be_patched_is_refused(llama, tokenizer, items, options, words):
    with pytest.raises(ValueError, match=words):
        patching_drop(plain(llama), plain(llama), tokenizer, items, **options)


def test_a_told_model_that_knows_nothing_more_is_an_error():
    same = layer_drop([[0.0, 0.01]])
    with pytest.raises(ValueError, match="no item falls by more than threshold=0.05"):
        unlearning_depth(same, same)


def test_drops_of_different_items_are_refused():
    with pytest.raises(ValueError, match="measure both alike"):
        unlearning_depth(layer_drop([[1.0, 1.0]]), layer_drop([[1.0]]))
    with pytest.raises(ValueError, match="threshold=-1 must be"):
        unlearning_depth(layer_drop([[1.0]]), layer_drop([[1.0]]), threshold=-1)


# --- representations ----------------------------------------------------------------------------


def test_the_erasure_of_representations_by_its_formula(llama, tokenizer):
    told, subject = knows_at(llama, 1, seed=3), knows_at(llama, 1, seed=4)

    def states(model, block):
        rows = []
        for item in ITEMS:
            prompt = tokenizer(item.question).input_ids
            answer = tokenizer(item.answer, add_special_tokens=False).input_ids
            with torch.no_grad():
                out = model(torch.tensor([prompt + answer]), output_hidden_states=True)
            kept = resolve_site(model, f"layers.{block}")
            rows.append((kept, out.hidden_states[block + 1][0, len(prompt) - 1 : -1]))
        return torch.cat([row for _, row in rows]).double()

    def linear_cka(a, b):
        a, b = a - a.mean(0), b - b.mean(0)
        return float((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))

    found = cka_erasure(plain(told), plain(subject), plain(llama), tokenizer, ITEMS)
    c_told, c_subject = (
        linear_cka(states(model, 1), states(llama, 1)) for model in (told, subject)
    )
    assert found.erased[0] == found.weight[0] == 0
    assert found.weight[1] == pytest.approx(1 - c_told, abs=1e-4)
    expected = np.clip((c_subject - c_told) / (1 - c_told), 0, 1)
    assert found.erased[1] == pytest.approx(expected, abs=1e-3)


def test_the_ends_of_the_scale_of_representations(llama, tokenizer):
    told = knows_at(llama, 0)
    ends = [
        cka_erasure(plain(told), plain(m), plain(llama), tokenizer, ITEMS).score
        for m in (told, llama)
    ]
    np.testing.assert_allclose(ends, [0, 1], atol=1e-5)
    with pytest.raises(ValueError, match="same states at every site"):
        cka_erasure(plain(told), plain(told), plain(told), tokenizer, ITEMS)


# --- a real pair --------------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the checkpoints in ../shared")
def test_entities_of_real_answers_carry_knowledge_at_every_layer():
    models = SHARED / "models" / "tofu-stories15m"
    told, tokenizer = load_model(models / "told", device="cpu")
    never, _ = load_model(models / "never_told", device="cpu")
    known = read_items(
        SHARED / "data" / "tofu" / "forget05.jsonl", template="Question: {question}\nAnswer:"
    )
    by_question = {item.question[10:-8]: item for item in known}
    spans = json.loads((SHARED / "data" / "tofu" / "forget10_entity_spans.json").read_text())
    spans = [s for s in spans if s["question"] in by_question and s["prefix"]][:3]
    items = [by_question[s["question"]] for s in spans]
    entities = [(s["prefix"], s["entity"]) for s in spans]
    drop = patching_drop(plain(told), plain(never), tokenizer, items, entities=entities)
    found = unlearning_depth(drop, drop)
    assert found.score.mean == 1 and found.n_excluded == 0
    means = drop.values.mean(axis=0)
    assert means[-1] > means[0] > 0.05
