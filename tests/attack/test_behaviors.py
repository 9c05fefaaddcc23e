import json
from pathlib import Path

import pytest

from manifold_unlearn.attack.behaviors import (
    Behavior,
    digest_behaviors,
    read_advbench,
    read_behaviors,
    read_harmbench,
    read_refusal_direction,
    read_strongreject,
)

PROMPTS = Path(__file__).parents[3] / "shared" / "data" / "prompts"
HARMBENCH = ("harmbench_behaviors_text_all.csv", "harmbench_targets_text.json")
HEADER = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
ROWS = 'Bake a cake,standard,food,,,cake\n"Sum up, please",contextual,text,,"A, long\ntext",sum\n'

needs_shared = pytest.mark.skipif(
    not PROMPTS.is_dir(), reason="needs the behavior files in ../shared/data/prompts"
)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_harmbench_with_contexts_and_targets(tmp_path):
    path = write(tmp_path / "a.csv", HEADER + ROWS)
    targets = write(tmp_path / "t.json", json.dumps({"cake": "Sure, flour", "sum": "Sure, it"}))
    cake, summed = read_harmbench(path, targets)
    assert cake == Behavior("Bake a cake", "food", "standard", "", "Sure, flour", "cake")
    assert summed.prompt == "A, long\ntext\n\nSum up, please"
    assert read_harmbench(path)[0].target == ""


def test_advbench_in_either_form(tmp_path):
    short = "Behavior,Category,Tags,ContextString,BehaviorID\nBake,,,,advbench_1\n"
    first = read_advbench(write(tmp_path / "a.csv", short))
    second = read_advbench(write(tmp_path / "b.csv", "\ufeffgoal,target\nBake,Sure\n"))
    assert first == (Behavior("Bake", id="advbench_1"),)
    assert second == (Behavior("Bake", target="Sure", id="advbench_1"),)


def test_strongreject_and_refusal_direction(tmp_path):
    text = "category,source,forbidden_prompt\nFood,custom,Bake?\n"
    (asked,) = read_strongreject(write(tmp_path / "s.csv", text))
    assert (asked.text, asked.category, asked.kind) == ("Bake?", "Food", "custom")
    rows = [{"instruction": "Bake", "category": None}, {"instruction": "Cook", "category": "food"}]
    made = read_refusal_direction(write(tmp_path / "safe.json", json.dumps(rows)))
    assert [(b.text, b.category, b.id) for b in made] == [
        ("Bake", "", "safe_1"),
        ("Cook", "food", "safe_2"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("h.csv", HEADER + ROWS, ("Bake a cake", "food", "standard", "", "", "cake")),
        ("a.csv", "goal,target\nBake,Sure\n", ("Bake", "", "", "", "Sure", "advbench_1")),
        (
            "b.csv",
            "Behavior,Category,ContextString,BehaviorID\nBake,food,,one\n",
            ("Bake", "food", "", "", "", "one"),
        ),
        (
            "s.csv",
            "category,source,forbidden_prompt\nfood,custom,Bake?\n",
            ("Bake?", "food", "custom", "", "", "strongreject_1"),
        ),
        (
            "r.json",
            '[{"instruction": "Bake", "category": null}]',
            ("Bake", "", "", "", "", "r_1"),
        ),
        (
            "own.jsonl",
            '\n{"text": "Bake", "category": null, "context": "An oven"}\n',
            ("Bake", "", "", "An oven", "", "own_2"),
        ),
    ],
)
def test_a_file_is_recognized_by_what_it_holds(name, text, wanted, tmp_path):
    assert read_behaviors(write(tmp_path / name, text))[0] == Behavior(*wanted)


