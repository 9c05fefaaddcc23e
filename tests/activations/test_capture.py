import pytest
import torch
from cases import ARCHITECTURES, HIDDEN, TEXTS, WIDTH, build_model, build_tokenizer, hooks
from torch import nn

from manifold_unlearn.activations.capture import Activations, capture, recording
from manifold_unlearn.activations.sites import find_decoder, resolve_site, site_names

PAIRS = [("The capital of France is", " Paris"), ("Water", " boils over")]


def rows_of(acts, site, text):
    return acts[site][acts.text_index == text]


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_values_equal_output_hidden_states(model, tokenizer):
    sites = ["embed", "layers.0", "layers.1", "layers.2"]
    acts = capture(model, tokenizer, TEXTS, sites, batch_size=1)
    norm = find_decoder(model).final_norm
    for i, text in enumerate(TEXTS):
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            expected = model(input_ids=ids, output_hidden_states=True).hidden_states
            got = [rows_of(acts, site, i) for site in sites]
            got[-1] = norm(got[-1])
        for mine, theirs in zip(got, expected, strict=True):
            assert relative(mine, theirs[0]) < 1e-6


def test_the_parts_of_a_block_equal_what_a_raw_hook_sees(model, tokenizer):
    decoder = find_decoder(model)
    block = decoder.blocks[1]
    attn, mlp = getattr(block, decoder.layout.attn), getattr(block, decoder.layout.mlp)
    matrix = getattr(mlp, decoder.layout.mlp_out)
    raw = {}
    taken = [
        attn.register_forward_hook(
            lambda m, a, out: raw.update(attn=out[0] if isinstance(out, tuple) else out)
        ),
        mlp.register_forward_hook(lambda m, a, out: raw.update(mlp=out)),
        matrix.register_forward_pre_hook(lambda m, args: raw.update({"mlp.hidden": args[0]})),
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([tokenizer(TEXTS[0]).input_ids]))
    for handle in taken:
        handle.remove()
    acts = capture(model, tokenizer, [TEXTS[0]], [f"layers.1.{part}" for part in raw])
    for part, expected in raw.items():
        assert relative(acts[f"layers.1.{part}"], expected[0]) < 1e-6
    assert acts["layers.1.mlp.hidden"].shape[1] == HIDDEN
    assert acts["layers.1.attn"].shape[1] == acts["layers.1.mlp"].shape[1] == WIDTH


def test_rows_do_not_depend_on_the_batch_or_on_the_padding_side(model):
    sites = site_names(model)
    alone = capture(model, build_tokenizer(), TEXTS, sites, batch_size=1)
    for side in ("left", "right"):
        for batch_size in (2, 3, "auto"):
            acts = capture(model, build_tokenizer(side), TEXTS, sites, batch_size=batch_size)
            assert torch.equal(acts.token_id, alone.token_id)
            assert max(relative(acts[site], alone[site]) for site in sites) < 1e-5


def test_every_row_is_a_token_of_a_text_in_order_and_padding_is_none(llama, tokenizer):
    acts = capture(llama, tokenizer, TEXTS, "layers.0", batch_size=3)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    assert acts.token_id.tolist() == sum(ids, [])
    assert acts.position.tolist() == [p for row in ids for p in range(len(row))]
    assert acts.text_index.tolist() == [i for i, row in enumerate(ids) for _ in row]
    assert acts.special.tolist() == [p == 0 for row in ids for p in range(len(row))]
    assert len(acts["layers.0"]) == len(acts.tokens) == sum(map(len, ids))
    for field in (acts.token_id, acts.position, acts.text_index):
        assert field.dtype == torch.int64


def test_what_stands_in_the_padding_does_not_enter(llama, tokenizer, monkeypatch):
    before = capture(llama, tokenizer, TEXTS, ["layers.2"], batch_size=5)
    with torch.no_grad():
        llama.model.embed_tokens.weight[0] *= 1000  # id 0 stands in the padding
    absent = [text for text in tokenizer(TEXTS, add_special_tokens=False).input_ids]
    assert all(0 not in row for row in absent)
    plain = lambda texts, add_special_tokens=True, **k: tokenizer(  # noqa: E731
        texts, add_special_tokens=False, **k
    )
    plain.eos_token_id = None
    padded = capture(llama, plain, TEXTS, ["layers.2"], batch_size=5)
    alone = capture(llama, plain, TEXTS, ["layers.2"], batch_size=1)
    assert relative(padded["layers.2"], alone["layers.2"]) < 1e-5
    assert len(before["layers.2"]) == len(padded["layers.2"]) + len(TEXTS)


