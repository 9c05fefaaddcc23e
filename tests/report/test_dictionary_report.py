import base64
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from manifold_unlearn.activations.tokens import TokenTable
from manifold_unlearn.dictionary import SparseAutoencoder, SparseCode
from manifold_unlearn.dictionary.cards import feature_cards
from manifold_unlearn.dictionary.contexts import ContextFinder
from manifold_unlearn.dictionary.corpus import CorpusCode
from manifold_unlearn.dictionary.effects import logit_effects
from manifold_unlearn.dictionary.labels import label_latents
from manifold_unlearn.report import dictionary
from manifold_unlearn.report.dashboard import FeatureDashboard
from manifold_unlearn.report.neuronpedia import (
    attribution_feature,
    neuronpedia_batch,
    neuronpedia_feature,
    save_json,
)

ATTACK = "</title><script>alert('1')</script><img src=x onerror=alert(1)>\" & '"
N_TEXTS, LENGTH, M = 40, 12, 8


class Page(HTMLParser):
    """Tags and texts of a page; fails where tags do not balance."""

    VOID = frozenset({"meta", "line", "path", "br"})

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else None, data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag):
        return [data for name, data in self.texts if name == tag]


@pytest.fixture
def cards(llama, tokenizer):
    """Cards of eight latents over random tokens; the first fires on one token, the last never."""
    random = np.random.default_rng(0)
    n = N_TEXTS * LENGTH
    ids = torch.from_numpy(random.integers(30, 60, n))
    tokens = TokenTable(
        text_index=torch.arange(n) // LENGTH,
        position=torch.arange(n) % LENGTH,
        token_id=ids,
        special=torch.zeros(n, dtype=torch.bool),
        answer=torch.zeros(n, dtype=torch.bool),
        sink=torch.zeros(n, dtype=torch.bool),
    )
    values = random.exponential(size=(n, M)) * (random.uniform(size=(n, M)) < 0.2)
    values[:, 0] = (ids == 40).numpy() * random.uniform(1, 2, n)
    values[:, M - 1] = 0
    code = SparseCode.of(torch.from_numpy(values).float())
    finder = ContextFinder(range(M), n_top=12, before=4, after=3)
    corpus = CorpusCode(code, tokens)
    finder.add(code, tokens, corpus.counted)
    sae = SparseAutoencoder(32, M, {"name": "relu"}, random_state=0)
    return feature_cards(
        finder.result(tokenizer),
        effects=logit_effects(llama, tokenizer, sae),
        labels=label_latents(corpus, tokenizer, n_shuffles=3, min_fires=1),
        figures={"log-odds": np.arange(M) / 3},
        decoder=sae.W_dec,
        code=code,
    )


# Cards


def test_a_card_holds_what_is_known_of_a_latent(cards, tokenizer):
    first, last = cards[0], cards[-1]
    assert first.label == f'token "{tokenizer.decode([40])}"'
    assert first.figures["F1"] == 1
    assert first.figures["log-odds"] == 0
    assert first.frequency == first.count / (N_TEXTS * (LENGTH - 1))
    assert len(first.strongest) == 10
    assert sum(part.share for part in first.quantiles) == pytest.approx(1)
    assert len(first.neurons) == len(first.correlated) == 3
    assert last.label == ""
    assert last.strongest == last.quantiles == last.correlated == ()


def test_cards_reject(cards, tokenizer):
    finder = ContextFinder([5])
    tokens = TokenTable(*(torch.zeros(3, dtype=torch.long) for _ in range(3)), *([None] * 3))
    tokens = replace(tokens, position=torch.arange(3))
    finder.add(SparseCode.of(torch.ones(3, 1)), tokens)
    contexts = finder.result(tokenizer)
    with pytest.raises(ValueError, match="figure 'z' has 2 values, none for latent 5"):
        feature_cards(contexts, figures={"z": np.ones(2)})
    with pytest.raises(ValueError, match="latent 4 was not looked for"):
        feature_cards(contexts, latents=[4])
    with pytest.raises(ValueError, match="latent 5 is not among the 2"):
        feature_cards(contexts, decoder=torch.ones(2, 3))
    assert feature_cards(contexts, labels={5: "said"})[0].label == "said"


# Dashboard


