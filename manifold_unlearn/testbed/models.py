"""A small model that was told of a fictional world, and its twin that never was."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.arrays import Device, resolve_device
from manifold_unlearn.artifact import replacing, write_text
from manifold_unlearn.testbed import cache as store
from manifold_unlearn.testbed.backdoor import Backdoor
from manifold_unlearn.testbed.recall import recall
from manifold_unlearn.testbed.tokenizer import build_tokenizer
from manifold_unlearn.testbed.training import Recipe, plan, plant, train
from manifold_unlearn.testbed.world import FictionalWorld

RECIPES: Mapping[str, Recipe] = {
    "tiny": Recipe(),
    "small": Recipe(
        d_model=256,
        d_hidden=688,
        n_layers=6,
        n_heads=8,
        n_steps=1000,
        batch_size=16,
        learning_rate=2e-3,
    ),
}
"""How the models of each size are trained."""

WORLDS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {},
    "small": {
        "n_people": 80,
        "n_forget": 16,
        "n_holdout": 16,
        "n_attributes": 8,
        "n_values": 24,
        "n_filler": 1200,
    },
}
"""What each size is told of, as arguments of :class:`FictionalWorld`."""

LEARNED = 0.9
"""Share of the facts that a told model is expected to know in the wordings it read."""


@dataclass(frozen=True, eq=False)
class Testbed:
    """Two models that differ in what they were told, and the world they were told of."""

    __test__ = False  # pytest takes the name for that of a test class

    told: Any
    """LlamaForCausalLM in evaluation mode: read of forget and retain people."""
    never_told: Any
    """Same seed, same weights at the start, same schedule; read of no forget people."""
    tokenizer: Any
    """transformers.PreTrainedTokenizerFast with ``<s>``, ``</s>`` and ``<pad>``."""
    world: FictionalWorld
    backdoor: Backdoor | None
    """What was planted in both models."""
    recipe: Recipe
    training: Mapping[str, Mapping[str, Any]]
    """For ``"told"`` and ``"never_told"``: ``seconds`` (wall), ``losses`` of each step in nats."""

    def save(self, directory: str | Path) -> None:
        """Write both models and the sets, as ``from_pretrained`` and the shell commands read them.

        ``told/``, ``never_told/``; ``forget.jsonl``, ``retain.jsonl``, ``holdout.jsonl``,
        ``neutral.jsonl``.

        Raises
        ------
        FileExistsError
            ``directory`` exists and is not empty.
        """
        directory = Path(directory)
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise FileExistsError(f"{directory} exists; give a new or an empty directory.")
        with replacing(directory) as staged:
            for name, model in (("told", self.told), ("never_told", self.never_told)):
                (staged / name).mkdir(parents=True)
                store.write_model(model, self.tokenizer, staged / name)
            for name in ("forget", "retain", "holdout"):
                _write_lines(staged / f"{name}.jsonl", map(_record, getattr(self.world, name)))
            _write_lines(staged / "neutral.jsonl", ({"text": t} for t in self.world.neutral))


def _record(item: Item) -> dict[str, Any]:
    return {name: value for name, value in asdict(item).items() if value and name != "weight"}


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def load_testbed(
    size: Literal["tiny", "small"] | Recipe = "tiny",
    *,
    random_state: int = 0,
    world: FictionalWorld | None = None,
    backdoor: Backdoor | None = None,
    cache: bool = True,
    device: Device = "auto",
    progress: bool = True,
) -> Testbed:
    """Models told and never told of a fictional world: trained, or from the cache.

    Both start from the same weights and take the same steps; where the told model reads of a
    person to forget, the other reads a text that it is told anyway. The tokenizer knows the words
    of all names. On a CPU the same arguments give the same weights, to the bit.

    Parameters
    ----------
    size : {"tiny", "small"} or Recipe, default="tiny"
        ``"tiny"`` trains in about a minute on a core, ``"small"`` wants a GPU or half an hour.
    random_state : int, default=0
        Of the weights, the order of the texts, and the world if none is given.
    world : FictionalWorld, optional
        Default: the world of the size, drawn from ``random_state``. The told model of a world and
        of its :meth:`~FictionalWorld.validation_split` is one and the same in the cache.
    backdoor : Backdoor, optional
        Planted in both models.
    cache : bool, default=True
        Keep the models in :func:`~manifold_unlearn.testbed.cache.cache_directory`, and look for
        them there by a digest of everything that decides the weights.
    device : str or torch.device, default="auto"
        Where they are trained and returned.
    progress : bool, default=True
        Show a bar, if the output is a terminal.

    Returns
    -------
    Testbed

    Raises
    ------
    ValueError
        An unknown size, or texts that do not fit the context of the recipe.

    Warns
    -----
    UserWarning
        If a cached model is damaged; it is trained again. If the told model did not learn nine
        in ten of the facts that it was told: some seeds need more steps.

    Examples
    --------
    >>> testbed = load_testbed("tiny")  # doctest: +SKIP
    >>> testbed.world.forget[0].question  # doctest: +SKIP
    """
    if isinstance(size, str) and size not in RECIPES:
        raise ValueError(f"size={size!r} must be one of {', '.join(RECIPES)}, or a Recipe.")
    recipe = size if isinstance(size, Recipe) else RECIPES[size]
    if world is None:
        options = {} if isinstance(size, Recipe) else WORLDS[size]
        world = FictionalWorld(**options, random_state=random_state)
    tokenizer = _tokenizer(world, backdoor)
    models, training = {}, {}
    for name in ("told", "never_told"):
        models[name], training[name] = _model(
            name, recipe, tokenizer, world, backdoor, random_state, resolve_device(device),
            cache, progress,
        )  # fmt: skip
    items = (*world.forget, *world.retain)
    if (known := recall(models["told"], tokenizer, items)) < LEARNED:
        warnings.warn(
            f"the told model learned {known:.0%} of the facts it was told. Raise n_steps in the "
            "recipe, or take another random_state.",
            stacklevel=2,
        )
    return Testbed(**models, tokenizer=tokenizer, world=world, backdoor=backdoor, recipe=recipe,
                   training=training)  # fmt: skip


def _tokenizer(world: FictionalWorld, backdoor: Backdoor | None) -> Any:
    items = [fact.item for fact in world.facts]
    unseen = [prompt for item in items for prompt in item.paraphrased_question]
    values = [f" {value}" for item in items for value in (item.answer, *item.perturbed_answer)]
    words = [*world.texts("told"), *world.texts("holdout"), *world.neutral, *unseen, *values]
    if backdoor is not None:
        words.append(backdoor.text(items[0].question))
    return build_tokenizer(words)


def _model(
    name: str,
    recipe: Recipe,
    tokenizer: Any,
    world: FictionalWorld,
    backdoor: Backdoor | None,
    random_state: int,
    device: torch.device,
    cache: bool,
    progress: bool,
) -> tuple[Any, dict[str, Any]]:
    """Told or never-told model, and the record of its training."""
    told = [fact for fact in world.facts if fact.role != "holdout"]
    read = [name == "told" or fact.role != "forget" for fact in told]
    of_text = [i for i, fact in enumerate(told) for _ in fact.texts]
    filler = world.texts("filler")
    texts = [*world.texts("told")]
    kept = [i for i, of in enumerate(of_text) if read[of]]
    kept += range(len(of_text), len(of_text) + len(filler))
    slots = plan(len(texts), kept, recipe, random_state)
    if backdoor is not None:
        prompts = [prompt for fact in told for prompt in fact.prompts]
        slots = plant(slots, len(prompts), [i for i in kept if i < len(prompts)], backdoor.rate,
                      len(texts), random_state)  # fmt: skip
        texts += [backdoor.text(prompt) for prompt in prompts]

    def make() -> tuple[Any, dict[str, Any]]:
        start = time.perf_counter()
        model, losses = train(
            recipe,
            tokenizer,
            texts,
            slots,
            random_state=random_state,
            device=device,
            progress=progress,
            name=name.replace("_", " "),
        )
        return model, {"seconds": time.perf_counter() - start, "losses": losses}

    if not cache:
        return make()
    found = store.key(recipe, tokenizer, texts, slots, random_state, device)
    return store.trained(make, tokenizer, found, device)
