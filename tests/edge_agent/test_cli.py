"""``edge-agent`` as typed: what goes wrong before any work is one line, with its exit code."""

import pytest
from click.testing import CliRunner

from edge_agent.cli import main


@pytest.fixture
def type_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **environment: str):
        return CliRunner().invoke(main, list(arguments), env={"MEKD_API_KEY": None, **environment})

    return run


def one_line(result, exit_code: int) -> str:
    assert result.exit_code == exit_code, result.output
    line = result.stderr
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def test_without_pictures_one_line_says_what_to_give(type_in):
    line = one_line(type_in("run", "--phase", "all"), 2)
    assert "--images" in line and "digits" in line


def test_phase_is_asked_for(type_in):
    result = type_in("run", "--images", "digits")
    assert result.exit_code == 2 and "--phase" in result.stderr


def test_unknown_setting_is_named_with_its_file(type_in, tmp_path):
    (tmp_path / "run.toml").write_text('images = "digits"\nbugdet = 5\n')
    line = one_line(type_in("run", "--phase", "all"), 2)
    assert "run.toml" in line and "bugdet" in line


def test_file_that_is_no_toml_is_named(type_in, tmp_path):
    (tmp_path / "mine.toml").write_text("images = ")
    assert "mine.toml" in one_line(type_in("run", "--phase", "all", "--config", "mine.toml"), 2)


def test_missing_config_file_is_named(type_in):
    assert "nothere.toml" in one_line(type_in("run", "--phase", "all", "--config", "nothere.toml"), 2)


def test_key_is_asked_for_when_there_is_none(type_in):
    line = one_line(type_in("run", "--phase", "all", "--images", "digits", "--quiet"), 2)
    assert "MEKD_API_KEY" in line and "--key-file" in line


def test_key_file_that_is_missing_is_named(type_in):
    line = one_line(type_in("run", "--phase", "all", "--images", "digits", "--key-file", "nokey"), 2)
    assert "nokey" in line


def test_unknown_student_names_the_known_ones(type_in):
    line = one_line(type_in("run", "--phase", "all", "--images", "digits", "--student", "resnet9"), 2)
    assert "resnet8" in line


def test_status_of_no_run_is_exit_6(type_in):
    assert "journal" in one_line(type_in("status", "--run-dir", "none"), 6)


def test_help_names_exit_codes_and_an_example(type_in):
    text = type_in("run", "--help").stdout
    assert "3 the budget is spent" in text and "MEKD_API_KEY" in text and "--budget" in text