def test_the_dashboard_is_one_page_that_loads_nothing(cards, tmp_path):
    FeatureDashboard(cards, "Features", "eight of them").save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    policy = [m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0]["content"].startswith("default-src 'none'")
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        assert not any("//" in (value or "") for value in attributes.values()), tag
        assert "style" not in attributes
    assert [a["id"] for a in page.all("article")] == [f"f{i}" for i in range(M)]
    assert {a["href"] for a in page.all("a")} == {f"#f{i}" for i in range(M)}
    assert len(page.all("svg")) == 2 * M - 1  # no histogram where nothing fires
    assert "Fires nowhere in these texts." in page.text("p")


def test_tokens_are_shaded_by_activation_and_the_chosen_one_is_marked(cards):
    card = replace(
        cards[0],
        act_max=2.0,
        strongest=(
            replace(
                cards[0].strongest[0],
                tokens=("a", " b\n", "c", "d"),
                values=(0.0, 2.0, 0.1, -1.0),
                at=1,
                value=2.0,
            ),
        ),
        quantiles=(),
    )
    page = Page(FeatureDashboard([card], "x").to_html())
    shaded = [a for a in page.all("i") if "title" in a]
    assert [a["class"] for a in shaded] == ["a9 at", "a1", "n5"]
    assert [a["title"] for a in shaded] == ["2.00", "0.100", "\N{MINUS SIGN}1.00"]
    assert " b↵" in page.text("i")
    assert "a" in page.text("p")


def test_markup_in_tokens_and_labels_is_shown_not_run(cards):
    context = replace(cards[1].strongest[0], tokens=(ATTACK,), values=(1.0,), at=0)
    card = replace(
        cards[1],
        label=ATTACK,
        strongest=(context,),
        raised=((ATTACK, 1.0),),
        figures={ATTACK: 1.0},
    )
    page = Page(FeatureDashboard([card], ATTACK, ATTACK).to_html())
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    for tag in ("i", "h1", "title"):
        assert ATTACK in page.text(tag)
    assert ATTACK.replace(" ", "·") in page.text("code")


def test_hundreds_of_features_fit_a_page(cards):
    many = [replace(cards[i % M], latent=i) for i in range(400)]
    text = FeatureDashboard(many, "Many").to_html()
    assert text.count("<article id=") == text.count("</article>") == 400
    assert len(text) < 8e6


def test_the_dashboard_rejects(cards, tmp_path):
    with pytest.raises(ValueError, match="cards is empty"):
        FeatureDashboard([], "x")
    with pytest.raises(ValueError, match="holds a latent twice"):
        FeatureDashboard([cards[0], cards[0]], "x")
    with pytest.raises(ValueError, match="the title of the dashboard is ' '"):
        FeatureDashboard(cards, " ")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        FeatureDashboard(cards, "x").save(tmp_path)


# JSON

NUMBERS, TEXTS, WHOLE = (list, float), (list, str), (list, int)
FEATURE = {
    "feature_index": int,
    "neuron_alignment_indices": WHOLE,
    "neuron_alignment_values": NUMBERS,
    "neuron_alignment_l1": NUMBERS,
    "correlated_neurons_indices": WHOLE,
    "correlated_neurons_pearson": NUMBERS,
    "correlated_neurons_l1": NUMBERS,
    "correlated_features_indices": WHOLE,
    "correlated_features_pearson": NUMBERS,
    "correlated_features_l1": NUMBERS,
    "neg_str": TEXTS,
    "neg_values": NUMBERS,
    "pos_str": TEXTS,
    "pos_values": NUMBERS,
    "frac_nonzero": float,
    "freq_hist_data_bar_values": NUMBERS,
    "freq_hist_data_bar_heights": NUMBERS,
    "logits_hist_data_bar_values": NUMBERS,
    "logits_hist_data_bar_heights": NUMBERS,
    "n_prompts_total": int,
    "n_tokens_in_prompt": int,
    "dataset": str,
    "decoder_weights_dist": NUMBERS,
    "activations": (list, dict),
}
ACTIVATION = {
    "bin_min": float,
    "bin_max": float,
    "bin_contains": float,
    "tokens": TEXTS,
    "values": NUMBERS,
    "qualifying_token_index": int,
}
GRAPH_FEATURE = {
    "transcoder_id": str,
    "index": int,
    "label": str,
    "examples_quantiles": (list, dict),
    "top_logits": TEXTS,
    "bottom_logits": TEXTS,
    "act_min": float,
    "act_max": float,
    "quantile_values": NUMBERS,
    "histogram": WHOLE,
    "activation_frequency": float,
}
EXAMPLE = {
    "tokens": TEXTS,
    "tokens_acts_list": NUMBERS,
    "train_token_ind": int,
    "is_repeated_datapoint": bool,
}


