import numpy as np
import pytest
import torch
from cases import TEXTS, build_model, hooks, same_state, state

from manifold_unlearn import capture, intervene
from manifold_unlearn.intervene.targets import (
    aligned,
    counterfactual_targets,
    hooked_targets,
    own_targets,
    token_rows,
)

TOLD = ["Ann lives in Rome and likes tea.", "In Rome there is Ann.", "Ann is old."]
OTHER = ["Bob lives in Rome and likes tea.", "In Rome there is Bob.", "Bob is old."]


def residuals(model, ids):
    """Stream behind each block, read off the model's own hidden_states (the last is normed)."""
    with torch.no_grad():
        return model(input_ids=ids, output_hidden_states=True).hidden_states[1:]


def test_rows_hold_the_texts_and_know_their_cost(llama, tokenizer):
    rows = token_rows(llama, tokenizer, TEXTS)
    encoded = [tokenizer(text).input_ids for text in TEXTS]
    assert len(rows) == len(TEXTS)
    assert rows.n_tokens == sum(map(len, encoded))
    for ids, mask, where, expected in zip(
        rows.input_ids, rows.attention_mask, rows.where, encoded, strict=True
    ):
        n = len(expected)
        assert ids[:n].tolist() == expected
        assert mask.tolist() == [1] * n + [0] * (len(mask) - n)
        assert where.tolist() == mask.bool().tolist()


def test_rows_taken_are_cut_to_the_longest(llama, tokenizer):
    rows = token_rows(llama, tokenizer, TEXTS)
    taken = rows.take([3, 1])
    lengths = rows.attention_mask.sum(1)
    assert taken.attention_mask.sum(1).tolist() == [int(lengths[3]), int(lengths[1])]
    assert taken.input_ids.shape[1] == max(int(lengths[3]), int(lengths[1]))


def test_own_states_are_those_of_the_forward_pass(model, tokenizer):
    targets = own_targets(model, tokenizer, TEXTS, layers=[0, 1])
    assert sorted(targets.states) == [0, 1]
    for i, text in enumerate(TEXTS):
        ids = torch.tensor([tokenizer(text).input_ids])
        one = targets.take([i])
        for layer in (0, 1):
            expected = residuals(model, ids)[layer][0]
            torch.testing.assert_close(one.states[layer], expected, rtol=1e-4, atol=1e-4)


def test_taken_states_follow_their_texts(llama, tokenizer):
    masks = [np.arange(len(tokenizer(text).input_ids)) % 2 == 0 for text in TEXTS]
    targets = own_targets(llama, tokenizer, TEXTS, where=masks)
    again = targets.take([4, 0, 4])
    sizes = [int(mask.sum()) for mask in masks]
    starts = np.cumsum([0, *sizes])
    expected = torch.cat([targets.states[2][starts[i] : starts[i + 1]] for i in (4, 0, 4)])
    assert torch.equal(again.states[2], expected)
    assert int(again.where.sum()) == len(expected)


def test_counterfactual_states_stand_from_the_name_on(llama, tokenizer):
    targets = counterfactual_targets(llama, tokenizer, TOLD, OTHER)
    assert len(targets) == 3
    for i in range(3):
        ids, other = (torch.tensor(tokenizer(t[i]).input_ids) for t in (TOLD, OTHER))
        assert len(ids) == len(other)
        first = int((ids != other).nonzero()[0])
        one = targets.take([i])
        assert one.where[0].tolist() == [False] * first + [True] * (len(ids) - first)
        expected = residuals(llama, other[None])[1][0, first:]
        torch.testing.assert_close(one.states[1], expected, rtol=1e-4, atol=1e-4)


def test_names_of_other_lengths_are_aligned_from_their_last_token():
    ids, others = torch.tensor([0, 5, 6, 7, 8, 1, 5, 6, 2]), torch.tensor([0, 9, 7, 8, 1, 9, 2])
    left, right = aligned(ids, others)
    assert left.tolist() == [2, 3, 4, 5, 7, 8]  # 6|9, then 7 8 1 alike, 6|9, 2
    assert right.tolist() == [1, 2, 3, 4, 5, 6]


