import pytest
import torch
from cases import TEXTS, build_model
from shell import TEMPLATE, fact, refused, run

from manifold_unlearn import Activations, Edit, capture, load_model


@pytest.mark.parametrize("tokens", ["all", "last", "answer"])
def test_capture_writes_what_the_library_captures(tokens, files, tmp_path, capsys):
    sites = ["layers.1", "layers.0.mlp.hidden"]
    run("capture", files / "model", "--texts", files / "forget.jsonl", "--sites", *sites,
        "--tokens", tokens, "--template", TEMPLATE, "--out", tmp_path / "acts")  # fmt: skip
    model, tokenizer = load_model(files / "model")
    facts = [fact(i, "color") for i in range(5)]
    pairs = [(f"Q: {f['question']}\nA:", f" {f['answer']}") for f in facts]
    wanted = capture(model, tokenizer, pairs, sites, tokens=tokens)
    found = Activations.load(tmp_path / "acts")
    assert list(found) == sites
    for site in sites:
        assert torch.equal(found[site], wanted[site])
    assert torch.equal(found.token_id, wanted.token_id)
    assert f"{len(wanted.token_id)} rows at 2 sites" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_load_as_they_were_saved(dtype, tmp_path, tokenizer):
    model = build_model("gpt2", dtype=dtype)
    texts = [*TEXTS, ("Water", " boils")]
    acts = capture(model, tokenizer, texts, ["layers.2", "embed"], sink_ratio=1.1)
    assert acts.sink.any() and acts.answer.any() and acts.special.any()
    acts.save(tmp_path / "acts")
    loaded = Activations.load(tmp_path / "acts")
    assert list(loaded) == ["layers.2", "embed"]
    for site in acts:
        assert loaded[site].dtype == dtype
        assert torch.equal(loaded[site], acts[site])
    for name in ("text_index", "position", "token_id", "special", "answer", "sink"):
        was, now = getattr(acts, name), getattr(loaded, name)
        assert now.dtype == was.dtype
        assert torch.equal(now, was)


def test_activations_that_were_cut_or_are_something_else_are_refused(tmp_path, llama, tokenizer):
    capture(llama, tokenizer, TEXTS, "embed").save(tmp_path)
    with pytest.raises(ValueError, match="holds a Activations, not a Edit"):
        Edit.load(tmp_path)
    whole = (tmp_path / "tensors.safetensors").read_bytes()
    (tmp_path / "tensors.safetensors").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="truncated or changed"):
        Activations.load(tmp_path)


def test_captured_rows_of_plain_texts_have_no_answers_to_select(files, tmp_path, capsys):
    line = refused(capsys, "capture", files / "model", "--texts", files / "texts.jsonl",
                   "--sites", "embed", "--tokens", "answer", "--out", tmp_path)  # fmt: skip
    assert "needs (prompt, answer) pairs" in line


def test_a_missing_site_of_capture_names_those_near_it(files, tmp_path, capsys):
    line = refused(capsys, "capture", files / "model", "--texts", files / "texts.jsonl",
                   "--sites", "layers.7.mlp", "--out", tmp_path)  # fmt: skip
    assert "no site 'layers.7.mlp'" in line
    assert "layers.2.mlp" in line
