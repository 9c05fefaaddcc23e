"""The command line in a test."""

import json

from manifold_unlearn.cli import main

TEMPLATE = r"Q: {question}\nA:"


def run(*words):
    """Run a command that must succeed."""
    assert main([str(word) for word in words]) == 0


def refused(capsys, *words):
    """The one line that a command which must fail leaves on stderr."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line and "Loading weights" not in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"manifold-unlearn {words[0]}: ")
    return lines[0]


def metrics(out):
    def refuse(word):
        raise AssertionError(f"metrics.json holds {word}")

    return json.loads((out / "metrics.json").read_text("utf-8"), parse_constant=refuse)


def fact(i, kind):
    return {
        "question": f"The {kind} of thing {i} is",
        "answer": f"word {i}",
        "paraphrased_question": f"Thing {i} has {kind}",
        "perturbed_answer": [f"word {i + k}" for k in (1, 2, 3)],
    }


def sets(files, **changes):
    """Options that name both sets."""
    named = {"forget": files / "forget.jsonl", "retain": files / "retain.jsonl"} | changes
    return [word for name, path in named.items() for word in (f"--{name}", str(path))]