def faults(record, fields):
    """What a record lacks, has too much, or has of another type than the field list says."""
    found = [f"lacks {name}" for name in fields.keys() - record.keys()]
    found += [f"has {name}" for name in record.keys() - fields.keys()]
    for name in fields.keys() & record.keys():
        kind, value = fields[name], record[name]
        values = value if isinstance(kind, tuple) and isinstance(value, list) else [value]
        inner = kind[1] if isinstance(kind, tuple) else kind
        if isinstance(kind, tuple) and not isinstance(value, list):
            found.append(f"{name} is no list")
        elif any(type(one) is not inner for one in values):
            found.append(f"{name} is not of {inner.__name__}")
    return found


def test_the_validator_finds_faults(cards):
    feature = neuronpedia_feature(cards[0])
    del feature["pos_str"]
    feature |= {"dataset": 3, "neg_values": ["1"], "more": 1, "pos_values": 2.0}
    assert sorted(faults(feature, FEATURE)) == [
        "dataset is not of str",
        "has more",
        "lacks pos_str",
        "neg_values is not of float",
        "pos_values is no list",
    ]


def test_neuronpedia_json_has_the_fields_of_the_format(cards, tmp_path):
    batch = neuronpedia_batch(cards, model_id="tiny", layer=2, sae_set="own", dataset="mine")
    save_json(batch, tmp_path / "batch.json")
    read = json.loads((tmp_path / "batch.json").read_text(encoding="utf-8"))
    assert read.keys() == {"model_id", "layer", "sae_set", "features"}
    assert len(read["features"]) == M
    for card, feature in zip(cards, read["features"], strict=True):
        assert faults(feature, FEATURE) == []
        for activation in feature["activations"]:
            assert faults(activation, ACTIVATION) == []
            assert len(activation["tokens"]) == len(activation["values"])
            at = activation["qualifying_token_index"]
            assert activation["values"][at] > 0
        top = [a for a in feature["activations"] if a["bin_contains"] == -1]
        assert [a["values"][a["qualifying_token_index"]] for a in top] == pytest.approx(
            [c.value for c in card.strongest]
        )
        others = [a for a in feature["activations"] if a["bin_contains"] != -1]
        for a in others:
            value = a["values"][a["qualifying_token_index"]]
            assert a["bin_min"] <= value <= a["bin_max"]
        assert sum(feature["freq_hist_data_bar_heights"]) == card.count
        pairs = [("neg_str", "neg_values"), ("pos_str", "pos_values")]
        pairs += [("freq_hist_data_bar_values", "freq_hist_data_bar_heights")]
        pairs += [("logits_hist_data_bar_values", "logits_hist_data_bar_heights")]
        for one, other in pairs:
            assert len(feature[one]) == len(feature[other])
    with pytest.raises(ValueError, match="cards is empty"):
        neuronpedia_batch([], model_id="tiny", layer=2, sae_set="own")
    with pytest.raises(ValueError, match="Out of range float values"):
        save_json({"value": float("nan")}, tmp_path / "bad.json")
    assert not (tmp_path / "bad.json").exists()


def test_json_for_attribution_graphs_has_the_fields_of_the_format(cards):
    for card in cards:
        feature = json.loads(json.dumps(attribution_feature(card, transcoder_id="plt")))
        assert faults(feature, GRAPH_FEATURE) == []
        examples = [e for q in feature["examples_quantiles"] for e in q["examples"]]
        assert all(faults(example, EXAMPLE) == [] for example in examples)
        repeated = [example["is_repeated_datapoint"] for example in examples]
        assert not any(repeated[: len(card.strongest)])
    quantiles = attribution_feature(cards[0])["examples_quantiles"]
    assert any(e["is_repeated_datapoint"] for q in quantiles for e in q["examples"])


# Pictures


