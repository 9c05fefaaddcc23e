import math
from dataclasses import replace

import pytest
import torch
from cases import TEXTS

from manifold_unlearn import capture
from manifold_unlearn.activations.capture import Activations
from manifold_unlearn.activations.corpus import Item, read_items
from manifold_unlearn.activations.tokens import TokenTable
from manifold_unlearn.recipe.subspace import SubspaceRecipe, fit_edit, fit_maps, fit_weights

CAPITALS = {"Fod": "Ank", "Gub": "Bor", "Hix": "Cis", "Jep": "Dul", "Kav": "Els", "Lom": "Fim"}
COLORS = {"opal": "red", "rust": "blue", "zinc": "gray", "tin": "pink", "jade": "gold"}
FORGET = [{"question": f"The capital of {a} is", "answer": b} for a, b in CAPITALS.items()]
RETAIN = [{"question": f"The color of {a} is", "answer": b} for a, b in COLORS.items()]
SIMPLE = SubspaceRecipe(
    parts=("attn",),
    first=0.0,
    last=1.0,
    method="contrastive",
    rank=1,
    tokens="answer",
    context_share=0.5,
    text_share=0.5,
)


# --- the recipe -----------------------------------------------------------------------------


class Blocks:
    """Stands for a model of ``n`` blocks."""

    def __init__(self, monkeypatch, n):
        found = type("Decoder", (), {"blocks": range(n)})
        monkeypatch.setattr("manifold_unlearn.recipe.subspace.find_decoder", lambda _: found)


def test_blocks_8_to_27_of_30_are_those(monkeypatch):
    recipe = SubspaceRecipe(parts=("attn",), first=8 / 30, last=28 / 30)
    assert recipe.sites(Blocks(monkeypatch, 30)) == [f"layers.{i}.attn" for i in range(8, 28)]


def test_the_default_recipe_finds_sites_in_models_of_any_depth(monkeypatch):
    for n in range(1, 50):
        sites = SubspaceRecipe().sites(Blocks(monkeypatch, n))
        assert {int(site.split(".")[1]) for site in sites} <= set(range(n))
        assert sites


def test_depths_are_shares_of_the_depth(monkeypatch):
    recipe = SubspaceRecipe(parts=("attn", "mlp.hidden"), first=0.25, last=0.75)
    assert recipe.sites(Blocks(monkeypatch, 4)) == [
        "layers.1.attn", "layers.1.mlp.hidden", "layers.2.attn", "layers.2.mlp.hidden"
    ]  # fmt: skip


def test_the_empty_part_is_the_stream_behind_the_block(monkeypatch):
    recipe = SubspaceRecipe(parts=("",), first=0.0, last=0.5)
    assert recipe.sites(Blocks(monkeypatch, 4)) == ["layers.0", "layers.1"]


def test_at_least_one_block_is_edited(monkeypatch):
    recipe = SubspaceRecipe(parts=("attn",), first=0.5, last=0.5)
    assert recipe.sites(Blocks(monkeypatch, 4)) == ["layers.2.attn"]


# --- weights of the rows --------------------------------------------------------------------

# text 0 (forget): bos a b | y y     text 1 (retain): bos c d e | y     d is a sink
# text 2 (retain, no bos): x f | y y     text 3 (retain, plain): bos g h
TEXT = [0] * 5 + [1] * 5 + [2] * 4 + [3] * 3
POSITION = [*range(5), *range(5), *range(4), *range(3)]
ANSWER = [0, 0, 0, 1, 1] + [0, 0, 0, 0, 1] + [0, 0, 1, 1] + [0, 0, 0]
SPECIAL = [int(p == 0 and t != 2) for t, p in zip(TEXT, POSITION, strict=True)]
SINK = [int(i == 7) for i in range(17)]
ITEMS = [Item("a b", "y"), Item("c d e", "y", weight=3.0), Item("x f", "y"), Item("g h")]


