"""Dictionaries' files as other libraries write them, and what those libraries compute.

Written from the definitions of the formats: with torch, numpy and safetensors alone. The functions
``encode_*`` and ``decode`` are the references that tests compare with, in float64 numpy.
"""

import json

import numpy as np
import torch
from safetensors.torch import save_file

D, H, K = 6, 20, 3


def draw(*shape, seed=0, scale=1.0):
    """float32 values, other for each shape and seed."""
    generator = np.random.default_rng([seed, *shape])
    return torch.from_numpy(np.asarray(generator.normal(size=shape) * scale, np.float32))


def weights(d_out=D, seed=0):
    """The tensors of an ordinary dictionary, W_enc (d, h), by SAELens' names."""
    return {
        "W_enc": draw(D, H, seed=seed),
        "W_dec": draw(H, d_out, seed=seed + 1),
        "b_enc": draw(H, seed=seed + 2),
        "b_dec": draw(d_out, seed=seed + 3),
    }


def rows(n=64, d=D):
    return draw(n, d, seed=99)


def array(tensor):
    return tensor.detach().numpy().astype(np.float64)


def pre(x, w, shift=None):
    x = array(x) - (0 if shift is None else array(shift))
    return x @ array(w["W_enc"]) + array(w["b_enc"])


def relu(z):
    return np.maximum(z, 0)


def jump(z, threshold):
    return np.where(z > array(threshold), relu(z), 0)


def top(z, k, compared=None):
    """The k of every row that are largest where compared, if positive."""
    compared = z if compared is None else compared
    kept = np.zeros_like(z)
    np.put_along_axis(kept, np.argsort(-compared, axis=1, kind="stable")[:, :k], 1, axis=1)
    return np.where(kept > 0, z, 0)


def decode(f, w, x=None):
    out = f @ array(w["W_dec"]) + array(w["b_dec"])
    return out if x is None else out + array(x) @ array(w["W_skip"])


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_safetensors(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def write_torch(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def saelens(directory, architecture, tensors, metadata=None, **config):
    """A directory as SAELens 6 writes it."""
    said = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": H,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.1.0", **(metadata or {})},
        **config,
    }
    write_json(directory / "cfg.json", said)
    write_safetensors(directory / "sae_weights.safetensors", tensors)
    return directory


def sparsify(directory, tensors, **config):
    """A directory as sparsify writes it, ``num_latents`` not said."""
    said = {
        "activation": "topk",
        "expansion_factor": 4,
        "normalize_decoder": True,
        "num_latents": 0,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D,
        **config,
    }
    write_json(directory / "cfg.json", said)
    write_safetensors(directory / "sae.safetensors", tensors)
    return directory


def agree(coder, x, encoded, decoded, tolerance=1e-5):
    """The coder's activations and outputs are those of the reference."""
    with torch.no_grad():
        f = coder.encode(x)
        np.testing.assert_allclose(f.numpy(), encoded, rtol=tolerance, atol=tolerance)
        assert (encoded != 0).any()
        assert (encoded == 0).any()
        np.testing.assert_allclose(coder(x).numpy(), decoded, rtol=tolerance, atol=tolerance)
        if isinstance(f, torch.Tensor) and hasattr(coder, "code"):
            out = coder.decode(f, x).numpy()
            np.testing.assert_allclose(out, decoded, rtol=tolerance, atol=tolerance)
