import shutil

import pytest
from cases import write_lines
from shell import fact, refused, sets

import manifold_unlearn
from manifold_unlearn.cli import main


@pytest.mark.parametrize("command", ["demo", "capture", "unlearn", "evaluate", "attack"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main([command, "--help"])
    assert f"usage: manifold-unlearn {command}" in capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"\n    {command} " in printed for command in ("demo", "capture", "evaluate"))


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == manifold_unlearn.__version__


@pytest.mark.parametrize(
    "words", [[], ["forgive"], ["evaluate", "m"], ["unlearn", "m", "--method", "amnesia"]]
)
def test_a_wrong_call_is_status_2_with_usage(words, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(words)
    assert "usage: manifold-unlearn" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "unlearn"])
class TestMistakes:
    def test_a_set_that_is_not_there(self, command, files, tmp_path, capsys):
        wrong = sets(files, forget=tmp_path / "none.jsonl")
        line = refused(capsys, command, files / "model", *wrong, "--out", tmp_path)
        assert line.endswith("none.jsonl is not a file; give a JSONL file.")

    def test_a_line_that_is_not_json(self, command, files, tmp_path, capsys):
        lines = (files / "retain.jsonl").read_text("utf-8").splitlines()
        lines[3:3] = ["", '{"question": "what'][:2]
        (tmp_path / "bad.jsonl").write_text("\n".join(lines), "utf-8")
        wrong = sets(files, retain=tmp_path / "bad.jsonl")
        line = refused(capsys, command, files / "model", *wrong, "--out", tmp_path)
        assert "bad.jsonl line 5 is not JSON" in line

    def test_a_line_without_an_answer(self, command, files, tmp_path, capsys):
        write_lines(tmp_path / "bad.jsonl", [fact(0, "color"), {"question": "Who?"}])
        wrong = sets(files, forget=tmp_path / "bad.jsonl")
        line = refused(capsys, command, files / "model", *wrong, "--out", tmp_path)
        assert "answer=None; each item needs a non-empty question and answer" in line

    def test_an_empty_set(self, command, files, tmp_path, capsys):
        (tmp_path / "empty.jsonl").write_text("\n\n", "utf-8")
        wrong = sets(files, forget=tmp_path / "empty.jsonl")
        line = refused(capsys, command, files / "model", *wrong, "--out", tmp_path)
        assert "empty.jsonl set is empty; give at least one" in line

    def test_a_template_without_a_place_for_the_question(self, command, files, tmp_path, capsys):
        words = (*sets(files), "--template", "Q: question", "--out", tmp_path)
        line = refused(capsys, command, files / "model", *words)
        assert "template 'Q: question' has no {question}" in line

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("./nowhere", "nowhere does not exist; give a directory"),
            ("no-such/model", "manifold-unlearn"),
            ("nowhere.gguf", "is not a file; give the path of a GGUF model"),
        ],
    )
    def test_a_model_that_is_not_there(self, command, name, message, files, tmp_path, capsys):
        assert message in refused(capsys, command, name, *sets(files), "--out", tmp_path)

    def test_a_directory_that_is_no_model(self, command, files, tmp_path, capsys):
        line = refused(capsys, command, tmp_path, *sets(files), "--out", tmp_path / "out")
        assert "has no config.json" in line
        assert not (tmp_path / "out").exists()

    def test_a_truncated_model(self, command, files, tmp_path, capsys):
        shutil.copytree(files / "model", tmp_path / "cut")
        whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
        (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        line = refused(capsys, command, tmp_path / "cut", *sets(files), "--out", tmp_path / "out")
        assert "cannot be read" in line and "truncated" in line

    def test_mistakes_in_the_sets_are_found_before_the_model_is_loaded(
        self, command, files, tmp_path, capsys
    ):
        wrong = sets(files, retain=tmp_path / "none.jsonl")
        assert "none.jsonl" in refused(capsys, command, "./nowhere", *wrong, "--out", tmp_path)

    def test_an_interrupt_is_status_130(self, command, files, tmp_path, capsys, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("manifold_unlearn.activations.models.load_model", interrupted)
        words = [command, "m", *sets(files), "--out", str(tmp_path / "out")]
        assert main(words) == 130
        assert capsys.readouterr().err == f"manifold-unlearn {command}: stopped\n"
        assert not (tmp_path / "out").exists()


def test_a_text_longer_than_the_context_is_named(files, tmp_path, capsys):
    write_lines(tmp_path / "long.jsonl", [{"question": "why " * 90, "answer": "so"}])
    wrong = sets(files, forget=tmp_path / "long.jsonl")
    line = refused(capsys, "unlearn", files / "model", *wrong, "--out", tmp_path / "out")
    assert "tokens; the model takes 64" in line
