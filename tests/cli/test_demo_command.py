import numpy as np
from shell import refused, run

from manifold_unlearn.cli import main
from manifold_unlearn.demo import DemoConfig
from manifold_unlearn.evaluate import Change, Metric
from manifold_unlearn.testbed.facts import topics


def test_the_demo_lists_its_topics(capsys):
    run("demo", "--list-topics")
    assert capsys.readouterr().out.split() == topics()


def test_the_demo_names_the_topics_where_there_is_no_such_one(tmp_path, capsys):
    line = refused(capsys, "demo", "--topic", "alchemy", "--out", tmp_path)
    assert "no topic 'alchemy'; there are" in line
    assert topics()[-1] in line


def test_the_demo_and_its_configuration_have_one_default_topic(monkeypatch, tmp_path):
    seen = []

    def stop(config, out, *, say):
        seen.append(config)
        raise ValueError("seen")

    monkeypatch.setattr("manifold_unlearn.demo.run_demo", stop)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert seen[0].topic == DemoConfig().topic in topics()
    assert seen[0].model == DemoConfig().model


def measured(values_before, values_after):
    names = ("probability", "rank", "rouge_l_recall")
    return {
        name: Change(Metric(name, np.array(values_before)), Metric(name, np.array(values_after)))
        for name in names
    }


def test_the_demo_prints_table_and_verdict(monkeypatch, tmp_path, capsys):
    claims = [
        {"claim": f"{name}: share of probability kept", "value": value, "target": target,
         "holds": holds}
        for name, value, target, holds in (
            ("forget", 0.3, 0.2, False), ("retain", 0.97, 0.95, True)
        )
    ]  # fmt: skip
    quiet = {"perplexity_before": 10.0, "perplexity_after": 10.2, "perplexity_ratio": 1.02}
    result = type("Result", (), {"changes": {"forget": measured([0.5, 0.7], [0.1, 0.26])}})
    found = {"verdict": claims, "neutral": quiet, "seconds_in_all": 61.2, "peak_memory_gib": 1.23}
    asked = []

    def fake(config, out, *, say):
        asked.append((config, out))
        say("loading")
        return result, found

    monkeypatch.setattr("manifold_unlearn.demo.run_demo", fake)
    run("demo", "--topic", "plurals", "--bake", "--rank", 3, "--out", tmp_path)
    config, out = asked[0]
    assert (config.topic, config.bake, config.recipe.rank, out) == ("plurals", True, 3, tmp_path)
    printed = capsys.readouterr().out
    assert "loading" in printed
    row = next(line for line in printed.splitlines() if line.startswith("forget  "))
    assert row.split()[:5] == ["forget", "2", "0.600", "0.180", "30.0%"]
    assert "forget: share of probability kept: 0.300 (target <= 0.2) MISSED" in printed
    assert "retain: share of probability kept: 0.970 (target >= 0.95) holds" in printed
    assert "61 s, 1.2 GiB" in printed


def test_the_demo_can_choose_its_recipe_anew(monkeypatch, tmp_path):
    from manifold_unlearn.recipe.subspace import SubspaceRecipe

    chosen, seen = SubspaceRecipe(rank=7), []

    def stop(config, out, *, say):
        seen.append(config.recipe)
        raise ValueError("seen")

    monkeypatch.setattr("manifold_unlearn.sweep.choose_recipe", lambda *_, **__: chosen)
    monkeypatch.setattr("manifold_unlearn.demo.run_demo", stop)
    assert main(["demo", "--sweep", "--out", str(tmp_path)]) == 2
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert seen == [chosen, SubspaceRecipe()]
