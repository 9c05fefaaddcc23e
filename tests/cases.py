"""What the laws are tested on; one line adds a case to every law."""

import json
from functools import cache

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

WIDTH, HIDDEN, CONTEXT, VOCABULARY = 32, 48, 64, 300
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": CONTEXT,
    "num_hidden_layers": 3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

ARCHITECTURES = {
    "llama": lambda: LlamaConfig(**_SHARED, **_ATTENTION, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_SHARED, **_ATTENTION, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**_SHARED, **_ATTENTION, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_SHARED, **_ATTENTION, tie_word_embeddings=False),
    "gemma3": lambda: Gemma3TextConfig(
        **_SHARED, **_ATTENTION, query_pre_attn_scalar=8, sliding_window=4
    ),
    "gpt2": lambda: GPT2Config(
        **{key: _SHARED[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")},
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_inner=HIDDEN,
        n_layer=3,
        n_head=4,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        **_SHARED, num_attention_heads=4, tie_word_embeddings=False, use_parallel_residual=True
    ),
}
"""Configurations of tiny decoders by name."""

ERASERS = {
    "mean_difference": {"method": "mean_difference"},
    "pca": {"method": "pca", "rank": 2},
    "contrastive": {"method": "contrastive", "rank": 2},
    "leace": {"method": "leace"},
}
"""Parameters of SubspaceEraser by name."""

GATES = {
    "diffusion": {"density": "diffusion"},
    "knn": {"density": "knn"},
    "linear": {"density": "linear"},
    "token": {"density": "diffusion", "evidence": "token"},
}
"""Parameters of ForgetGate by name."""

TEXTS = [
    "The capital of France is Paris.",
    "Water boils",
    "A quick brown fox jumps over the lazy dog",
    "x",
    "Iron rusts when it is wet, and copper turns green",
]
"""Texts of very different lengths."""

_CORPUS = [*TEXTS, "The capital of Italy is Rome. The capital of Spain is Madrid. Yes, it is."]


def build_model(name, *, seed=0, dtype=torch.float32, **changes):
    """Randomly initialised model; the global random state is as it was afterwards.

    All parameters are drawn wide, norms and biases too, so that no part of a block is close to
    nothing and no two sites alike.
    """
    config = ARCHITECTURES[name]()
    for field, value in changes.items():
        setattr(config, field, value)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            wide = parameter.ndim > 1
            parameter.copy_(0.25 * noise if wide else parameter + 0.2 * noise)
    return model.to(dtype).eval()


@cache
def _trained():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return made.to_str()


def build_tokenizer(padding_side="right"):
    """Byte-level BPE that puts a bos token before every text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side=padding_side,
    )


def two_classes(n_forget=120, n_retain=160, n_features=12, *, seed=0, shift=2.0, dtype=np.float64):
    """Rows ``X`` and labels ``y``: retain rows correlated, forget rows shifted and stretched."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(n_features, n_features)) / np.sqrt(n_features)
    mixing += np.diag(np.linspace(0.3, 2, n_features))
    X = rng.normal(size=(n_forget + n_retain, n_features)) @ mixing.T + rng.normal(size=n_features)
    y = np.repeat([1, 0], [n_forget, n_retain])
    direction = rng.normal(size=n_features)
    direction /= np.linalg.norm(direction)
    X[y == 1] += shift * direction + 2 * rng.normal(size=(n_forget, 1)) * np.roll(direction, 1)
    order = rng.permutation(len(y))
    return X[order].astype(dtype), y[order]


def state(model):
    """A copy of every weight."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model, before):
    """Whether every weight is what it was, to the bit, and none came or went."""
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)


def hooks(model):
    """How many forward hooks there are."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def logits(model, ids, **keywords):
    """Logits without gradients."""
    with torch.no_grad():
        return model(input_ids=ids, **keywords).logits


def write_lines(path, records):
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
