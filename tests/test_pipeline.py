import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import HIDDEN, TEXTS, WIDTH, build_model, hooks, logits, same_state, state
from transformers import AutoModelForCausalLM, AutoTokenizer

from manifold_unlearn import Edit, bake, intervene, unlearn
from manifold_unlearn.activations.corpus import read_items
from manifold_unlearn.evaluate import answer_log_probabilities, plain
from manifold_unlearn.finetune import TrainConfig
from manifold_unlearn.pipeline import compare
from manifold_unlearn.recipe.subspace import SubspaceRecipe

CAPITALS = {"Fod": "Ank", "Gub": "Bor", "Hix": "Cis", "Jep": "Dul", "Kav": "Els", "Lom": "Fim"}
COLORS = {"opal": "red", "rust": "blue", "zinc": "gray", "tin": "pink", "jade": "gold"}
FORGET = [{"question": f"The capital of {a} is", "answer": b} for a, b in CAPITALS.items()]
RETAIN = [{"question": f"The color of {a} is", "answer": b} for a, b in COLORS.items()]
NEUTRAL = ["Water boils when it is hot.", "A quick brown fox jumps."]
# nothing is left to the defaults, which a sweep may choose anew
RECIPE = SubspaceRecipe(
    parts=("attn",),
    first=0.0,
    last=1.0,
    method="contrastive",
    rank=2,
    tokens="answer",  # three narrow blocks know a fact by all the tokens of its answer
    context_share=0.5,
    text_share=0.5,
)
SIMPLE = replace(RECIPE, rank=1)


def taught(tokenizer, facts, *, steps=100, **changes):
    """Tiny Llama that was trained to answer the facts; takes a second."""
    model = build_model("llama", **changes)
    rows = []
    for fact in facts:
        prompt = tokenizer(fact["question"]).input_ids
        answer = tokenizer(f" {fact['answer']}</s>", add_special_tokens=False).input_ids
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [2] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([wanted + [-100] * (width - len(wanted)) for _, wanted in rows])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4 if parameter.ndim > 1 else 1)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=(ids != 2).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def knowing(tokenizer):
    """A model that knows the facts; no test may change it."""
    return taught(tokenizer, [*FORGET, *RETAIN])


@pytest.fixture(scope="module")
def hooked(knowing, tokenizer):
    return unlearn(knowing, tokenizer, FORGET, RETAIN, recipe=RECIPE, neutral=NEUTRAL)


@pytest.fixture(scope="module")
def baked(knowing, tokenizer):
    return unlearn(knowing, tokenizer, FORGET, RETAIN, recipe=RECIPE, neutral=NEUTRAL, bake=True)


def ids_of(tokenizer, text="The capital of Fod is Ank"):
    return torch.tensor([tokenizer(text).input_ids])


