import json
from pathlib import Path

import pytest
from cases import TEXTS, build_model, write_lines
from shell import fact

SHARED = Path(__file__).parents[3] / "shared"


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """Two tiny models on disk, and files of questions."""
    root = tmp_path_factory.mktemp("files")
    for name, seed in (("model", 0), ("twin", 1)):
        build_model("llama", seed=seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    write_lines(root / "forget.jsonl", [fact(i, "color") for i in range(5)])
    write_lines(root / "retain.jsonl", [fact(i, "size") for i in range(6)])
    write_lines(root / "texts.jsonl", [{"text": text} for text in TEXTS])
    return root


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    root = SHARED / "models" / "tofu-stories15m"
    if not (root / "told" / "model.safetensors").is_file():
        pytest.skip(f"{root} is not here")
    made = tmp_path_factory.mktemp("tofu")
    for part, name in (("forget", "forget05_perturbed"), ("retain", "retain_perturbed")):
        lines = (SHARED / "data" / "tofu" / f"{name}.jsonl").read_text("utf-8").splitlines()
        records = [json.loads(line) for line in lines[:12]]
        for record in records:  # two alternatives are enough to rank, and quicker
            record["perturbed_answer"] = record["perturbed_answer"][:2]
            record.pop("paraphrased_question", None)
        write_lines(made / f"{part}.jsonl", records)
    return root, made
