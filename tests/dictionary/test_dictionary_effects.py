import numpy as np
import pytest
import torch
from torch import nn

from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.dictionary import Crosscoder, SparseAutoencoder
from manifold_unlearn.dictionary.effects import final_gain, logit_effects


def decoder_of(model, n=12, seed=0):
    width = model.get_output_embeddings().weight.shape[1]
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def frozen_effects(model, directions):
    """Effects from the derivative of the final norm, less what a change of its scale adds to it."""
    norm = find_decoder(model).final_norm.double()
    unembed = model.get_output_embeddings().weight.detach().double()
    d = unembed.shape[1]
    h = torch.randn(d, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    rows = directions.double()
    shift = norm(torch.zeros(d, dtype=torch.float64))  # the bias, if there is one
    jacobian = torch.autograd.functional.jacobian(norm, h)
    # diag(gain) / s (C - c c' / (d s**2)), C the centering or the identity, c = C h, s = rms(c)
    still = norm(h).detach() - shift.detach()
    scale_free = jacobian + torch.outer(still, still / gain_of(norm)) / d / scale_of(norm, h)
    effect = rows @ scale_free.T.detach() * scale_of(norm, h) @ unembed.T
    return (effect - effect.mean(1, keepdim=True)).numpy()


def gain_of(norm):
    weight = norm.weight.detach()
    return weight + 1 if "Gemma" in type(norm).__name__ else weight


def scale_of(norm, h):
    centered = h - h.mean() if isinstance(norm, nn.LayerNorm) else h
    return centered.square().mean().sqrt()


def test_effects_are_the_norm_s_derivative_at_a_fixed_scale(model, tokenizer):
    directions = decoder_of(model)
    found = logit_effects(model, tokenizer, directions, n_top=5, block=5)
    expected = frozen_effects(model, directions)[:, : len(tokenizer)]
    expected -= expected.mean(1, keepdims=True)
    order = np.argsort(-expected, axis=1)
    np.testing.assert_allclose(
        found.top_value, np.take_along_axis(expected, order[:, :5], 1), rtol=1e-3
    )
    np.testing.assert_array_equal(found.top_id[:, 0], order[:, 0])
    np.testing.assert_array_equal(found.bottom_id[:, 0], order[:, -1])
    np.testing.assert_allclose(found.deviation, expected.std(1), rtol=1e-3)
    unit = expected / expected.std(1, keepdims=True)
    np.testing.assert_allclose(found.kurtosis, (unit**4).mean(1) - 3, atol=1e-2)
    np.testing.assert_allclose(found.skewness, (unit**3).mean(1), atol=1e-2)
    assert (found.histogram.sum(1) == expected.shape[1]).all()
    np.testing.assert_allclose(found.edges[:, 0], expected.min(1), rtol=1e-3)


def test_a_latent_that_writes_one_token_s_unembedding_raises_that_token(llama, tokenizer):
    gain, centers = final_gain(llama)
    assert not centers
    unembed = llama.get_output_embeddings().weight.detach()
    token = tokenizer(" sea")["input_ids"][-1]
    distinct = unembed[token] - unembed.mean(0)
    write = torch.linalg.lstsq(unembed - unembed.mean(0), torch.eye(300)[token]).solution / gain
    sae = SparseAutoencoder(32, 3, {"name": "relu"}, random_state=0)
    with torch.no_grad():
        sae.decoder[1] = write
        sae.decoder[2] = -distinct / gain
    found = logit_effects(llama, tokenizer, sae, latents=[2, 1], scale=4.0)
    assert found.latents.tolist() == [2, 1]
    assert found.raised(1)[0][0] == tokenizer.decode([token])
    assert found.top_id[1, 0] == token
    assert found.bottom_id[0, 0] == token
    assert found.lowered(2)[0][0] == tokenizer.decode([token])
    twice = logit_effects(llama, tokenizer, sae, latents=[1], scale=2.0)
    np.testing.assert_allclose(twice.top_value[0], 2 * found.top_value[1], rtol=1e-5)


def test_a_model_and_its_head_are_left_as_they_were(llama, tokenizer):
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    llama.bfloat16()
    logit_effects(llama, tokenizer, decoder_of(llama))
    for name, value in llama.state_dict().items():
        torch.testing.assert_close(value, before[name].bfloat16())


def test_effects_reject(llama, tokenizer):
    cross = Crosscoder(2, 32, 8, random_state=0)
    with pytest.raises(ValueError, match=r"shape \(8, 64\).*give W_dec\[:, s\]"):
        logit_effects(llama, tokenizer, cross)
    assert len(logit_effects(llama, tokenizer, cross.W_dec[:, 1]).latents) == 8
    with pytest.raises(ValueError, match="scale=0"):
        logit_effects(llama, tokenizer, decoder_of(llama), scale=0)
    with pytest.raises(ValueError, match="decoder contains NaN"):
        logit_effects(llama, tokenizer, decoder_of(llama) * torch.nan)
    with pytest.raises(ValueError, match="latent 5 has no effects here"):
        logit_effects(llama, tokenizer, decoder_of(llama), latents=[1]).raised(5)
    with pytest.raises(ValueError, match="has no output embedding"):
        logit_effects(llama.model, tokenizer, decoder_of(llama))
    llama.model.norm = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
    with pytest.raises(ValueError, match="a Sequential, is no gain times a scaled row"):
        logit_effects(llama, tokenizer, torch.ones(2, 32))
