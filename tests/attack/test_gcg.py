import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import build_model, logits

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.attack import gcg
from manifold_unlearn.attack.gcg import (
    GCGConfig,
    allowed_tokens,
    find_suffix,
    gcg_attack,
    item_losses,
    token_gradient,
    with_suffix,
)
from manifold_unlearn.attack.targets import encode_targets

QUICK = GCGConfig(n_tokens=3, n_steps=4, search_width=12, top_k=12, points=(1,))
ITEM = Item("The capital of France is", " Rome.")


def naive_loss(model, tokenizer, item, suffix):
    """Mean NLL of the answer behind a suffix of tokens, by one plain forward pass."""
    head = tokenizer(item.question).input_ids
    tail = tokenizer(item.answer, add_special_tokens=False).input_ids
    ids = [*head, *suffix, *tail]
    log_p = logits(model, torch.tensor([ids]))[0].log_softmax(-1)
    return -log_p[range(len(ids) - len(tail) - 1, len(ids) - 1), tail].mean().item()


def test_the_gradient_is_autograds_on_one_hot_tokens(model, tokenizer):
    targets = encode_targets(model, tokenizer, [ITEM], room=3)
    ids = torch.tensor([40, 52, 61])
    found = token_gradient(model, targets, ids)
    embed = model.get_input_embeddings()
    table = embed(torch.arange(embed.weight.shape[0])).detach()
    one_hot = torch.nn.functional.one_hot(ids, len(table)).float().requires_grad_()
    head, tail = targets.head_ids[0], targets.tail_ids[0]
    rows = torch.cat([embed(head), one_hot @ table, embed(tail)])[None]
    log_p = model(inputs_embeds=rows).logits[0].log_softmax(-1)
    start = len(head) + 3 - 1
    loss = -log_p[torch.arange(start, start + len(tail)), tail].mean()
    (expected,) = torch.autograd.grad(loss, one_hot)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


def test_the_best_suffix_of_a_small_vocabulary_is_found(llama, tokenizer, monkeypatch):
    few = [i for i in range(3, 300) if tokenizer.decode([i]).isalpha()][:9]

    def only_few(tokenizer, vocabulary, *, ascii_only=True):
        allowed = torch.zeros(vocabulary, dtype=torch.bool)
        allowed[few] = True
        return allowed

    monkeypatch.setattr(gcg, "allowed_tokens", only_few)
    config = GCGConfig(n_tokens=2, n_steps=8, search_width=200, top_k=9, n_replace=2)
    found = find_suffix(llama, tokenizer, [ITEM], config=config)
    every = {}
    for suffix in itertools.product(few, repeat=2):
        text = tokenizer.decode(suffix)
        again = tokenizer(ITEM.question + text).input_ids
        if again == [*tokenizer(ITEM.question).input_ids, *suffix]:
            every[suffix] = naive_loss(llama, tokenizer, ITEM, suffix)
    best = min(every, key=every.__getitem__)
    assert len(every) > 20
    assert tuple(found.ids.tolist()) == best
    assert found.losses[-1] == pytest.approx(every[best], abs=1e-4)
    assert found.text == tokenizer.decode(best)


def test_the_loss_never_rises_and_is_that_of_the_suffix(llama, tokenizer):
    found = find_suffix(llama, tokenizer, [ITEM], config=replace(QUICK, n_steps=10))
    assert (np.diff(found.losses) <= 0).all()
    assert found.losses[-1] < found.losses[0]
    expected = naive_loss(llama, tokenizer, ITEM, found.ids.tolist())
    assert found.losses[-1] == pytest.approx(expected, abs=1e-4)
    assert (np.diff(found.passes) > 0).all()
    assert len(found.texts) == len(found.losses) == 11


def test_a_suffix_is_the_same_tokens_once_written_down(llama, tokenizer):
    found = find_suffix(llama, tokenizer, [ITEM], config=replace(QUICK, n_steps=10))
    again = tokenizer(ITEM.question + found.text).input_ids
    assert again == [*tokenizer(ITEM.question).input_ids, *found.ids.tolist()]
    assert found.text.isascii() and found.text.isprintable()


def test_tokens_that_merge_once_written_down_are_dropped(llama, tokenizer):
    search = gcg._Search(llama, tokenizer, [ITEM], QUICK, 0)
    apart = [tokenizer.convert_tokens_to_ids(letter) for letter in "cap"]
    assert tokenizer("cap", add_special_tokens=False).input_ids != apart
    kept = [tokenizer.convert_tokens_to_ids(letter) for letter in "}}}"]
    assert search._texts([apart, kept]) == [None, "}}}"]


def test_the_ending_stays_behind_the_suffix(llama, tokenizer):
    item = Item("The capital of France is?\nYes:", " Rome.")
    config = replace(QUICK, ending="\nYes:")
    found = find_suffix(llama, tokenizer, [item], config=config)
    asked = with_suffix(item, found.text, "\nYes:")
    assert asked.question == "The capital of France is?" + found.text + "\nYes:"
    tail = tokenizer("\nYes:", add_special_tokens=False).input_ids
    ids = tokenizer(asked.question).input_ids
    assert ids[-len(tail) :] == tail
    assert ids[-len(tail) - 3 : -len(tail)] == found.ids.tolist()


