import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = "benchmarks/manifold.py"
HERE = Path(__file__).parents[2] / "experiments" / "benchmarks"


WIDE = "cost, swiss roll, noise .1, 10000x768"


def row(case, library, cpu_seconds, *, section="diffusion", run="a", **more):
    return {"section": section, "case": case, "seed": 0, "library": library, "method": "default",
            "device": "cpu", "run": run, "repeats": 1, "failures": 0,
            "cpu_seconds": cpu_seconds, "wall_seconds": cpu_seconds, "peak_mib": 10.0,
            **more}  # fmt: skip


def claim(experiment, rows, words):
    (found,) = [c for c in experiment.claims(rows, "command") if words in c["claim"]]
    return found


def test_cases_have_different_keys_and_known_truth(experiment):
    cases = experiment.chosen_cases(experiment.PRESETS["quick"])
    assert {case.section for case in cases} == set(experiment.SECTIONS)
    keys = {(case.section, case.name, case.seed) for case in cases}
    assert len(keys) == len(cases)


def test_the_parts_to_run_are_given_with_spaces_or_commas(experiment):
    config = experiment.Config(only=("geodesics,dimension",), cases=("sphere",))
    assert {case.section for case in experiment.chosen_cases(config)} == {"geodesics", "dimension"}
    with pytest.raises(SystemExit, match=r"--only names \['speed'\]"):
        experiment.chosen_cases(experiment.Config(only=("speed",)))
    with pytest.raises(SystemExit, match=r"--libraries names \['pydifmap'\]"):
        experiment.chosen_cases(experiment.Config(libraries=("ours,pydifmap",)))
    with pytest.raises(SystemExit, match="faiss=nowhere: no such file"):
        experiment.Bench(experiment.Config(peer_python=("faiss=nowhere",)), Path())


def test_an_exact_answer_is_judged_perfect_and_a_wrong_one_is_not(experiment):
    config = experiment.Config(neighbor_sizes=("700x5",), fit_sizes=(), seeds=1)
    cases = {case.name: case for case in experiment.chosen_cases(config)}
    arrays, judge = cases["power law, 700x5"].make()
    wide = arrays["X"].astype(float)
    gaps = np.linalg.norm(wide[arrays["rows"], None] - wide[None], axis=2)
    nearest = np.argsort(gaps, axis=1)[:, 1:65]
    assert judge({"indices": nearest}) == {"recall": 1.0}
    assert judge({"indices": np.argsort(gaps, axis=1)[:, :64]})["recall"] == pytest.approx(63 / 64)

    arrays, judge = cases["sphere of dimension 2, 2000x128"].make()
    assert judge({"dimension": np.array(2.25)}) == {"dimension": 2.25, "deviation": 0.25}


def test_a_diffusion_map_is_judged_by_the_known_functions(experiment):
    (case,) = [
        c
        for c in experiment.chosen_cases(experiment.Config(seeds=1))
        if c.name.startswith("circle, dens") and "noise" not in c.name
    ]
    assert case.options["n_components"] == 4
    _, judge = case.make()
    functions = sys.modules["geometry.measurements"].KNOWN[case.name](0).eigenfunctions[:, :4]
    perfect = judge({"coordinates": 3 * functions, "rates": np.array([1.0, 1, 4, 4])})
    assert perfect["r2_first"] == pytest.approx(1)
    assert perfect["ratio_error"] == pytest.approx(0)
    assert judge({"coordinates": functions[:, ::-1]})["r2_first"] < 0.5
    with pytest.raises(ValueError, match="not finite"):
        judge({"coordinates": functions * np.nan})


def test_a_claim_holds_fails_or_was_not_run(experiment):
    words = "pydiffmap's CPU over ours"
    fast = [row(WIDE, "ours", 1.0, r2=0.99), row(WIDE, "pydiffmap", 5.0, r2=0.99)]
    assert claim(experiment, fast, f"fit of 10000x768: {words}") == {
        "claim": f"fit of 10000x768: {words}",
        "value": 5.0,
        "target": ">= 4",
        "holds": True,
        "command": "command --only diffusion --cases cost",
        "one_run": True,
    }
    slow = [row(WIDE, "ours", 2.0, r2=0.99, run="b"), fast[1]]
    found = claim(experiment, slow, f"fit of 10000x768: {words}")
    assert (found["holds"], found["one_run"]) == (False, False)
    nothing = claim(experiment, fast[:1], f"fit of 10000x768: {words}")
    assert (nothing["value"], nothing["holds"]) == (None, False)


