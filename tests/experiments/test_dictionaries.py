"""What is claimed of dictionaries of all layers follows from what was measured."""

import json

import numpy as np
import pytest

SCRIPT = "dictionaries.py"


def rows_of(experiment, *, worst=0.96, whole=0.95):
    config = experiment.Config(ks=(8, 32, 64))
    rows = [
        {"site": site, "k": k, "recovery": value if k == 32 else 0.5}
        for k in config.ks
        for site, value in (("layers.0", 0.99), ("layers.1", worst), ("all", whole))
    ]
    return config, rows


@pytest.mark.parametrize(
    ("measured", "hold"),
    [({}, [True, True]), ({"worst": 0.94}, [False, True]), ({"whole": 0.94}, [True, False])],
)
def test_claims_are_of_the_largest_k_within_the_target(experiment, measured, hold):
    config, rows = rows_of(experiment, **measured)
    assert [c["holds"] for c in experiment.claims(rows, config, "command")] == hold


def test_the_frontier_has_the_middle_the_worst_and_all_at_once(experiment):
    config, rows = rows_of(experiment)
    (ax,) = experiment.frontier(rows, config).axes
    drawn = {line.get_gid(): line.get_ydata() for line in ax.get_lines() if line.get_gid()}
    np.testing.assert_allclose(drawn["One block, the median"], [0.5, 0.975, 0.5])
    np.testing.assert_allclose(drawn["One block, the worst"], [0.5, 0.96, 0.5])
    np.testing.assert_allclose(drawn["All blocks at once"], [0.5, 0.95, 0.5])


def test_texts_are_read_in_passages_and_held_out_ones_are_never_seen(experiment, tmp_path):
    path = tmp_path / "texts.jsonl"
    records = [{"text": " ".join(f"w{i}" for i in range(130))}, {"question": "Who?", "answer": "A"}]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    texts = experiment.read_texts(experiment.Config(texts=str(path)))
    assert [len(text.split()) for text in texts] == [64, 64, 2, 2]
    seen, unseen = experiment.split([str(i) for i in range(40)], experiment.Config())
    assert len(unseen) == 2 and sorted(map(int, seen + unseen)) == list(range(40))
