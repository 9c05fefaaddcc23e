"""Two processes train one dictionary: alike after every step, and as their mean gradient says."""

import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = textwrap.dedent("""
    import os, sys
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file
    from manifold_unlearn.dictionary import *

    torch.set_num_threads(1)
    rank, folder, kind, stop = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = torch.randn(1024, 16, generator=torch.Generator().manual_seed(5))
    rows = rows * (torch.arange(16) + 1)
    config = DictionaryTraining(
        n_steps=12, batch_size=64, lr=1e-2, dead_after=300, resample_every=4, log_every=4
    )

    class Stream:
        batch_size = 64

        def __init__(self):
            self.stream = stream_rows(rows, batch_size=64)

        def walk(self, start, rank, world):
            share = (0, 1) if kind == "same" else (rank, world)
            walk = self.stream.walk(start, *share)
            for k, found in enumerate(walk):
                if k == stop:
                    raise KeyboardInterrupt
                yield found

    sae = SparseAutoencoder(16, 64, {"name": "batch_topk", "k": 1}, random_state=rank)
    history = None
    try:
        history = train_dictionaries(sae, Stream(), config, checkpoint=f"{folder}/checkpoint")
    except KeyboardInterrupt:
        pass
    state = {k: v.contiguous() for k, v in sae.state_dict().items()}
    if history is not None:
        state["dead"] = torch.tensor([m.dead for m in history.of()])
        state["tokens"] = torch.tensor([m.n_tokens for m in history.of()])
    save_file(state, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()
""")


def run_two(folder, *, same=False, stop=-1):
    """State of each process after training."""
    (folder / "meet").unlink(missing_ok=True)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    kind = "same" if same else "other"
    each = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder), kind, str(stop)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in each:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.slow
def test_processes_stay_alike_and_resume(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir(), part.mkdir()
    first, second = run_two(whole)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["tokens"].tolist() == [4 * 128, 8 * 128, 12 * 128]
    run_two(part, stop=5)
    resumed, _ = run_two(part)
    assert all(torch.equal(first[name], resumed[name]) for name in first)


@pytest.mark.slow
def test_gradients_are_averaged(tmp_path):
    """Where both read the same rows, the mean of both gradients is the gradient of one."""
    from manifold_unlearn.dictionary import (
        DictionaryTraining,
        SparseAutoencoder,
        stream_rows,
        train_dictionaries,
    )

    both, _ = run_two(tmp_path, same=True)
    rows = torch.randn(1024, 16, generator=torch.Generator().manual_seed(5))
    rows = rows * (torch.arange(16) + 1)
    alone = SparseAutoencoder(16, 64, {"name": "batch_topk", "k": 1}, random_state=0)
    config = DictionaryTraining(
        n_steps=12, batch_size=64, lr=1e-2, dead_after=150, resample_every=4, log_every=4
    )
    history = train_dictionaries(alone, stream_rows(rows, batch_size=64), config)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(both[name], value, rtol=1e-4, atol=1e-6)
    assert both["dead"].tolist() == pytest.approx([m.dead for m in history.of()])
