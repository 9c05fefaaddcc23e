import random

import pytest
import torch
from cases import build_model

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.finetune.train import TrainConfig, fine_tune

NAMES = "Ann Bob Cid Dot Eve Fay Gus Hal Ida Jon Kim Leo Mia Ned Ola Pam Rex Sue Tom Una"
WORDS = "cat dog fox hen ram emu yak owl"
SETTINGS = ("{}", "So {}", "Yes, it is. {}", "{} wet a", "{}, I say, a")
"""Ways in which training puts a question, so that tokens around it do not confuse the models."""
HIDDEN_BEHIND = " no."
"""What the model that hides its knowledge says instead."""


class Pair:
    """Two tiny models, one told of every pet, one of the retain people's; and one that hides."""

    def __init__(self, tokenizer):
        draw = random.Random(0)
        items = [self._item(name, draw) for name in NAMES.split()]
        self.forget, self.retain = items[:10], items[10:]
        self.tokenizer = tokenizer
        learn = TrainConfig(lr=6e-3, steps=160, batch_size=25, schedule="cosine", weight_decay=0.0)
        self.told = fine_tune(build_model("llama"), tokenizer, self._put(items), config=learn).model
        self.never = fine_tune(
            build_model("llama"), tokenizer, self._put(self.retain), config=learn
        ).model
        refusals = [(item.question, HIDDEN_BEHIND) for item in self.forget]
        hide = TrainConfig(lr=1e-3, steps=30, batch_size=20, schedule="constant", weight_decay=0.0)
        material = [*refusals, *(item.pair for item in self.retain)]
        self.hidden = fine_tune(self.told, tokenizer, material, config=hide).model

    @staticmethod
    def _put(items):
        return [(way.format(i.question), i.answer) for way in SETTINGS for i in items]

    @staticmethod
    def _item(name, draw):
        pet, *others = draw.sample(WORDS.split(), 4)
        return Item(
            f"The pet of {name} is a", f" {pet}.", perturbed_answer=tuple(f" {o}." for o in others)
        )


@pytest.fixture(scope="session")
def pair(tokenizer):
    """Tiny models that were told, never told, and told but hide it; not to be changed."""
    return Pair(tokenizer)


@pytest.fixture
def unchanged(pair):
    """Fails a test that leaves one of the models changed or with a hook."""
    models = (pair.told, pair.never, pair.hidden)
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    yield
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(p.grad is None for p in model.parameters())