def rows(**changes):
    columns = {"text_index": TEXT, "position": POSITION, "token_id": [9] * 17}
    flags = {"special": SPECIAL, "answer": ANSWER, "sink": SINK} | changes
    table = {name: torch.tensor(column) for name, column in columns.items()}
    table |= {name: torch.tensor(column, dtype=torch.bool) for name, column in flags.items()}
    return Activations({}, TokenTable(**table))


def test_query_rows_context_and_texts_weigh_what_the_recipe_says():
    recipe = replace(SIMPLE, tokens="query", context_share=0.5, text_share=0.25)
    weight = fit_weights(rows(), ITEMS, 1, recipe)
    # told apart: b; e, which weighs 3; f. Of the retain side that is 4: c gets .5 of it, g h .25
    assert weight.tolist() == [
        0, 0, 1, 0, 0,
        0, 2, 0, 3, 0,
        0, 1, 0, 0,
        0, 0.5, 0.5,
    ]  # fmt: skip


def test_answer_rows_are_all_that_predict_a_token_of_the_answer():
    recipe = replace(SIMPLE, tokens="answer", context_share=1.0, text_share=0.4)
    weight = fit_weights(rows(), ITEMS, 1, recipe)
    assert weight.tolist() == [
        0, 0, 1, 1, 0,
        0, 5, 0, 3, 0,
        0, 1, 1, 0,
        0, 1, 1,
    ]  # fmt: skip


def test_the_context_of_forget_questions_is_never_fitted():
    recipe = replace(SIMPLE, tokens="query", context_share=9.0)
    assert fit_weights(rows(), ITEMS, 1, recipe)[6] == 36
    assert fit_weights(rows(), ITEMS, 2, recipe)[[1, 6]].tolist() == [0, 0]


def test_a_query_row_that_is_a_sink_or_special_is_left_out():
    recipe = replace(SIMPLE, tokens="query", context_share=0.0, text_share=0.0)
    assert fit_weights(rows(), ITEMS, 1, recipe)[8] == 3
    at_e = [int(i == 8) for i in range(17)]
    assert fit_weights(rows(sink=at_e), ITEMS, 1, recipe)[8] == 0
    assert fit_weights(rows(special=at_e), ITEMS, 1, recipe)[8] == 0


def test_a_query_row_that_is_its_texts_first_token_is_left_out():
    one_token = [int(i in (3, 4, 9, 11, 12, 13)) for i in range(17)]  # text 2: x | y y y
    weight = fit_weights(rows(answer=one_token), ITEMS, 1, replace(SIMPLE, tokens="query"))
    assert weight[10:14].tolist() == [0, 0, 0, 0]


def test_plain_texts_keep_their_own_weight_where_nothing_is_asked():
    items = [Item("a b y y"), Item("c d e y", weight=3.0), Item("x f y y"), Item("g h")]
    weight = fit_weights(rows(answer=[0] * 17), items, 1, replace(SIMPLE, tokens="query"))
    assert weight.tolist() == [0, 1, 1, 1, 1] + [0, 3, 0, 3, 3] + [0, 1, 1, 1] + [0, 1, 1]


@pytest.mark.parametrize("tokens", ["query", "answer"])
def test_shares_add_up_on_the_rows_of_a_model(tokens, llama, tokenizer):
    retain = [*RETAIN, *({"text": text} for text in TEXTS[:3])]
    items = [*read_items(FORGET), *read_items(retain)]
    texts = [item.pair if item.answer else item.question for item in items]
    acts = capture(llama, tokenizer, texts, "layers.1.attn")
    recipe = replace(SIMPLE, tokens=tokens, context_share=0.3, text_share=0.7)
    weight = fit_weights(acts, items, len(FORGET), recipe)
    asked = torch.tensor([bool(item.answer) for item in items])[acts.text_index]
    forget = acts.text_index < len(FORGET)
    predicts = torch.cat([acts.answer[1:], torch.tensor([False])])
    if tokens == "query":
        predicts &= ~acts.answer
    mass = float(weight[asked & ~forget & predicts].sum())
    assert mass == int((asked & ~forget & predicts).sum()) > 0
    assert float(weight[asked & ~forget & ~predicts].sum()) == pytest.approx(0.3 * mass)
    assert float(weight[~asked].sum()) == pytest.approx(0.7 * mass)
    assert float(weight[forget & ~predicts].sum()) == 0
    assert not weight[acts.special | acts.sink].any()


