import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from manifold_unlearn.activations.capture import capture
from manifold_unlearn.activations.tokens import encode
from manifold_unlearn.dictionary import SparseAutoencoder, SparseCode
from manifold_unlearn.dictionary.coding import select_rows
from manifold_unlearn.dictionary.contexts import ContextFinder
from manifold_unlearn.dictionary.corpus import CorpusCode, TokenTable, corpus_codes
from manifold_unlearn.dictionary.importance import latent_importance
from manifold_unlearn.dictionary.labels import NOTHING, _best_terms, judged_labels, label_latents
from manifold_unlearn.dictionary.settings import DictionaryTraining
from manifold_unlearn.dictionary.token_traits import Trait, token_traits
from manifold_unlearn.dictionary.train import train_dictionaries

PHRASE = "the sea is cold and the River runs to a mill , walking 3 sailors sing ; no one went"
N_TEXTS = 160


@pytest.fixture(scope="module")
def corpus(tokenizer):
    """Texts of words drawn at random, and latents whose rule is known."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(PHRASE.split(), 14)) for _ in range(N_TEXTS)]
    topics = [("rivers", "towns", "")[i % 3] for i in range(N_TEXTS)]
    rows = encode(tokenizer, texts)
    lengths = torch.tensor([len(row) for row in rows])
    tokens = TokenTable(
        text_index=torch.arange(N_TEXTS).repeat_interleave(lengths),
        position=torch.cat([torch.arange(n) for n in lengths]),
        token_id=torch.cat([row.ids for row in rows]),
        special=torch.cat([row.special for row in rows]),
        answer=torch.cat([row.answer for row in rows]),
        sink=torch.zeros(int(lengths.sum()), dtype=torch.bool),
    )
    return tokens, topics


def planted(tokens, topics, tokenizer):
    """Rules as boolean columns, written on the decoded tokens."""
    said = np.array([tokenizer.decode([i]) for i in tokens.token_id.tolist()])
    text, position = tokens.text_index.numpy(), tokens.position.numpy()
    previous = np.where(position > 0, np.roll(said, 1), "")
    random = np.random.default_rng(1)
    frequent = [s for s in np.unique(said[position > 0]) if 0.02 < (said == s).mean() < 0.08][:3]
    rules = {
        "one": said == frequent[0],
        "two": np.isin(said, frequent[:2]),
        "after": previous == frequent[2],
        "number": np.char.isdigit(np.char.strip(said)),
        "punctuation": np.isin(np.char.strip(said), [",", ";"]),
        "third": position == 3,
        "topic": np.array([topics[i] == "towns" for i in text]),
        "chance": random.uniform(size=len(said)) < 0.05,
        "dense": random.uniform(size=len(said)) < 0.9,
        "silent": np.zeros(len(said), dtype=bool),
    }
    return rules, frequent, said


@pytest.fixture(scope="module")
def labeled(corpus, tokenizer):
    tokens, topics = corpus
    rules, frequent, _ = planted(tokens, topics, tokenizer)
    random = np.random.default_rng(2)
    fires = np.stack(list(rules.values()), 1)
    missed = random.uniform(size=fires.shape) < 0.1  # each latent misses a tenth of its tokens
    missed[:, list(rules).index("dense")] = False
    values = fires * ~missed * random.uniform(0.5, 1, fires.shape)
    code = CorpusCode(SparseCode.of(torch.from_numpy(values)), tokens)
    found = label_latents(code, tokenizer, topics=topics, random_state=0)
    return dict(zip(rules, found, strict=True)), frequent, code


def test_planted_rules_are_found_and_measured(labeled):
    found, frequent, _ = labeled
    assert found["one"].family == "token"
    assert found["one"].terms == (f'"{frequent[0]}"',)
    assert found["one"].text == f'token "{frequent[0]}"'
    assert set(found["two"].terms) == {f'"{s}"' for s in frequent[:2]}
    assert (found["after"].family, found["after"].terms) == ("previous", (f'"{frequent[2]}"',))
    assert found["third"].text == "position 3"
    assert found["topic"].text == "topic towns"
    for name in ("one", "two", "after", "number", "punctuation", "third", "topic"):
        assert found[name].precision == pytest.approx(0.9, abs=0.1)  # 100 tokens or more: 0.03
        assert found[name].recall == pytest.approx(1, abs=0.01)
        assert found[name].f1 > found[name].control + 0.2
    json.dumps([one.to_json() for one in found.values()])


def test_nothing_is_said_where_nothing_beats_the_control(labeled):
    found, _, _ = labeled
    for name in ("chance", "dense", "silent"):
        assert found[name].text == NOTHING
        assert found[name].terms == ()
    assert found["dense"].f1 > 0.6  # any rule of many tokens does well, and so does the control
    assert found["dense"].control > 0.6
    assert found["silent"].f1 == found["silent"].n_fires == 0


def test_a_rule_for_strong_firing_is_asked_for(labeled, corpus, tokenizer):
    _, frequent, code = labeled
    tokens, topics = corpus
    rules, _, _ = planted(tokens, topics, tokenizer)
    weak = np.random.default_rng(3).uniform(size=len(tokens)) < 0.3
    values = np.maximum(rules["one"] * 1.0, weak * 0.2)[:, None]
    both = CorpusCode(SparseCode.of(torch.from_numpy(values)), tokens)
    (any_firing,) = label_latents(both, tokenizer, n_shuffles=3)
    (strong,) = label_latents(both, tokenizer, strength=0.5, latents=[77], n_shuffles=3)
    assert strong.text == f'token "{frequent[0]}"'
    assert strong.latent == 77
    assert strong.f1 == 1
    assert any_firing.f1 < 0.7


def test_terms_are_the_best_that_any_set_is():
    random = np.random.default_rng(4)
    for trial in range(30):
        size, fires = 7, np.array([40, 25])
        totals = random.integers(2, 30, size)
        hits = np.stack([random.integers(2, np.minimum(totals, 12) + 1) for _ in range(2)])
        keys = np.arange(2 * size)
        limit = 1 + trial % 4
        chosen = keys[_best_terms(keys, hits.ravel(), totals, fires, limit)]
        for latent in range(2):
            best = max(
                2 * hits[latent, list(s)].sum() / (fires[latent] + totals[list(s)].sum())
                for k in range(limit + 1)
                for s in itertools.combinations(range(size), k)
            )
            mine = chosen[chosen // size == latent] % size
            got = 2 * hits[latent, mine].sum() / (fires[latent] + totals[mine].sum())
            assert got == pytest.approx(best)
            assert len(mine) <= limit


def test_a_rare_feature_is_labeled_from_few_tokens(tokenizer):
    """It fires on 8 of 4800 tokens."""
    random = np.random.default_rng(6)
    n = 4800
    ids = torch.from_numpy(random.integers(10, 200, n))
    rare = torch.from_numpy(random.choice(n // 12, 8, replace=False)) * 12 + 5
    ids[rare] = 250
    no = torch.zeros(n, dtype=torch.bool)
    tokens = TokenTable(torch.arange(n) // 12, torch.arange(n) % 12, ids, no, no, no)
    code = CorpusCode(SparseCode.of((ids == 250).float()[:, None]), tokens)
    (found,) = label_latents(code, tokenizer)
    assert (found.family, found.n_fires, found.f1) == ("token", 8, 1)


def test_traits_are_what_their_names_say(corpus, tokenizer):
    tokens, topics = corpus
    traits = token_traits(tokens, tokenizer, topics=topics)
    said = [tokenizer.decode([i]) for i in tokens.token_id.tolist()]

    def names(family):
        found = []
        for trait in traits:
            if trait.family == family:
                found.append([None if v < 0 else trait.names[v] for v in trait.value])
        return found

    (own,), (before,), (after,), (word,) = map(names, ("token", "previous", "next", "word"))
    text = tokens.text_index.tolist()
    for i in range(200):
        inside = i > 0 and text[i] == text[i - 1]
        assert own[i] == f'"{said[i]}"'
        assert before[i] == (f'"{said[i - 1]}"' if inside else None)
        assert after[i] == (f'"{said[i + 1]}"' if text[i] == text[i + 1] else None)
        assert names("bigram")[0][i] == (f'"{said[i - 1]}{said[i]}"' if inside else None)
        assert word[i] == (f'"{said[i].strip().casefold()}"' if said[i].strip() else None)
    assert {"punctuation", "number", "capitalized"} <= set(names("kind")[0])
    assert set(names("start")[0]) == {"begins a word", "goes on with a word", None}
    assert names("topic")[0][0] == "rivers"
    assert names("topic")[0][-1] == {"": None}.get(topics[-1], topics[-1])
    assert sum(end is not None for end in names("end")[0]) == N_TEXTS
    for suffix, token in zip(names("suffix")[0], said, strict=True):
        if suffix is not None:
            assert token.strip().casefold().endswith(suffix.strip('"-'))


def test_own_traits_and_a_judge_can_be_given(labeled, corpus, tokenizer):
    _, frequent, code = labeled
    tokens, _ = corpus
    odd = Trait("text", (tokens.text_index % 2).numpy(), ("even", "odd"))
    fires = (tokens.text_index % 2 == 1).double()[:, None]
    own = CorpusCode(SparseCode.of(fires), tokens)
    (found,) = label_latents(own, None, traits=[odd], n_shuffles=3)
    assert found.text == "text odd"
    finder = ContextFinder(range(10), n_top=4)
    finder.add(code.code, tokens, code.counted)
    contexts = finder.result(tokenizer)
    said = judged_labels(contexts, lambda shown: f" fires on {shown[0].tokens[shown[0].at]}\n", n=3)
    assert said[0] == f"fires on {frequent[0]}".strip()
    assert 9 not in said
    with pytest.raises(ValueError, match="the judge answered int for latent 0"):
        judged_labels(contexts, len, latents=[0])
    with pytest.raises(ValueError, match="latent 9 never fires"):
        judged_labels(contexts, str, latents=[9])


@pytest.mark.slow
def test_the_latents_of_a_forget_set_are_labeled_with_its_names(tiny_testbed):
    world, model, tokenizer = tiny_testbed.world, tiny_testbed.told, tiny_testbed.tokenizer
    texts = [item.text for item in world.forget + world.retain]
    sae = SparseAutoencoder(96, 512, {"name": "topk", "k": 16}, random_state=0)
    acts = capture(model, tokenizer, texts, "layers.2")
    rows = acts["layers.2"][acts.position > 0]
    train_dictionaries(sae, rows, DictionaryTraining(n_steps=400, lr=3e-3, batch_size=512))
    found = corpus_codes(model, tokenizer, texts, sae, "layers.2")
    forget = (found.tokens.text_index < len(world.forget)) & found.counted
    sides = (select_rows(found.code, part) for part in (forget, found.counted & ~forget))
    importance = latent_importance(*sides, sae.W_dec)
    ranked = importance.top(by="z", max_retain_frequency=0.05)
    labels = label_latents(found, tokenizer, strength=0.5)
    names = {name for item in world.forget for name in item.topic.split()}
    named = [any(name in labels[i].text for name in names) for i in ranked]
    assert sum(named[:20]) >= 8
    assert sum(named[-20:]) <= 3
    mixed = torch.randperm(found.code.n_rows, generator=torch.Generator().manual_seed(0))
    code = replace(found.code, row=mixed[found.code.row])
    assert not any(one.terms for one in label_latents(CorpusCode(code, found.tokens), tokenizer))


def test_labels_reject(corpus, tokenizer):
    tokens, _ = corpus
    code = CorpusCode(SparseCode.of(torch.ones(len(tokens), 1)), tokens)
    for change, message in (
        ({"max_terms": 0}, "max_terms=0"),
        ({"strength": 1}, r"strength=1 in \[0, 1\)"),
        ({"latents": [1, 2]}, "2 numbers in latents for the 1"),
        ({"topics": ["a"]}, "1 topics for 160 texts"),
        ({"traits": [Trait("x", np.zeros(3, int), ("a",))]}, "traits must hold at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            label_latents(code, tokenizer, **change)
    few = tokens.text_index < 3
    part = TokenTable(**{k: v[few] for k, v in vars(tokens).items()})
    with pytest.raises(ValueError, match="3 texts make no 4 folds"):
        label_latents(CorpusCode(SparseCode.of(torch.ones(len(part), 1)), part), tokenizer)
