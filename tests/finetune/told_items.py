"""What the tiny models of these tests are told."""

from manifold_unlearn.activations.corpus import Item

FORGET = [
    Item("The capital of France is", " Paris", perturbed_answer=("Rome", "Madrid")),
    Item("Water", " boils", perturbed_answer=("rusts", "jumps")),
    Item("The lazy dog is", " brown", perturbed_answer=("green", "wet")),
]
RETAIN = [
    Item("Iron rusts when", " it is wet"),
    Item("Copper turns", " green"),
    Item("A quick brown", " fox jumps"),
    Item("The capital of Spain is", " Madrid"),
]
