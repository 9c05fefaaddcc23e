import pytest
import torch
from cases import TEXTS, hooks, same_state, state

from manifold_unlearn import capture
from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.intervene.block_stream import BlockStream, tapped
from manifold_unlearn.intervene.linear import linear_at
from manifold_unlearn.intervene.targets import token_rows


@pytest.mark.parametrize("budget", [1, 4096], ids=["one text a part", "all together"])
def test_blocks_led_by_hand_are_the_forward_pass(model, tokenizer, budget):
    """Also behind masks that differ by layer, as sliding windows do."""
    before = state(model)
    decoder = find_decoder(model)
    read = capture(model, tokenizer, TEXTS, ["layers.0", "layers.1", "layers.2"])
    with torch.no_grad():
        stream = BlockStream(model, token_rows(model, tokenizer, TEXTS), token_budget=budget)
        assert len(stream.parts) == (len(TEXTS) if budget == 1 else 1)
        for layer in range(3):
            for part in stream:
                part.hidden = part.through(decoder.blocks[layer], layer)
                for i, hidden, present in zip(part.index, part.hidden, part.present, strict=True):
                    expected = read[f"layers.{layer}"][read.text_index == i]
                    torch.testing.assert_close(hidden[present], expected, rtol=1e-4, atol=1e-4)
    assert same_state(model, before)
    assert hooks(model) == 0


def test_recording_the_calls_leaves_the_blocks_as_they_were(llama, tokenizer):
    rows = token_rows(llama, tokenizer, TEXTS)
    BlockStream(llama, rows)
    assert not any("forward" in vars(module) for module in llama.modules())
    block = llama.model.layers[0]
    block.forward = own = block.forward  # as accelerate leaves it
    rows.input_ids[0, 0] = 10**6
    with pytest.raises(IndexError, match="index out of range"):
        BlockStream(llama, rows)
    assert vars(block)["forward"] is own
    assert not any("forward" in vars(module) for module in llama.model.layers[1:].modules())


def test_taps_read_what_goes_in_and_what_comes_out(llama, tokenizer):
    rows = token_rows(llama, tokenizer, TEXTS)
    writers = [linear_at(llama, f"layers.0.{part}") for part in ("attn", "mlp")]
    with torch.no_grad():
        stream = BlockStream(llama, rows)
        with tapped(writers) as seen:
            stream.parts[0].through(llama.model.layers[0], 0)
            for writer, (given, written) in zip(writers, seen, strict=True):
                torch.testing.assert_close(given @ writer.module.weight.T, written)
    assert hooks(llama) == 0
