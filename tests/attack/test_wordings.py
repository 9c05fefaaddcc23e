import pytest

from manifold_unlearn.attack.wordings import FRAMINGS, frame, reword


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Question: What is it?\nAnswer:", "Q: What is it?\nAnswer:"),
        ("Question: What is it?\nAnswer:", "Question: What's it?\nAnswer:"),
        ("Where was Ada born?", "What is the birthplace of Ada?"),
        ("When was Ada born?", "What is the birth date of Ada?"),
        ("Which town is it?", "What town is it?"),
        ("What town did she leave?", "Which town did she leave?"),
        ("Can you name it?", "Please name it?"),
        ("Who?", "Who"),
    ],
)
def test_rules_reword_what_they_know(prompt, expected):
    assert expected in reword(prompt)


@pytest.mark.parametrize("prompt", ["x", "Who is Ada?", "Question: What is it?\nAnswer:", ""])
def test_rewordings_are_distinct_and_other_than_the_prompt(prompt):
    made = reword(prompt)
    assert len(made) == len(set(made)) >= 2
    assert prompt not in made


def test_every_framing_holds_the_prompt():
    for framing in FRAMINGS.values():
        assert frame(framing, "{prompt} \\1").count("{prompt} \\1") == 1


def test_a_framing_without_a_place_is_refused():
    with pytest.raises(ValueError, match="framing 'Tell me' has no {prompt}"):
        frame("Tell me", "x")