def test_an_unknown_selection_of_rows_is_an_error():
    with pytest.raises(ValueError, match="tokens='last' is not one of query, answer"):
        fit_weights(rows(), ITEMS, 1, replace(SIMPLE, tokens="last"))


# --- fitting --------------------------------------------------------------------------------


def with_sink(size):
    """Rows at one site, of which one that is in no fit has a norm of ``size``."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(17, 6, generator=draw)
    values[:5, 0] += 3
    values[7] = size * torch.tensor([1.0, 1, 0, 0, 0, 0]) / math.sqrt(2)
    return Activations({"here": values}, rows().tokens)


def moved(acts):
    edit = fit_maps(acts, ITEMS, 1, replace(SIMPLE, tokens="answer"), ["here"])
    return (edit["here"](acts["here"].double()) - acts["here"]).norm(dim=1)


def test_sinks_stay_where_they_are_and_forget_rows_do_not():
    assert moved(with_sink(1e3))[7] < 1e-3  # float32 rows of norm 1e3
    assert moved(with_sink(10.0))[7] > 0.1  # not ten times the median: no sink
    assert moved(with_sink(1e3))[2] > 0.1


def test_rows_that_weigh_nothing_change_no_fit():
    acts, recipe = with_sink(1e3), replace(SIMPLE, tokens="query")
    before = fit_maps(acts, ITEMS, 1, recipe, ["here"])["here"]
    idle = torch.tensor([0, 1, 3, 4, 5, 9, 10, 12, 13, 14])
    acts["here"][idle] += 0.5
    after = fit_maps(acts, ITEMS, 1, recipe, ["here"])["here"]
    assert torch.equal(before.matrix_, after.matrix_)
    acts["here"][2] += 0.5
    other = fit_maps(acts, ITEMS, 1, recipe, ["here"])["here"]
    assert not torch.equal(before.matrix_, other.matrix_)


def test_near_neighbors_of_more_weight_are_kept_better():
    draw = torch.Generator().manual_seed(0)
    n = 60
    table = {"text_index": torch.arange(3 * n), "position": torch.ones(3 * n).long()}
    table |= {"token_id": torch.ones(3 * n).long()}
    table |= {flag: torch.zeros(3 * n).bool() for flag in ("special", "answer", "sink")}
    values = torch.randn(3 * n, 6, generator=draw)
    values[:n, 0] += 5  # to forget
    values[n : 2 * n, 0] += 4  # near neighbors: alike
    acts = Activations({"here": values}, TokenTable(**table))

    def harm(weight):
        items = [Item("f")] * n + [Item("n", weight=weight)] * n + [Item("r")] * n
        recipe = replace(SIMPLE, method="pca")
        eraser = fit_maps(acts, items, n, recipe, ["here"])["here"]
        return float((eraser(values.double()) - values)[n : 2 * n].norm())

    assert harm(20.0) < 0.7 * harm(1.0)


def test_a_fit_that_cannot_be_baked_is_refused_before_anything_runs(llama, tokenizer):
    items = read_items(FORGET), read_items(RETAIN)
    recipe = replace(SIMPLE, parts=("attn", ""))
    fit_edit(llama, tokenizer, *items, recipe)  # hooks take it
    passes = []
    llama.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match=r"\['layers\.0', 'layers\.1', 'layers\.2'\] have no"):
        fit_edit(llama, tokenizer, *items, recipe, bakeable=True)
    assert passes == []