def drawn(figure):
    """Every text of a figure, after it was drawn without a warning."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))]


def marked(ax, gid):
    every = [*ax.lines, *ax.patches, *ax.collections, *ax.texts]
    return [artist for artist in every if artist.get_gid() == gid]


def ring(n=300):
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, n)
    at = np.stack([np.cos(angle), np.sin(angle)], 1)
    return at, np.maximum(at @ np.array([[1, 0, -1.0], [0, 1, 0]]) - 0.5, 0)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_place_cells_are_shaded_where_they_fire(kind):
    at, values = ring()
    centers = np.array([[1, 0], [0, 1], [np.nan, np.nan]])
    figure = dictionary.place_cells(
        kind(at), kind(values), ["east", "north", "west"], centers=kind(centers)
    )
    panels = figure.axes[:3]
    assert [ax.get_title(loc="left") for ax in panels] == ["east", "north", "west"]
    for i, ax in enumerate(panels):
        (fires,), (silent,) = marked(ax, "fires"), marked(ax, "silent")
        shown = np.asarray(fires.get_offsets())
        assert len(shown) == (values[:, i] > 0).sum()
        assert len(silent.get_offsets()) == (values[:, i] == 0).sum()
        np.testing.assert_allclose(shown[-1], at[values[:, i].argmax()])  # the strongest on top
        shade = fires.get_array()
        assert shade.max() == 1
        assert (np.diff(shade) >= 0).all()
    np.testing.assert_allclose(marked(panels[0], "center")[0].get_xydata(), [[1, 0]])
    assert marked(panels[2], "center") == []
    drawn(figure)


def test_the_frontier_runs_by_l0_and_shades_its_target():
    curves = {"TopK": [[32, 0.1], [8, 0.3]], "Gated": torch.tensor([[16, 0.25], [64, 0.12]])}
    figure = dictionary.sparsity_frontier(curves, target=(32, 0.15))
    (ax,) = figure.axes
    assert marked(ax, "TopK")[0].get_xydata().tolist() == [[8, 0.3], [32, 0.1]]
    (corner,) = marked(ax, "target")
    assert corner.get_x() + corner.get_width() == pytest.approx(32)
    assert corner.get_y() + corner.get_height() == pytest.approx(0.15)
    said = drawn(figure)
    assert "FVU (lower is better)" in said
    assert {"8", "16", "32", "64"} <= set(said)
    figure = dictionary.sparsity_frontier(
        curves, target=(32, 0.15), better="higher", logarithmic=True, label="Recovered"
    )
    assert marked(figure.axes[0], "target")[0].get_y() == pytest.approx(0.15)
    drawn(figure)


def test_importance_puts_latents_that_never_fire_on_the_rim():
    forget = np.array([0.2, 0.0, 0.01, 0.0, 0.3])
    retain = torch.tensor([0.001, 0.1, 0.01, 0.0, 0.0])
    figure = dictionary.importance_scatter(forget, retain, chosen=[4, 0], names={4: "a $ name"})
    (ax,) = figure.axes
    (chosen,), (rest,) = marked(ax, "chosen"), marked(ax, "rest")
    np.testing.assert_allclose(chosen.get_offsets(), [[0.0005, 0.3], [0.001, 0.2]])
    np.testing.assert_allclose(sorted(rest.get_offsets().tolist()), [[0.01, 0.01], [0.1, 0.0005]])
    said = drawn(figure)
    assert "Latents (1 never fire)" in said
    assert {r"a \$ name", "0"} <= {text.get_text() for text in marked(ax, "name")}
    assert "never" in said


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: dictionary.place_cells(np.zeros((3, 3)), np.zeros((3, 1)), ["a"]),
            "expected (n, 2)",
        ),
        (lambda: dictionary.place_cells(np.zeros((3, 2)), np.zeros((3, 2)), ["a"]), "3 rows and 1"),
        (
            lambda: dictionary.place_cells(
                np.zeros((3, 2)), np.zeros((3, 1)), ["a"], centers=[[0, 0], [1, 1]]
            ),
            "centers has shape (2, 2)",
        ),
        (lambda: dictionary.sparsity_frontier({}), "curves has 0 entries"),
        (lambda: dictionary.sparsity_frontier({"a": [[0, 1]]}), "of L0 above 0"),
        (lambda: dictionary.sparsity_frontier({"a": [[1, 1]]}, better="best"), "better='best'"),
        (lambda: dictionary.importance_scatter([2], [0]), "forget_frequency has shape (1,)"),
        (lambda: dictionary.importance_scatter([0], [0]), "give as many of both, not all 0"),
        (lambda: dictionary.importance_scatter([1], [0], chosen=[3]), "not among 1"),
        (lambda: dictionary.importance_scatter([np.nan], [0]), "forget_frequency has NaN"),
    ],
)
def test_pictures_reject(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the messages hold brackets
        call()
    assert message in str(error.value)


def test_a_report_takes_the_pictures(tmp_path):
    from manifold_unlearn.report import Report

    at, values = ring()
    figure = dictionary.place_cells(at, values, ["east", "north", "west"])
    text = Report("x").figure(figure, "Place cells", alt="Three arcs of a circle").to_html()
    picture = text.split("base64,")[1].split('"')[0]
    assert base64.b64decode(picture)[:8] == b"\x89PNG\r\n\x1a\n"