def test_runs_of_one_length_are_aligned_one_by_one_also_in_longer_texts():
    left, right = aligned(torch.tensor([0, 5, 6, 1, 7, 8]), torch.tensor([0, 3, 4, 1, 8]))
    assert left.tolist() == [1, 2, 3, 5]
    assert right.tolist() == [1, 2, 3, 4]


def test_a_text_that_is_its_own_counterfactual_drops_out(llama, tokenizer):
    with pytest.warns(UserWarning, match="1 of 3 texts are left out, the first is text 1"):
        targets = counterfactual_targets(llama, tokenizer, TOLD, [OTHER[0], TOLD[1], OTHER[2]])
    assert len(targets) == 2
    alone = counterfactual_targets(llama, tokenizer, [TOLD[2]], [OTHER[2]])
    torch.testing.assert_close(targets.take([1]).states[0], alone.states[0])
    with pytest.raises(ValueError, match="none of the 3 texts has a target"):
        counterfactual_targets(llama, tokenizer, TOLD, TOLD)


def test_prompt_and_answer_pairs_are_aligned_too(llama, tokenizer):
    pairs = [("Ann lives in", " Rome")], [("Bob lives in", " Rome")]
    whole = counterfactual_targets(llama, tokenizer, ["Ann lives in Rome"], ["Bob lives in Rome"])
    paired = counterfactual_targets(llama, tokenizer, *pairs)
    assert torch.equal(whole.where, paired.where)


def late_map(h):
    """Moves the rows from the fourth on."""
    moved = h.clone()
    moved[:, 3:] += 1.0
    return moved


def test_hooked_states_are_those_under_the_hooks(llama, tokenizer):
    before = state(llama)
    targets = hooked_targets(llama, tokenizer, [TEXTS[0]], {"layers.1": late_map})
    assert hooks(llama) == 0
    assert same_state(llama, before)
    with intervene(llama, {"layers.1": late_map}):
        hooked = capture(llama, tokenizer, [TEXTS[0]], ["layers.1", "layers.2"])
    assert targets.where[0].tolist() == [False] * 3 + [True] * (targets.where.shape[1] - 3)
    for layer in (1, 2):
        assert torch.equal(targets.states[layer], hooked[f"layers.{layer}"][3:])
    assert sorted(targets.states) == [1, 2]
    everywhere = hooked_targets(llama, tokenizer, [TEXTS[0]], {"layers.1": late_map}, where="all")
    assert torch.equal(everywhere.states[2], hooked["layers.2"])


def test_texts_that_the_hooks_leave_alone_drop_out(llama, tokenizer):
    short = [text for text in TEXTS if len(tokenizer(text).input_ids) <= 3]
    assert short
    with pytest.warns(UserWarning, match="1 of 2 texts are left out, the first is text 1"):
        targets = hooked_targets(llama, tokenizer, [TEXTS[0], short[0]], {"layers.1": late_map})
    assert len(targets) == 1
    with pytest.raises(ValueError, match="the hooks change no token"):
        hooked_targets(llama, tokenizer, [TEXTS[0]], {"layers.1": lambda h: h})


def test_an_exception_in_a_map_leaves_no_hook(llama, tokenizer):
    def broken(h):
        raise RuntimeError("a broken map")

    with pytest.raises(RuntimeError, match="a broken map"):
        hooked_targets(llama, tokenizer, TEXTS, {"layers.1": broken})
    assert hooks(llama) == 0


@pytest.mark.parametrize("layers", [[], [3], [-1, 0]])
def test_blocks_must_exist(llama, tokenizer, layers):
    with pytest.raises(ValueError, match="at least one of the blocks 0 to 2"):
        own_targets(llama, tokenizer, TEXTS, layers=layers)


def test_every_text_needs_its_counterfactual(llama, tokenizer):
    with pytest.raises(ValueError, match="3 texts and 2 counterfactuals"):
        counterfactual_targets(llama, tokenizer, TOLD, OTHER[:2])


def test_a_text_longer_than_the_context_is_named(llama, tokenizer):
    with pytest.raises(ValueError, match="the model takes 64"):
        token_rows(llama, tokenizer, ["fox " * 80])


def test_half_precision_states_stay_half(tokenizer):
    targets = own_targets(build_model("llama", dtype=torch.bfloat16), tokenizer, TEXTS)
    assert {values.dtype for values in targets.states.values()} == {torch.bfloat16}
