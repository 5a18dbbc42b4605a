"""The names of a run's files."""

from pathlib import Path

from poc_lora.artifacts.run_folder import RunFolder


def test_a_run_is_a_folder_with_a_configuration(tmp_path):
    run = RunFolder(tmp_path)
    assert not run.is_run
    run.config.touch()
    assert run.is_run


def test_adapters_and_evaluations_have_folders_of_their_own():
    run = RunFolder(Path("run"))
    assert run.adapter(7) == run.adapter("07") == Path("run/adapters/07")
    assert [str(path) for path in run.evaluations] == ["run/eval", "run/eval-generate", "run/eval-harness"]