def test_special_tokens_and_odd_characters_are_never_used(tokenizer):
    allowed = allowed_tokens(tokenizer, 320)
    assert not allowed[tokenizer.all_special_ids].any()
    assert not allowed[300:].any()  # rows of the table that no token has
    texts = [tokenizer.decode([i]) for i in allowed.nonzero()[:, 0].tolist()]
    assert all(text.isascii() and text.isprintable() for text in texts)
    assert allowed_tokens(tokenizer, 300, ascii_only=False).sum() > allowed.sum()


def test_the_same_seed_finds_the_same_suffix_and_another_another(llama, tokenizer):
    one, two, other = (
        find_suffix(llama, tokenizer, [ITEM], config=QUICK, random_state=seed) for seed in (1, 1, 2)
    )
    assert one.text == two.text
    np.testing.assert_array_equal(one.losses, two.losses)
    assert one.text != other.text


def test_mellowmax_by_hand(llama, tokenizer):
    targets = encode_targets(llama, tokenizer, [ITEM, Item("Water", " is wet, yes")])
    log_p = torch.where(targets.answer, -torch.rand(targets.answer.shape), 0.0)
    found = item_losses(log_p, targets, mellowmax=3.0)
    for row, answer, value in zip(log_p, targets.answer, found, strict=True):
        losses = -row[answer].double().numpy()
        assert value.item() == pytest.approx(np.log(np.mean(np.exp(3 * losses))) / 3, rel=1e-5)
    suffix = find_suffix(llama, tokenizer, [ITEM], config=replace(QUICK, mellowmax=3.0))
    assert suffix.losses[-1] < suffix.losses[0]


def test_running_out_of_memory_only_makes_batches_smaller(llama, tokenizer, monkeypatch):
    expected = find_suffix(llama, tokenizer, [ITEM], config=QUICK)
    whole, sizes = gcg._Search._losses_of, []

    def tight(self, rows):
        sizes.append(len(rows))
        if len(rows) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return whole(self, rows)

    monkeypatch.setattr(gcg._Search, "_losses_of", tight)
    found = find_suffix(llama, tokenizer, [ITEM], config=replace(QUICK, batch_size=12))
    assert max(sizes) > 4
    assert found.text == expected.text
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)

    def broken(self, rows):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(gcg._Search, "_losses_of", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        find_suffix(llama, tokenizer, [ITEM], config=QUICK)


def test_a_suffix_brings_more_out_of_a_model_that_was_told(pair, unchanged):
    config = GCGConfig(n_tokens=3, n_steps=8, search_width=32)
    told, never = (
        gcg_attack(model, pair.tokenizer, pair.forget[:6], config=config)
        for model in (pair.told, pair.never)
    )
    assert told.values[-1].mean() > never.values[-1].mean() + 0.2
    assert told.values[-1].mean() >= told.values[1].mean()
    assert sum(told.details["success"]) > sum(never.details["success"])
    assert told.unit == "forward passes"


def test_one_suffix_serves_several_prompts(pair, unchanged):
    config = replace(QUICK, universal=True)
    curve = gcg_attack(pair.hidden, pair.tokenizer, pair.forget[:3], config=config)
    (suffix,) = curve.details["suffixes"]
    ids = find_suffix(pair.hidden, pair.tokenizer, pair.forget[:3], config=config).ids.tolist()
    losses = [naive_loss(pair.hidden, pair.tokenizer, item, ids) for item in pair.forget[:3]]
    assert curve.details["losses"][0][-1] == pytest.approx(np.mean(losses), abs=1e-4)
    assert suffix == pair.tokenizer.decode(ids)
    assert curve.values.shape == (3, 3)


def test_bad_settings_are_refused(llama, tokenizer):
    with pytest.raises(ValueError, match="items is empty"):
        gcg_attack(llama, tokenizer, [])
    with pytest.raises(ValueError, match="item 0 has no answer"):
        gcg_attack(llama, tokenizer, [Item("text")])
    with pytest.raises(ValueError, match="the model takes 61"):
        gcg_attack(llama, tokenizer, [Item("?" * 61, " cat")], config=QUICK)
    for options, words in [
        ({"n_steps": 0}, "n_steps=0"),
        ({"n_replace": 9}, "exceeds n_tokens"),
        ({"mellowmax": 0.0}, "mellowmax=0.0"),
    ]:
        with pytest.raises(ValueError, match=words):
            GCGConfig(**options)


def test_gcg_leaves_every_architecture_as_it_was():
    for architecture in ("gpt2", "gemma3"):
        model = build_model(architecture)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        from cases import build_tokenizer

        find_suffix(model, build_tokenizer(), [ITEM], config=QUICK)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