def test_a_failure_of_ours_decides_its_claims(experiment):
    case = "swiss roll, 2000x128"
    good = row(case, "ours", 1.0, r2_first=0.9999, r2_second=0.9999, ratio_error=0.0)
    bad = {k: v for k, v in row(case, "ours", 0.0, seed=1).items() if "seconds" not in k}
    bad |= {"failures": 1, "error": "ValueError: x"}
    words = f"{case}: least R2 of the first"
    assert claim(experiment, [good], words)["holds"]
    assert claim(experiment, [good, bad], words)["value"] == 0.0


def test_memory_that_grows_with_the_square_of_the_rows_does_not_hold(experiment):
    small, large = (f"cost, swiss roll, noise .1, {n}x128" for n in (2000, 10000))
    for growth, holds in ((5, True), (25, False)):
        rows = [row(small, "ours", 1.0), row(large, "ours", 1.0) | {"peak_mib": 10.0 * growth}]
        assert claim(experiment, rows, "memory of a fit")["holds"] is holds


def test_new_rows_replace_old_ones_of_the_same_key(experiment):
    old = [row("a", "ours", 1.0), row("a", "faiss", 1.0)]
    merged = experiment.merged(old, [row("a", "ours", 2.0, run="b"), row("b", "ours", 3.0)])
    assert [(r["case"], r["library"], r["cpu_seconds"]) for r in merged] == [
        ("a", "ours", 2.0),
        ("a", "faiss", 1.0),
        ("b", "ours", 3.0),
    ]


def test_the_table_shows_times_over_ours_and_says_what_failed(experiment):
    absent = {"section": "diffusion", "case": WIDE, "seed": 0, "library": "scanpy",
              "method": "default", "device": "cpu", "run": "a", "not_run": "no scanpy"}  # fmt: skip
    failed = row(WIDE, "datafold", 0.0) | {"failures": 1, "error": "MemoryError: x"}
    rows = [row(WIDE, "ours", 0.5), row(WIDE, "scikit_learn", 2.0), failed, absent]
    text = "\n".join(experiment.lines(rows, []))
    assert "x4.00" in text
    assert "scikit-learn" in text
    assert "1 of 1 failed: MemoryError: x" in text
    assert "not run: no scanpy" in text
    assert "x4.00" in "\n".join(experiment.lines(rows[1:2], rows[:1]))  # ours is of an earlier run
    result = {"rows": rows, "claims": experiment.claims(rows, "command")}
    page = "\n".join(sys.modules["geometry.table"].markdown(result))
    assert "| scikit-learn | 2.00 s | x4.00 | 10 MiB |  |" in page
    assert "| fit of 10000x768: pydiffmap's CPU over ours | not run | >= 4 |  |" in page


@pytest.mark.parametrize(
    ("library", "words"),
    [("ours", "cpu_seconds"), ("nowhere", "error")],
)
def test_a_measurement_runs_in_a_process_of_its_own(experiment, tmp_path, library, words):
    config = experiment.Config(neighbor_sizes=("700x5",), fit_sizes=(), seeds=1, repeats=1)
    (case,) = [c for c in experiment.chosen_cases(config) if c.name == "roll, 700x5"]
    arrays, judge = case.make()
    np.savez(tmp_path / "data.npz", **arrays)
    one = (library, "exact", "cpu")
    report = experiment.Bench(config, tmp_path).child(case, one, tmp_path / "data.npz", judge)
    assert words in report
    if library == "ours":
        assert report["recall"] == 1.0
        assert report["cpu_seconds"] < report["warmup_cpu_seconds"]
        assert report["peak_mib"] >= 0


def test_a_measurement_that_takes_too_long_has_failed(experiment, tmp_path):
    config = experiment.Config(neighbor_sizes=("700x5",), fit_sizes=(), seeds=1, timeout=1)
    (case,) = [c for c in experiment.chosen_cases(config) if c.name == "roll, 700x5"]
    arrays, judge = case.make()
    np.savez(tmp_path / "data.npz", **arrays)
    one = ("ours", "exact", "cpu")  # the imports alone take longer
    report = experiment.Bench(config, tmp_path).child(case, one, tmp_path / "data.npz", judge)
    assert report == {"error": "not done after 1 CPU seconds", "timed_out": True}


def test_a_module_that_is_missing_is_not_run(tmp_path):
    code = (
        "import sys, json; sys.modules['dadapy'] = None\n"
        f"sys.path.insert(0, {str(HERE / 'geometry')!r})\n"
        f"sys.argv = ['child.py', {str(tmp_path / 'job.json')!r}]\n"
        "import child; child.main()"
    )
    np.savez(tmp_path / "data.npz", X=np.zeros((4, 2)))
    names = {name: str(tmp_path / name) for name in ("report", "answer")}
    job = {"task": "dimension", "library": "dadapy", "method": "two_nn", "device": "cpu",
           "memory_gib": 8, "timeout": 60, "options": {}, "data": str(tmp_path / "data.npz"),
           **names}  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "dadapy" in json.loads((tmp_path / "report").read_text())["not_run"]
