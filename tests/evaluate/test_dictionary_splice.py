import pytest
import torch
from cases import HIDDEN, TEXTS, WIDTH, hooks, same_state, state

from manifold_unlearn import capture, intervene
from manifold_unlearn.activations.sites import resolve_site
from manifold_unlearn.activations.tokens import encode
from manifold_unlearn.dictionary import (
    Crosscoder,
    CrossLayerTranscoder,
    SparseAutoencoder,
    Transcoder,
)
from manifold_unlearn.evaluate import ablated, spliced
from manifold_unlearn.evaluate.dictionary_splice import edited_but, sites_of

IDS = torch.tensor([[0, 40, 50, 60, 70, 80], [0, 45, 55, 65, 75, 85]])


def identity(d=WIDTH, *, kind=SparseAutoencoder):
    """W_enc = [I, -I] and relu: exact for every row."""
    coder = kind(d, 2 * d, nonlinearity={"name": "relu"})
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    with torch.no_grad():
        coder.encoder.copy_(both)
        coder.decoder.copy_(both)
    return coder


def zero(d=WIDTH):
    coder = identity(d)
    with torch.no_grad():
        coder.encoder.zero_()
    return coder


def random_coder(kind=SparseAutoencoder, seed=0, k=8, **options):
    return kind(WIDTH, 64, nonlinearity={"name": "topk", "k": k}, random_state=seed, **options)


def run(model, ids=IDS, **keywords):
    with torch.no_grad():
        return model(input_ids=ids, **keywords).logits


SITES = ["embed", "layers.0", "layers.1.attn", "layers.2.mlp", "layers.0.mlp.input"]


@pytest.mark.parametrize("site", SITES)
def test_a_perfect_dictionary_leaves_the_model_and_another_does_not(model, site):
    before, weights = run(model), state(model)
    with spliced(model, {site: identity()}):
        torch.testing.assert_close(run(model), before, rtol=1e-4, atol=1e-4)
    with spliced(model, {site: random_coder()}):
        assert (run(model) - before).abs().max() > 1e-2
    assert hooks(model) == 0
    assert torch.equal(run(model), before)
    assert same_state(model, weights)


def test_the_rows_at_the_site_are_what_the_dictionary_makes_of_them(llama, tokenizer):
    coder = random_coder()
    rows = capture(llama, tokenizer, TEXTS, ["layers.1"])["layers.1"]
    with spliced(llama, {"layers.1": coder}):
        got = capture(llama, tokenizer, TEXTS, ["layers.1"])["layers.1"]
    torch.testing.assert_close(got, coder(rows).detach())


def test_a_zero_dictionary_is_the_ablation_by_zeros(model):
    with spliced(model, {"layers.1.mlp": zero()}):
        made = run(model)
    with ablated(model, {"layers.1.mlp": None}):
        torch.testing.assert_close(run(model), made)
    row = torch.arange(WIDTH) / WIDTH
    with ablated(model, {"layers.1.mlp": row}):
        moved = run(model)
    assert (moved - made).abs().max() > 1e-3
    lone = zero()
    with torch.no_grad():
        lone.b_dec.copy_(row)
    with spliced(model, {"layers.1.mlp": lone}):
        torch.testing.assert_close(run(model), moved)


def mlp_transcoder(llama, layer):
    """Reads the MLP's input and answers a fixed linear map of it."""
    coder = identity(kind=Transcoder)
    draw = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        coder.decoder.copy_(coder.decoder @ torch.randn(WIDTH, WIDTH, generator=draw) / 4)
    return coder


@pytest.mark.parametrize("spell", [lambda a, b: (a, b), lambda a, b: f"{a}->{b}"])
def test_a_transcoder_writes_what_it_makes_of_the_rows_read(model, spell):
    coder = mlp_transcoder(model, 1)
    linear = coder.decoder[:WIDTH].detach()
    seen = {}

    def keep(_module, args):
        seen["read"] = args[0]

    def note(_module, _args, output):
        seen["written"] = output

    mlp = resolve_site(model, "layers.1.mlp").module
    with spliced(model, {spell("layers.1.mlp.input", "layers.1.mlp"): coder}):
        handles = [mlp.register_forward_pre_hook(keep), mlp.register_forward_hook(note)]
        run(model)
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(seen["written"], seen["read"] @ linear, rtol=1e-4, atol=1e-4)
    assert hooks(model) == 0


