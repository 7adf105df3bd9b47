"""``edge-agent`` as typed: what goes wrong before any work is one line, with its exit code."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_agent.cli import _config, main
from edge_agent.config import ConfigError
from edge_agent.journal import Batch, Journal
from teacher_service import policy
from teacher_service.terms import Terms
from tests.conftest import in_process


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


def test_preset_stands_below_file_and_flags(type_in, tmp_path):
    of_the_preset = ("run", "--phase", "all", "--images", "digits", "--preset", "photographs")
    line = one_line(type_in(*of_the_preset, "--set", "distill.image_weight=1"), 2)
    assert "expected 0 with deprivatize.generator = diffusion" in line
    (tmp_path / "run.toml").write_text('[deprivatize]\ngenerator = "mixes"\n')
    line = one_line(type_in(*of_the_preset, "--set", "distill.image_weight=1"), 2)
    assert "expected 0 with deprivatize.generator = mixes" in line


def test_key_is_asked_for_when_there_is_none(type_in):
    line = one_line(type_in("run", "--phase", "all", "--images", "digits", "--quiet"), 2)
    assert "MEKD_API_KEY" in line and "--key-file" in line


def test_key_file_that_is_missing_is_named(type_in):
    line = one_line(type_in("run", "--phase", "all", "--images", "digits", "--key-file", "nokey"), 2)
    assert "nokey" in line


def test_key_file_without_a_key_is_not_taken_for_none(type_in, tmp_path):
    (tmp_path / "key").write_text("\n")
    given = ("run", "--phase", "all", "--images", "digits", "--key-file", str(tmp_path / "key"))
    assert "got an empty file" in one_line(type_in(*given), 2)


def test_unknown_student_names_the_known_ones(type_in):
    line = one_line(type_in("run", "--phase", "all", "--images", "digits", "--student", "resnet9"), 2)
    assert "resnet8" in line


def test_status_of_no_run_is_exit_6(type_in):
    assert "journal" in one_line(type_in("status", "--run-dir", "none"), 6)


@pytest.fixture
def bought(tmp_path):
    """A run folder with 16 soft answers, 8 top-2 rounded ones and 4 pictures sent twice without an answer."""
    journal = Journal.open(tmp_path / "journal.db")
    rows_NK = np.full((16, 4), 0.25, np.float32)
    answers = [policy.apply(Terms(), rows_NK), policy.apply(Terms(top_k=2, decimals=1), rows_NK[:8]), None]
    for slot, (answer, count) in enumerate(zip(answers, (16, 8, 4), strict=True)):
        batch = Batch(slot=slot, batch_id=str(slot), picture_count=count, request=b"r", latents=b"l")
        journal.plan("distill", batch)
        if answer is not None:
            journal.keep_answer(
                batch.batch_id, answer=answer.SerializeToString(), charged_count=count, received_bytes=1
            )
    journal.count_repeat("2")
    yield journal
    journal.close()


@pytest.mark.parametrize(("metered_by", "charged"), [("teacher", 24), ("agent", 32)])
def test_status_tells_what_was_bought_by_kind_and_by_phase(type_in, tmp_path, bought, metered_by, charged):
    bought.set_facts(metered_by=metered_by)
    asked = type_in("status", "--run-dir", str(tmp_path), "--format", "json")
    assert asked.exit_code == 0, asked.output
    shown = json.loads(asked.stdout)
    assert shown["answers"] == {"soft": 16, "top-2, 1 decimal": 8} == bought.bought()
    assert shown["charged_by_phase"] == {"deprivatize": 0, "distill": charged, "adapt": 0}
    assert (shown["charged"], shown["unanswered"]) == (charged, 4)
    lines = type_in("status", "--run-dir", str(tmp_path)).stdout.splitlines()
    assert "answers          16 soft; 8 top-2, 1 decimal" in lines
    assert f"charged_by_phase {charged} distill" in lines


def test_status_of_a_run_that_has_bought_nothing(type_in, tmp_path):
    Journal.open(tmp_path / "journal.db").close()
    shown = json.loads(type_in("status", "--run-dir", str(tmp_path), "--format", "json").stdout)
    assert (shown["answers"], shown["charged"], shown["phases_done"]) == ({}, 0, [])
    assert type_in("status", "--run-dir", str(tmp_path)).exit_code == 0


def test_status_does_not_import_torch(tmp_path, bought):
    """It takes seconds, and a run that works has one already."""
    code = (
        "import sys; from edge_agent.cli import main\n"
        f"main(['status', '--run-dir', {str(tmp_path)!r}], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "16 soft" in done.stdout


def test_help_names_exit_codes_and_an_example(type_in):
    text = type_in("run", "--help").stdout
    assert "3 the budget is spent" in text and "MEKD_API_KEY" in text and "--budget" in text


@pytest.mark.parametrize("here", [True, False])
def test_run_toml_of_a_run_folder_speaks_of_that_folder(tmp_path, monkeypatch, here):
    """Else the run would begin again somewhere else, and pay again."""
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "journal.db").touch()
    (folder / "run.toml").write_text('images = "digits"\nrun_dir = "runs/before"\n')
    monkeypatch.chdir(folder if here else tmp_path)
    config_file = None if here else Path("moved/run.toml")
    assert Path(_config(config_file, (), {}).run_dir).resolve() == folder
    assert _config(config_file, (), {"run_dir": "other"}).run_dir == "other"


def test_run_toml_of_no_run_folder_names_the_folder_it_likes(tmp_path, monkeypatch):
    (tmp_path / "run.toml").write_text('images = "digits"\nrun_dir = "runs/mine"\n')
    monkeypatch.chdir(tmp_path)
    assert _config(None, (), {}).run_dir == "runs/mine"


def test_a_budget_that_is_left_out_is_the_one_the_folder_was_given(tmp_path, monkeypatch):
    """Else a forgotten flag would buy pictures up to the default."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "mekd"
    folder.mkdir(parents=True)
    assert _config(None, (), {"images": "a"}).budget == 50_000
    (folder / "run.toml").write_text('images = "a"\nbudget = 5000\n')
    assert _config(None, (), {"images": "a"}).budget == 5000
    assert _config(None, (), {"images": "a", "budget": 60_000}).budget == 60_000
    assert _config(None, ("budget=70_000",), {"images": "a"}).budget == 70_000
    assert _config(None, (), {"images": "a", "run_dir": "runs/other"}).budget == 50_000
    (folder / "run.toml").write_text("no TOML")
    assert _config(None, (), {"images": "a"}).budget == 50_000