def strict(path):
    """JSON that has no word for NaN or infinity."""

    def refuse(word):
        raise AssertionError(f"{path} holds {word}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


# --- forgetting -----------------------------------------------------------------------------


def test_the_model_forgets_one_set_and_keeps_the_other(hooked):
    forget, retain = (hooked.changes[name]["probability"] for name in ("forget", "retain"))
    assert forget.before.mean > 0.95  # it knew
    assert retain.before.mean > 0.95
    assert forget.kept < 0.4
    assert retain.kept > 0.9


def test_what_is_kept_depends_on_which_set_is_which(knowing, tokenizer):
    result = unlearn(knowing, tokenizer, RETAIN, FORGET, recipe=replace(RECIPE, rank=4))
    assert result.changes["forget"]["probability"].kept < 0.6
    assert result.changes["retain"]["probability"].kept > 0.9


def test_greedy_answers_are_lost_with_the_probability(hooked):
    forget, retain = (hooked.changes[name]["rouge_l_recall"] for name in ("forget", "retain"))
    assert forget.before.mean == retain.before.mean == 1.0
    assert forget.after.mean < 0.6
    assert retain.after.mean == 1.0


def test_the_given_model_is_never_touched(tokenizer):
    for baking in (False, True):
        model = build_model("llama")
        model.train()
        before = state(model)
        result = unlearn(model, tokenizer, FORGET, RETAIN, recipe=RECIPE, bake=baking)
        assert same_state(model, before)
        assert hooks(model) == 0
        assert model.training
        assert (result.model is model) != baking


def test_a_baked_edit_measures_as_the_hooked_one(hooked, baked):
    for name in ("forget", "retain"):
        for metric, change in hooked.changes[name].items():
            other = baked.changes[name][metric]
            np.testing.assert_allclose(other.after.values, change.after.values, atol=1e-4)
            np.testing.assert_array_equal(other.before.values, change.before.values)
    for key, value in hooked.metrics["neutral"].items():
        assert baked.metrics["neutral"][key] == pytest.approx(value, rel=1e-3, abs=1e-5)


def test_both_ways_to_hold_the_edit_answer_alike(hooked, baked, knowing, tokenizer):
    ids = ids_of(tokenizer)
    before = logits(knowing, ids)
    with hooked.active() as model:
        in_force = logits(model, ids)
    with baked.active() as model:
        torch.testing.assert_close(logits(model, ids), in_force, atol=1e-4, rtol=0)
    assert not torch.allclose(in_force, before, atol=0.1)
    assert torch.equal(logits(knowing, ids), before)  # the block is closed
    assert hooks(baked.model) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("part", ["attn", "mlp", "mlp.hidden"])
def test_every_part_that_bakes_bakes_as_it_hooks(name, part, tokenizer):
    model = build_model(name)
    recipe = replace(SIMPLE, parts=(part,))
    result = unlearn(model, tokenizer, FORGET, RETAIN, recipe=recipe, bake=True, generate=False)
    ids = ids_of(tokenizer)
    with intervene(model, result.edit):
        wanted = logits(model, ids)
    torch.testing.assert_close(logits(result.model, ids), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(wanted, logits(model, ids), atol=0.1)
    width = HIDDEN if part == "mlp.hidden" else WIDTH
    assert {m.read.shape for m in result.edit.values()} == {(width, 1)}


def test_an_architecture_without_biases_bakes_a_fit_without_bias(tokenizer):
    model = build_model("qwen2")
    how = {"recipe": SIMPLE, "generate": False}
    result = unlearn(model, tokenizer, FORGET, RETAIN, bake=True, **how)
    assert not any(m.bias_.any() for m in result.edit.values())
    assert result.model.model.layers[0].self_attn.o_proj.bias is None
    free = unlearn(model, tokenizer, FORGET, RETAIN, **how)
    assert all(m.bias_.any() for m in free.edit.values())  # hooks have room for one


def test_an_architecture_with_room_for_biases_keeps_them(tokenizer):
    model = build_model("llama")
    result = unlearn(model, tokenizer, FORGET, RETAIN, recipe=SIMPLE, bake=True, generate=False)
    assert all(m.bias_.any() for m in result.edit.values())
    assert result.model.config.attention_bias is True
    assert model.config.attention_bias is False


def test_a_stream_site_is_edited_by_hooks_and_refuses_to_bake(llama, tokenizer):
    recipe = replace(SIMPLE, parts=("",))
    result = unlearn(llama, tokenizer, FORGET, RETAIN, recipe=recipe, generate=False)
    assert list(result.edit) == ["layers.0", "layers.1", "layers.2"]
    with pytest.raises(ValueError, match=r"'layers\.0'.* have no exact weight edit"):
        unlearn(llama, tokenizer, FORGET, RETAIN, recipe=recipe, bake=True)


def test_plain_texts_can_be_forgotten_and_kept(llama, tokenizer):
    result = unlearn(llama, tokenizer, TEXTS[::2], [TEXTS[1], TEXTS[4][:20]], recipe=SIMPLE)
    assert set(result.changes["forget"]) == {"probability"}
    assert len(result.changes["forget"]["probability"].before.values) == 3


def test_texts_among_questions_are_measured_apart(llama, tokenizer):
    items = read_items([*RETAIN, TEXTS[0]])
    changes = compare(plain(llama), plain(llama), tokenizer, items, generate=False)
    assert len(changes["probability"].before.values) == len(RETAIN)
    assert len(changes["probability_of_text"].before.values) == 1


# --- options --------------------------------------------------------------------------------


def test_a_template_makes_prompts_of_questions_once_in_every_set(llama, tokenizer):
    template = "Q: {question} A:"
    worded = [
        [{**fact, "question": f"Q: {fact['question']} A:"} for fact in facts]
        for facts in (FORGET, RETAIN)
    ]
    how = {"recipe": SIMPLE, "generate": False}
    seen = {"near": RETAIN[:2]}
    found = unlearn(llama, tokenizer, FORGET, RETAIN, template=template, evaluate_on=seen, **how)
    wanted = unlearn(llama, tokenizer, *worded, evaluate_on={"near": worded[1][:2]}, **how)
    for was, now in zip(wanted.edit.values(), found.edit.values(), strict=True):
        assert torch.equal(was.matrix_, now.matrix_)
    for part in ("before", "after"):
        was, now = (getattr(r.changes["near"]["probability"], part) for r in (wanted, found))
        np.testing.assert_array_equal(was.values, now.values)
    without = unlearn(llama, tokenizer, FORGET, RETAIN, evaluate_on=seen, **how)
    assert without.changes["near"]["probability"].before.mean != (
        found.changes["near"]["probability"].before.mean
    )


def test_only_the_sets_asked_for_are_measured(hooked, knowing, tokenizer):
    assert list(hooked.changes) == ["forget", "retain"]
    result = unlearn(
        knowing, tokenizer, FORGET, RETAIN, recipe=RECIPE, generate=False,
        evaluate_on={"near": RETAIN[:2]},
    )  # fmt: skip
    assert list(result.changes) == ["near"]
    assert result.metrics["counts"] == {"near": 2}
    assert "rouge_l_recall" not in result.changes["near"]


def test_the_end_token_counts_where_asked(knowing, tokenizer):
    how = {"recipe": RECIPE, "generate": False, "include_eos": True}
    change = unlearn(knowing, tokenizer, FORGET, RETAIN, **how).changes["retain"]["probability"]
    pairs = [item.pair for item in read_items(RETAIN)]
    wanted = answer_log_probabilities(plain(knowing), tokenizer, pairs, include_eos=True)
    wanted = [float(p.mean().exp()) for p in wanted]
    np.testing.assert_allclose(change.before.values, wanted, rtol=1e-5)  # float32
    without = answer_log_probabilities(plain(knowing), tokenizer, pairs)
    assert not np.allclose([float(p.mean().exp()) for p in without], wanted, rtol=1e-4)


def test_generators_and_files_are_read_like_lists(hooked, knowing, tokenizer, tmp_path):
    path = tmp_path / "retain.jsonl"
    path.write_text("\n".join(map(json.dumps, RETAIN)), encoding="utf-8")
    result = unlearn(knowing, tokenizer, iter(FORGET), path, recipe=RECIPE, generate=False)
    for site in hooked.edit:
        assert torch.equal(result.edit[site].matrix_, hooked.edit[site].matrix_)


# --- what is measured and saved -------------------------------------------------------------


def test_metrics_say_what_was_done(hooked, baked):
    assert hooked.metrics["config"]["sites"] == [f"layers.{i}.attn" for i in range(3)]
    assert hooked.metrics["config"]["recipe"]["rank"] == 2
    assert hooked.metrics["counts"] == {"forget": 6, "retain": 5}
    assert (hooked.metrics["config"]["baked"], baked.metrics["config"]["baked"]) == (False, True)
    assert list(hooked.metrics["seconds"]) == ["fit", "evaluate"]
    assert list(baked.metrics["seconds"]) == ["fit", "bake", "evaluate"]
    entry = hooked.metrics["sets"]["forget"]["probability"]
    assert entry["kept"] == pytest.approx(entry["after"]["mean"] / entry["before"]["mean"])


def test_neutral_text_is_measured_before_and_after(hooked, knowing, tokenizer):
    quiet = hooked.metrics["neutral"]
    ids = [ids_of(tokenizer, text) for text in NEUTRAL]

    def log_p(model):
        every = [logits(model, row).log_softmax(-1)[0, :-1] for row in ids]
        return every, torch.cat([r.gather(1, i[0, 1:, None]) for r, i in zip(every, ids)])  # noqa: B905

    before, said = log_p(knowing)
    with intervene(knowing, hooked.edit):
        after, said_after = log_p(knowing)
    kl = torch.cat([(b.exp() * (b - a)).sum(-1) for b, a in zip(before, after, strict=True)])
    assert quiet["perplexity_before"] == pytest.approx(float((-said.mean()).exp()), rel=1e-4)
    assert quiet["perplexity_after"] == pytest.approx(float((-said_after.mean()).exp()), rel=1e-4)
    ratio = quiet["perplexity_after"] / quiet["perplexity_before"]
    assert quiet["perplexity_ratio"] == pytest.approx(ratio)
    assert quiet["kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert quiet["kl"] > 1e-4


def test_without_neutral_text_there_is_none_measured(knowing, tokenizer):
    result = unlearn(knowing, tokenizer, FORGET, RETAIN, recipe=RECIPE, generate=False)
    assert result.metrics["neutral"] is None


def test_plain_transformers_loads_what_was_baked(baked, tmp_path, tokenizer):
    baked.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edit", "metrics.json", "model"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = ids_of(tokenizer)
    assert torch.equal(logits(loaded, ids), logits(baked.model, ids))
    its_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert its_tokenizer(TEXTS).input_ids == tokenizer(TEXTS).input_ids


def test_a_saved_edit_gives_the_hooked_answers(hooked, knowing, tmp_path, tokenizer):
    hooked.save(tmp_path / "deep" / "out")
    names = sorted(p.name for p in (tmp_path / "deep" / "out").iterdir())
    assert names == ["edit", "metrics.json"]  # a model only where it was edited
    ids = ids_of(tokenizer)
    with hooked.active() as model:
        wanted = logits(model, ids)
    edit = Edit.load(tmp_path / "deep" / "out" / "edit")
    with intervene(knowing, edit):
        # the maps are the same to the bit; how they lie in memory is not, and products round
        torch.testing.assert_close(logits(knowing, ids), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(bake(knowing, edit), ids), wanted, atol=1e-4, rtol=0)


def test_a_gradient_baseline_trains_a_copy_and_saves_it(knowing, tokenizer, tmp_path):
    before = state(knowing)
    training = TrainConfig(lr=2e-3, steps=12, batch_size=6)
    result = unlearn(
        knowing, tokenizer, FORGET, RETAIN, method="graddiff", training=training, generate=False
    )
    assert same_state(knowing, before)
    assert result.edit is None and result.baked
    kept = {name: change["probability"].kept for name, change in result.changes.items()}
    assert kept["forget"] < 0.3 < 0.8 < kept["retain"]
    assert result.metrics["config"]["training"]["steps"] == 12
    json.dumps(result.metrics, allow_nan=False)
    result.save(tmp_path)
    assert not (tmp_path / "edit").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = tokenizer("The capital of Fod is", return_tensors="pt").input_ids
    torch.testing.assert_close(logits(loaded, ids), logits(result.model, ids))
    with result.active() as model:
        assert model is result.model


def test_saving_twice_leaves_the_second_result(baked, hooked, tmp_path):
    hooked.save(tmp_path)
    baked.save(tmp_path)
    baked.save(tmp_path)
    assert strict(tmp_path / "metrics.json")["config"]["baked"] is True
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edit", "metrics.json", "model"]


def test_metrics_are_strict_json_also_where_nothing_was_known(llama, tokenizer, tmp_path):
    result = unlearn(llama, tokenizer, FORGET, RETAIN, recipe=SIMPLE)
    assert math.isnan(result.changes["forget"]["rouge_l_recall"].kept)  # 0 / 0
    result.save(tmp_path)
    saved = strict(tmp_path / "metrics.json")
    assert saved["sets"]["forget"]["rouge_l_recall"]["kept"] is None
    assert saved == json.loads(json.dumps(result.metrics))


# --- errors ---------------------------------------------------------------------------------


def broken(llama):
    """The model with a weight of the second block's attention not finite."""
    with torch.no_grad():
        llama.model.layers[1].self_attn.o_proj.weight[3, 5] = float("nan")
    return llama


LONG = {"question": "The capital of Fod is" + " is" * 100, "answer": "Ank"}

MISTAKES = {
    "no forget items": ({"forget": []}, "the forget set is empty"),
    "no retain items": ({"retain": []}, "the retain set is empty"),
    "a set to measure is empty": ({"evaluate_on": {"near": []}}, "the near set is empty"),
    "a part that does not exist": (
        {"recipe": replace(SIMPLE, parts=("attention",))},
        r"no site 'layers\.0\.attention'.*layers\.0 to layers\.2.*Near it:",
    ),
    "a part that does not exist, baked": (
        {"recipe": replace(SIMPLE, parts=("attention",), first=0.4), "bake": True},
        r"no site 'layers\.1\.attention'",
    ),
    "sets that share texts": (
        {"retain": [*RETAIN, FORGET[2]]},
        "forget and retain share 1 texts, one is 'The capital of Hix is Cis'",
    ),
    "a rank above the width": (
        {"recipe": replace(SIMPLE, rank=WIDTH + 1)},
        f"rank={WIDTH + 1} is above the data's",
    ),
    "a rank above what the method finds": (
        {"recipe": replace(SIMPLE, rank=2, method="leace")},
        r"rank=2 is above the data's: method='leace' finds 1 direction",
    ),
    "a forget text longer than the context": (
        {"forget": [*FORGET, LONG]},
        r"text 6 \('The capital of Fod is.*tokens; the model takes 64",
    ),
    "a text to measure longer than the context": (
        {"evaluate_on": {"near": [LONG]}},
        "tokens; the model takes 64",
    ),
    "a template without a place": ({"template": "Q:"}, "has no {question}"),
    "an unknown method": ({"method": "amnesia"}, "method='amnesia' is not one of subspace"),
    "an unknown eraser": (
        {"recipe": replace(SIMPLE, method="amnesia")},
        "method='amnesia' is not one of mean_difference",
    ),
    "a record without an answer": (
        {"forget": [FORGET[0], {"question": "Who?"}]},
        r"forget\[1\] has answer=None",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_leaves_the_model_alone(mistake, llama, tokenizer):
    changes, message = MISTAKES[mistake]
    before = state(llama)
    sets = {"forget": FORGET, "retain": RETAIN} | changes
    with pytest.raises(ValueError, match=message):
        unlearn(llama, tokenizer, **sets)
    assert same_state(llama, before)
    assert hooks(llama) == 0


def test_the_same_call_without_a_mistake_raises_nothing(llama, tokenizer):
    unlearn(llama, tokenizer, FORGET, RETAIN, generate=False)


def test_activations_that_are_not_finite_name_site_and_text(llama, tokenizer):
    message = r"site 'layers\.1\.attn' contains NaN or infinity.*It belongs to text 0"
    with pytest.raises(ValueError, match=message):
        unlearn(broken(llama), tokenizer, FORGET, RETAIN)
    assert hooks(llama) == 0


def test_an_unbaked_edit_is_not_saved_beside_the_model_of_another(hooked, baked, tmp_path):
    baked.save(tmp_path)
    old = (tmp_path / "metrics.json").read_bytes()
    with pytest.raises(FileExistsError, match="from a baked run"):
        hooked.save(tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == old