def test_each_dictionary_reads_what_those_before_it_made(llama):
    """All MLPs replaced by linear maps: the same as the model with these maps for MLPs."""
    coders = {
        (f"layers.{i}.mlp.input", f"layers.{i}.mlp"): mlp_transcoder(llama, i) for i in range(3)
    }
    with spliced(llama, coders):
        made = run(llama)
    for i, block in enumerate(llama.model.layers):
        block.mlp = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            block.mlp.weight.copy_(mlp_transcoder(llama, i).decoder[:WIDTH].T)
    torch.testing.assert_close(run(llama), made, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip", [False, True])
def test_a_cross_layer_transcoder_stands_at_all_mlps(llama, skip):
    """Against the model whose MLPs are written out by hand."""
    coder = CrossLayerTranscoder(
        3, WIDTH, 40, nonlinearity={"name": "topk", "k": 6}, skip=skip, random_state=1
    )
    with torch.no_grad():
        if skip:
            coder.W_skip.normal_(generator=torch.Generator().manual_seed(3)).mul_(0.3)
        coder.b_dec.normal_(generator=torch.Generator().manual_seed(2))
    reads = [f"layers.{i}.mlp.input" for i in range(3)]
    writes = [f"layers.{i}.mlp" for i in range(3)]
    with spliced(llama, {(tuple(reads), tuple(writes)): coder}):
        made = run(llama)
        again = run(llama)  # nothing is left of the pass before
    assert torch.equal(made, again)
    codes = []

    class Hand(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            codes[self.layer :] = [coder.coders[self.layer].encode(x)]
            out = coder.b_dec[self.layer]
            for i, code in enumerate(codes):
                out = out + code @ coder.W_dec[i][:, self.layer - i]
            return out + x @ coder.W_skip[self.layer] if skip else out

    with spliced(llama, {"+".join(reads) + "->" + "+".join(writes): coder}, error=True):
        original = run(llama)
    for i, block in enumerate(llama.model.layers):
        mlp, block.mlp = block.mlp, Hand(i)
        codes.append(mlp)
    hand = run(llama)
    torch.testing.assert_close(made, hand, rtol=1e-4, atol=1e-4)
    assert (original - made).abs().max() > 1e-2


def test_with_its_error_the_model_is_itself_but_for_what_is_changed(model):
    before = run(model)
    coder = random_coder()
    transcoder = random_coder(Transcoder)
    coders = {"layers.0": coder, "layers.2.mlp.input->layers.2.mlp": transcoder}
    with spliced(model, coders, error=True):
        assert torch.equal(run(model), before)
    with spliced(model, coders, error=True, change=lambda f: f):
        torch.testing.assert_close(run(model), before)
    with spliced(model, {"layers.0": coder}, error=True, change=lambda f: 2 * f):
        doubled = run(model)
    move = lambda h: h + coder.encode(h) @ coder.W_dec  # noqa: E731 - twice the code, once
    with intervene(model, {"layers.0": move}):
        torch.testing.assert_close(run(model), doubled, rtol=1e-4, atol=1e-4)
    with spliced(model, {"layers.0": coder}, change=torch.zeros_like):
        gone = run(model)
    with ablated(model, {"layers.0": coder.b_dec.detach()}):
        torch.testing.assert_close(run(model), gone)


def test_a_change_reaches_the_layers_behind_with_a_cross_layer_transcoder(llama):
    coder = CrossLayerTranscoder(3, WIDTH, 40, nonlinearity={"name": "relu"}, random_state=1)
    place = (
        tuple(f"layers.{i}.mlp.input" for i in range(3)),
        tuple(f"layers.{i}.mlp" for i in range(3)),
    )
    before = run(llama)
    with spliced(llama, {place: coder}, error=True, change=lambda f: f):
        torch.testing.assert_close(run(llama), before, rtol=1e-4, atol=1e-4)
    with spliced(llama, {place: coder}, error=True, change=torch.zeros_like):
        assert (run(llama) - before).abs().max() > 1e-2


def test_tokens_that_are_left_alone_keep_their_rows(llama, tokenizer):
    coder = random_coder()
    rows = capture(llama, tokenizer, TEXTS, ["layers.0"])["layers.0"]
    with spliced(llama, {"layers.0": coder}, leave_tokens=tokenizer.all_special_ids):
        acts = capture(llama, tokenizer, TEXTS, ["layers.0"])
    special = acts.special
    assert special.sum() == len(TEXTS)
    assert torch.equal(acts["layers.0"][special], rows[special])
    torch.testing.assert_close(acts["layers.0"][~special], coder(rows[~special]).detach())


def test_any_map_can_leave_tokens_alone(llama, tokenizer):
    rows = capture(llama, tokenizer, TEXTS, ["layers.1"])["layers.1"]
    before = run(llama)
    with edited_but(llama, {"layers.1": lambda h: 2 * h}, leave_tokens=[0]):
        acts = capture(llama, tokenizer, TEXTS, ["layers.1"])
    factor = torch.where(acts.special, 1.0, 2.0)[:, None]
    torch.testing.assert_close(acts["layers.1"], rows * factor)
    with edited_but(llama, {"layers.1": lambda h: h}, leave_tokens=[0]):
        assert torch.equal(run(llama), before)
    assert hooks(llama) == 0


def test_tokens_are_found_in_the_pass_of_every_architecture(model):
    before = run(model)
    first = IDS[0, :3].tolist()
    with edited_but(model, {"layers.1": torch.zeros_like}, leave_tokens=first):
        made = run(model)
    torch.testing.assert_close(made[0, :3], before[0, :3])
    assert (made[0, 3:] - before[0, 3:]).abs().max() > 1e-3
    with edited_but(model, {"layers.1": torch.zeros_like}, leave_tokens=IDS.unique().tolist()):
        torch.testing.assert_close(run(model), before)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_token_of_each_text_is_left_alone(llama, tokenizer, side):
    tokenizer.padding_side = side
    rows = capture(llama, tokenizer, TEXTS, ["layers.1"])
    with edited_but(llama, {"layers.1": lambda h: 2 * h}, leave_first=True):
        made = capture(llama, tokenizer, TEXTS, ["layers.1"])
    factor = torch.where(rows.position == 0, 1.0, 2.0)[:, None]
    torch.testing.assert_close(made["layers.1"], rows["layers.1"] * factor)
    assert hooks(llama) == 0


def test_the_first_token_is_found_in_the_pass_of_every_architecture(model):
    before = run(model)
    with edited_but(model, {"layers.1": torch.zeros_like}, leave_first=True):
        made = run(model)
    torch.testing.assert_close(made[:, 0], before[:, 0])
    assert (made[:, 1:] - before[:, 1:]).abs().max() > 1e-3


def test_generated_tokens_are_not_taken_for_first_ones(llama):
    with spliced(llama, {"layers.0": random_coder()}, leave_first=True):
        out = llama.generate(input_ids=IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=2)
        whole = run(llama, out[:, :-1])
    length = IDS.shape[1]
    assert torch.equal(whole[0, length - 1 :].argmax(-1), out[0, length:])


def test_sinks_are_left_alone_where_they_are_read_or_written(llama, tokenizer):
    ids = [row.ids for row in encode(tokenizer, TEXTS)]
    with torch.no_grad():
        llama.model.embed_tokens.weight[0] *= 1000  # the first token of every text
    rows = capture(llama, tokenizer, TEXTS, ["embed"])
    with spliced(llama, {"embed": random_coder()}, sink_ratio=10):
        got = capture(llama, tokenizer, TEXTS, ["embed"])["embed"]
    kept = (got == rows["embed"]).all(1)
    assert torch.equal(kept, rows.position == 0)
    assert len(kept) == sum(map(len, ids))
    big = random_coder(Transcoder)
    with spliced(llama, {("embed", "layers.0.mlp"): big}, sink_ratio=10):
        moved = capture(llama, tokenizer, TEXTS, ["layers.0.mlp"])["layers.0.mlp"]
    plain = capture(llama, tokenizer, TEXTS, ["layers.0.mlp"])["layers.0.mlp"]
    assert torch.equal((moved == plain).all(1), rows.position == 0)


def test_cached_generation_runs_on_the_dictionary_too(llama):
    coders = {"layers.0": random_coder(), ("layers.1.mlp.input", "layers.1.mlp"): random_coder(
        Transcoder, seed=1
    )}  # fmt: skip
    with spliced(llama, coders, leave_tokens=[0]):
        out = llama.generate(input_ids=IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=2)
        whole = run(llama, out[:, :-1])
    assert torch.equal(whole[0, 5:].argmax(-1), out[0, 6:])
    assert hooks(llama) == 0


def test_half_precision_keeps_its_dtype(llama):
    model = llama.to(torch.bfloat16)
    coder = random_coder()
    with spliced(model, {"layers.0": coder}):
        assert run(model).dtype == torch.bfloat16
    assert coder.dtype == torch.float32


def test_an_exception_leaves_no_hook_and_the_dictionary_as_it_was(llama):
    coder = SparseAutoencoder(WIDTH, 64, {"name": "batch_topk", "k": 4}, random_state=0).train()
    before = {name: value.clone() for name, value in coder.state_dict().items()}
    place = {"layers.0": coder, ("layers.1.mlp.input", "layers.1.mlp"): random_coder(Transcoder)}
    with pytest.raises(RuntimeError, match="of the test"), spliced(llama, place, leave_tokens=[0]):
        run(llama)
        raise RuntimeError("of the test")
    assert hooks(llama) == 0
    assert coder.training
    assert all(torch.equal(before[name], value) for name, value in coder.state_dict().items())


@pytest.mark.parametrize(
    ("coders", "words"),
    [
        ({}, "coders is empty"),
        ({"layers.9": random_coder()}, "no site 'layers.9'"),
        ({"layers.0": random_coder(Transcoder)}, "Transcoder at 'layers.0' writes other rows"),
        (
            {"layers.0+layers.1": Crosscoder(2, WIDTH, 64)},
            "Crosscoder at 'layers.0.layers.1' reads all its streams",
        ),
        (
            {("layers.0", "layers.1"): CrossLayerTranscoder(2, WIDTH, 8)},
            "names 1 sites read and 1 written; the CrossLayerTranscoder needs 2",
        ),
        ({("layers.0",): random_coder()}, "is not a site or a pair"),
        (
            {"layers.0": random_coder(), ("layers.0.mlp", "layers.0"): random_coder()},
            "two dictionaries write to 'layers.0'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(llama, coders, words):
    with pytest.raises(ValueError, match=words), spliced(llama, coders):
        pass
    assert hooks(llama) == 0


def test_what_only_a_pass_can_show_is_refused_in_the_pass(llama):
    with (
        spliced(llama, {("layers.2", "layers.0"): random_coder(Transcoder)}),
        pytest.raises(ValueError, match="has not come to 'layers.2'"),
    ):
        run(llama)
    with (
        spliced(llama, {"layers.0.mlp.hidden": random_coder()}),
        pytest.raises(ValueError, match=f"width {WIDTH}; the site has width {HIDDEN}"),
    ):
        run(llama)
    with (
        spliced(llama, {"layers.0": random_coder()}, leave_tokens=[0]),
        pytest.raises(ValueError, match="was given no input_ids"),
    ):
        llama(inputs_embeds=torch.zeros(1, 3, WIDTH))
    assert hooks(llama) == 0


def test_places_are_spelled_in_several_ways():
    assert sites_of("a+b->c+d") == (("a", "b"), ("c", "d"))
    assert sites_of((["a", "b"], ["c", "d"])) == (("a", "b"), ("c", "d"))
    assert sites_of(("a", "b")) == (("a",), ("b",))