def test_setting_that_is_given_twice_otherwise_is_refused():
    with pytest.raises(ConfigError, match=r"run_dir: given twice, as 'a' and by --set as 'b'"):
        _config(None, ("run_dir=b",), {"images": "x", "run_dir": "a"})
    assert _config(None, ("run_dir=a",), {"images": "x", "run_dir": "a"}).run_dir == "a"
    kserve = _config(None, ("teacher.output_kind=logits",), {"images": "x", "teacher": "kserve://h:1/m"})
    assert (kserve.teacher, kserve.kserve.output_kind) == ("kserve://h:1/m", "logits")


def test_the_environment_is_a_default_that_a_file_and_a_flag_win_over(tmp_path):
    (tmp_path / "run.toml").write_text('images = "x"\ndata = "of the file"\n')
    of_environment = {"data": "of MEKD_DATA"}
    assert _config(None, (), {"images": "x"}, environment=of_environment).data == "of MEKD_DATA"
    assert _config(tmp_path / "run.toml", (), {}, environment=of_environment).data == "of the file"
    assert _config(tmp_path / "run.toml", (), {"data": "of a flag"}, environment=of_environment).data == "of a flag"
    assert _config(None, ("data=set",), {"images": "x"}, environment=of_environment).data == "set"
    (tmp_path / "run.toml").write_text('images = "x"\ndata = ""\n')  # as a run without one writes it down
    assert _config(tmp_path / "run.toml", (), {}, environment=of_environment).data == "of MEKD_DATA"


@pytest.mark.parametrize(("flag", "expected"), [((), "of the file"), (("--data", "of a flag"), "of a flag")])
def test_what_stands_in_the_environment_is_told_from_a_flag(tmp_path, monkeypatch, flag, expected):
    (tmp_path / "run.toml").write_text(f'images = "x"\ndata = "of the file"\nrun_dir = "{tmp_path}/run"\n')
    monkeypatch.setenv("MEKD_DATA", "of MEKD_DATA")
    found = []
    monkeypatch.setattr("edge_agent.agent.run", lambda config, *_, **__: found.append(config) or {})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # or it would look for the best number, in this process
    monkeypatch.setattr("edge_agent.cli._raise_on_sigterm", lambda: None)
    done = in_process(main, "run", "--phase", "all", "--config", str(tmp_path / "run.toml"), *flag)
    assert done.returncode == 0 and found[0].data == expected


def test_a_mistake_is_blamed_on_the_file_where_it_is_in_the_file_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text('images = "a"\n[distill]\npasses = 0\n')
    with pytest.raises(ConfigError, match=r"^run\.toml: distill\.passes: expected 1 or more, got 0"):
        _config(None, (), {})
    (tmp_path / "run.toml").write_text('images = "a"\n')
    with pytest.raises(ConfigError, match=r"^distill\.passes: expected 1 or more, got 0"):
        _config(None, ("distill.passes=0",), {})
    with pytest.raises(ConfigError, match=r"^--set: expected"):
        _config(None, ("distill.passes",), {})


def test_a_path_that_is_no_utf_8_is_refused_before_anything_is_done(tmp_path, type_in):
    done = type_in("run", "--phase", "all", "--images", "caf\udce9", "--run-dir", str(tmp_path / "run"))
    assert done.exit_code == 2
    assert done.stderr == (
        "error: images: expected text in UTF-8, got 'caf\\udce9'; give the file or folder another name\n"
    )
    assert not (tmp_path / "run").exists()