@pytest.mark.parametrize("site", ["embed", "layers.0.mlp.hidden", "layers.1.attn", "layers.1"])
def test_what_lies_behind_the_deepest_site_does_not_run(model, tokenizer, site):
    decoder = find_decoder(model)
    calls = [0, 0, 0]
    for i, block in enumerate(decoder.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda *_: pytest.fail("logits were computed"))
    capture(model, tokenizer, TEXTS, [site, "embed"], batch_size=2)
    finished = {"embed": 0, "layers.0.mlp.hidden": 0, "layers.1.attn": 1, "layers.1": 1}[site]
    assert calls[finished + 1 :] == [0] * (2 - finished)
    assert calls[:finished] == [3] * finished


def test_stop_at_runs_on_to_a_site_that_is_not_kept(llama, tokenizer):
    calls = []
    for i, block in enumerate(llama.model.layers):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    acts = capture(llama, tokenizer, TEXTS[:1], "layers.0", stop_at="layers.2.attn")
    assert calls == [0, 1]
    assert list(acts) == ["layers.0"]


def test_last_and_answer_select_their_rows_of_all(model, tokenizer):
    everything = capture(model, tokenizer, PAIRS, "layers.1")
    last = capture(model, tokenizer, PAIRS, "layers.1", tokens="last")
    answer = capture(model, tokenizer, PAIRS, "layers.1", tokens="answer")
    ends = torch.tensor([(everything.text_index == i).nonzero().max() for i in range(2)])
    assert torch.equal(last["layers.1"], everything["layers.1"][ends])
    assert torch.equal(answer["layers.1"], everything["layers.1"][everything.answer])
    assert answer.answer.all()
    assert tokenizer.decode(answer.token_id) == " Paris boils over"


def test_a_mask_selects_rows(llama, tokenizer):
    everything = capture(llama, tokenizer, TEXTS[:2], "layers.1")
    masks = [[False, True, True] + [False] * 11, [True] + [False] * 7]
    chosen = capture(llama, tokenizer, TEXTS[:2], "layers.1", tokens=masks)
    assert chosen.position.tolist() == [1, 2, 0]
    assert chosen.text_index.tolist() == [0, 0, 1]
    assert torch.equal(chosen["layers.1"], everything["layers.1"][[1, 2, 14]])


def test_a_planted_sink_is_flagged_and_nothing_else(model, tokenizer):
    assert not capture(model, tokenizer, TEXTS, "embed").sink.any()
    (comma,) = tokenizer(",", add_special_tokens=False).input_ids
    with torch.no_grad():
        model.get_input_embeddings().weight[comma] *= 100
    acts = capture(model, tokenizer, TEXTS, ["embed", "layers.0.mlp.hidden"])
    assert acts.sink[acts.token_id == comma].all()
    assert not capture(model, tokenizer, TEXTS, "embed").sink[acts.token_id != comma].any()
    loose = capture(model, tokenizer, TEXTS, "embed", sink_ratio=1e6)
    assert not loose.sink.any()


def test_max_length_cuts_a_text_longer_than_the_context(llama, tokenizer):
    acts = capture(llama, tokenizer, ["a" * 200], "embed", max_length=10)
    assert acts.position.tolist() == list(range(10))


def test_a_text_longer_than_the_context_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="the model takes 64"):
        capture(model, tokenizer, ["?" * 100], "embed")


def test_a_site_that_does_not_exist_lists_those_near_it(model, tokenizer):
    with pytest.raises(ValueError, match="no site 'layers.3'.*Near it: .*layers.2"):
        capture(model, tokenizer, TEXTS, "layers.3")


def test_no_sites_is_an_error(llama, tokenizer):
    with pytest.raises(ValueError, match="sites is empty"):
        capture(llama, tokenizer, TEXTS, [])


def test_activations_that_are_not_finite_name_site_and_text_and_leave_no_hook(model, tokenizer):
    (x,) = tokenizer("x", add_special_tokens=False).input_ids
    with torch.no_grad():
        model.get_input_embeddings().weight[x] = torch.nan
    texts = [TEXTS[0], TEXTS[1], "x"]
    with pytest.raises(ValueError, match="site 'layers.1'.* NaN or infinity.* text 2"):
        capture(model, tokenizer, texts, ["layers.1"])
    assert hooks(model) == 0


