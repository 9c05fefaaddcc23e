import sys

import numpy as np
import pytest

SCRIPT = "benchmarks/dictionary_training.py"

SMALL = {"d_in": 16, "d_sae": 32, "k": 4, "batch": 64, "rounds": 3, "steps": 2}


def row(name, cpu, fvu, peak):
    return {"name": name, "cpu_seconds_of_turns": cpu, "fvu": fvu, "peak_mib": peak}


def test_rows_have_the_norm_that_no_library_must_mend(experiment):
    config = experiment.Config(**SMALL)
    rows = experiment.planted(config, 2000, 1)
    assert rows.dtype == np.float32
    assert np.linalg.norm(rows, axis=1).mean() == pytest.approx(4.0, rel=1e-5)
    assert not np.array_equal(rows, experiment.planted(config, 2000, 2))


def test_claims_compare_turn_by_turn_and_leave_out_what_did_not_run(experiment):
    rows = [
        row("ours", [1.0, 2.0, 1.0], 0.5, 10.0),
        row("sparsify", [1.5, 2.0, 1.2], 0.4, 20.0),
        {"name": "saelens", "not_run": "no interpreter given"},
    ]
    found = {c["claim"]: c for c in experiment.claims(rows, "command")}
    assert len(found) == 3
    time, fvu, memory = found.values()
    assert (time["value"], time["holds"]) == (pytest.approx(1.2), False)
    assert (fvu["value"], fvu["holds"]) == (pytest.approx(0.1), False)
    assert (memory["value"], memory["holds"]) == (0.5, True)


@pytest.mark.slow
def test_a_peer_that_cannot_be_imported_is_not_run(experiment):
    config = experiment.Config(**SMALL, peer_python=(f"sparsify={sys.executable}",))
    rows = {row["name"]: row for row in experiment.run(config, "quick")["rows"]}
    assert rows["ours"]["fvu"] < 1 and rows["ours"]["cpu_seconds_a_step"] > 0
    assert "sparsify" in rows["sparsify"]["not_run"]
    assert rows["saelens"]["not_run"] == "no interpreter given"