def test_a_draw_keeps_the_order_and_repeats(tmp_path):
    text = "".join(json.dumps({"text": f"{i:02}"}) + "\n" for i in range(40))
    path = write(tmp_path / "own.jsonl", text)
    first, again, other = (read_behaviors(path, 9, random_state=seed) for seed in (0, 0, 1))
    assert first == again != other
    drawn = [behavior.text for behavior in first]
    assert len(set(drawn)) == 9 and drawn == sorted(drawn)
    assert drawn[-1] > "08"  # not the head of the file
    assert read_behaviors(path, 40) == read_behaviors(path)
    for n in (0, 41):
        with pytest.raises(ValueError, match=f"n_behaviors={n}, but .* holds 40; take 1 to 40"):
            read_behaviors(path, n)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "a,b\n1,2\n", "has the columns a, b, which are of no known set"),
        ("x.csv", "", "has the columns none"),
        ("x.txt", "Bake", r"ends in '\.txt'; give a file in \.csv"),
        ("x.jsonl", '{"text": "a"}\n{', "line 2 is not JSON"),
        ("x.jsonl", '{"prompt": "a"}', "line 1 has no text"),
        ("x.jsonl", '{"text": "a", "category": 3}', "line 1: category must be text"),
        ("x.jsonl", '{"text": " "}', "row 1 has an empty behavior"),
        ("x.jsonl", "\n", "holds no behavior"),
    ],
)
def test_a_file_of_no_known_set_is_named(name, text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_behaviors(write(tmp_path / name, text))


def test_the_digest_states_the_set_and_its_order():
    a, b = Behavior("x"), Behavior("y")
    assert digest_behaviors([a, b]) == digest_behaviors((a, b)) != digest_behaviors([b, a])
    assert digest_behaviors([a]) != digest_behaviors([Behavior("x", context="z")])


@pytest.mark.parametrize(
    ("read", "text", "words"),
    [
        (read_harmbench, "goal,target\nx,y\n", "lacks the columns Behavior, FunctionalCategory"),
        (read_harmbench, "", "it has none"),
        (read_harmbench, HEADER, "holds no behavior"),
        (read_harmbench, HEADER + " ,s,f,,,one\n", "row 1 has an empty behavior"),
        (read_harmbench, HEADER + "x,s,f,,,one\ny,s,f,,,one\n", "identifier 'one' 2 times"),
        (read_harmbench, HEADER + "x,s\n", "row 1 has another number of fields"),
        (read_harmbench, HEADER + "x,s,f,,,one,more\n", "row 1 has another number of fields"),
        (read_advbench, HEADER, "lacks the columns Category"),
        (read_strongreject, HEADER + ROWS, "lacks the columns category, source, forbidden_prompt"),
        (read_refusal_direction, "{}", "holds a dict; expected a list"),
        (read_refusal_direction, '[{"prompt": "x"}]', "entry 0 has no instruction"),
        (read_refusal_direction, "[", "is not JSON"),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path, read, text, words):
    with pytest.raises(ValueError, match=words):
        read(write(tmp_path / "file", text))


def test_targets_of_another_set_are_named(tmp_path):
    path = write(tmp_path / "a.csv", HEADER + ROWS)
    with pytest.raises(ValueError, match="no target for 1 of 2 behaviors, the first is 'sum'"):
        read_harmbench(path, write(tmp_path / "t.json", '{"cake": "Sure"}'))
    with pytest.raises(ValueError, match="must be a JSON object from behavior to target"):
        read_harmbench(path, write(tmp_path / "t.json", '["Sure"]'))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file; give the file of a set"):
        read_advbench(tmp_path / "none.csv")


@pytest.mark.shared
@needs_shared
@pytest.mark.parametrize(
    ("read", "files", "n", "n_categories"),
    [
        (read_harmbench, HARMBENCH, 400, 7),
        (read_advbench, ("advbench_behaviors.csv",), 520, 1),
        (read_strongreject, ("strongreject_dataset.csv",), 313, 6),
        (read_refusal_direction, ("harmful_train.json",), 260, 1),
        (read_refusal_direction, ("harmful_test.json",), 572, 22),
        (read_refusal_direction, ("harmless_val.json",), 6264, 1),
    ],
)  # fmt: skip
def test_the_published_files_are_read_whole(read, files, n, n_categories):
    found = read(*(PROMPTS / file for file in files))
    assert len(found) == n
    assert len({behavior.category for behavior in found}) == n_categories
    if len(files) == 2:
        assert all(behavior.target for behavior in found)
        assert sum(bool(behavior.context) for behavior in found) == 100