def test_a_site_that_text_never_reaches_is_an_error_and_leaves_no_hook(llama, tokenizer):
    llama.model.vision = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"never came to \['model.vision'\]"):
        capture(llama, tokenizer, TEXTS, ["layers.0", "model.vision"])
    assert hooks(llama) == 0


def test_a_module_that_does_not_answer_hidden_states_is_an_error(llama, tokenizer):
    class Odd(nn.Module):
        def forward(self, x, *a, **k):
            return {"hidden": x}

    llama.model.layers[0].mlp.act_fn = Odd()
    with pytest.raises(ValueError, match="'model.layers.0.mlp.act_fn' carries a dict"):
        capture(llama, tokenizer, TEXTS, "model.layers.0.mlp.act_fn")
    assert hooks(llama) == 0


def test_capture_leaves_the_model_as_it_was(model, tokenizer):
    model.train()
    model.get_input_embeddings().eval()
    capture(model, tokenizer, TEXTS, "layers.1")
    assert hooks(model) == 0
    assert model.training and not model.get_input_embeddings().training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_keep_the_models_dtype(name, tokenizer):
    model = build_model(name, dtype=torch.bfloat16)
    acts = capture(model, tokenizer, TEXTS[:2], ["layers.0", "layers.0.mlp.hidden"])
    assert {values.dtype for values in acts.values()} == {torch.bfloat16}


def test_float16_overflow_suggests_a_wider_dtype(tokenizer):
    model = build_model("llama", dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        capture(model, tokenizer, TEXTS, "layers.0")


def test_sites_are_one_mapping(llama, tokenizer):
    acts = capture(llama, tokenizer, TEXTS, ["layers.1", "embed", "layers.1"])
    assert list(acts) == ["layers.1", "embed"]
    assert len(acts) == 2
    assert "embed" in acts
    assert "layers.0" not in acts


def test_activations_save_and_load(llama, tokenizer, tmp_path):
    acts = capture(llama, tokenizer, PAIRS, ["layers.1", "embed"], sink_ratio=1.2)
    acts.save(tmp_path / "acts")
    again = Activations.load(tmp_path / "acts")
    assert list(again) == ["layers.1", "embed"]
    assert all(torch.equal(again[site], acts[site]) for site in acts)
    for name in ("text_index", "position", "token_id", "special", "answer", "sink"):
        saved = getattr(acts, name)
        assert torch.equal(getattr(again, name), saved)
        assert saved.any()


def test_masks_that_choose_nothing_give_no_rows(llama, tokenizer):
    acts = capture(llama, tokenizer, ["x", "x"], "layers.1", tokens=[[False, False]] * 2)
    assert acts["layers.1"].shape == (0, WIDTH)
    assert len(acts.tokens) == 0


def test_recording_sees_the_prompt_then_each_generated_token(model, tokenizer):
    ids = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    with recording(model, ["layers.1", "layers.1.mlp.hidden"]) as seen:
        model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    n = ids.shape[1]
    assert [tuple(step.shape) for step in seen["layers.1"]] == [(1, n, WIDTH)] + [(1, 1, WIDTH)] * 3
    assert seen["layers.1.mlp.hidden"][0].shape[-1] == HIDDEN
    acts = capture(model, tokenizer, [TEXTS[0]], "layers.1")
    assert relative(seen["layers.1"][0][0], acts["layers.1"]) < 1e-6
    assert hooks(model) == 0


def test_recording_leaves_no_hook_behind_an_exception(llama):
    with pytest.raises(KeyError, match="mine"), recording(llama, ["layers.1"]):
        raise KeyError("mine")
    assert hooks(llama) == 0


def test_site_modules_of_a_capture_are_those_resolved(model, tokenizer):
    """The hook of a site sits on the module that resolve_site names."""
    site = resolve_site(model, "layers.2.mlp.hidden")
    acts = capture(model, tokenizer, [TEXTS[1]], "layers.2.mlp.hidden")
    after = capture(model, tokenizer, [TEXTS[1]], "layers.2.mlp")
    with torch.no_grad():
        written = site.module(acts["layers.2.mlp.hidden"])
    assert relative(written, after["layers.2.mlp"]) < 1e-5
