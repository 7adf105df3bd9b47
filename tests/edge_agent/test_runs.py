import json
import os
import time

import numpy as np
import pytest
import torch

from edge_agent import runs
from edge_agent.failures import DiskProblem, RunFolderProblem
from edge_agent.journal import Batch
from edge_agent.runs import RunFolder, digest_of


def test_folder_in_use_is_refused_and_free_again_afterwards(tmp_path):
    with (
        RunFolder(tmp_path / "run"),
        pytest.raises(RunFolderProblem, match="in use by another edge-agent"),
    ):
        RunFolder(tmp_path / "run")
    with RunFolder(tmp_path / "run"):
        pass


def test_what_was_sent_is_nobody_elses_to_read(tmp_path):
    with RunFolder(tmp_path / "runs" / "run"):
        assert (tmp_path / "runs" / "run").stat().st_mode & 0o777 == 0o700
        for file in (tmp_path / "runs" / "run").glob("journal.db*"):
            assert file.stat().st_mode & 0o777 == 0o600, file


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    with RunFolder(tmp_path) as folder:
        folder.write("summary.json", b"old")

        def no_room(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", no_room)
        with pytest.raises(DiskProblem, match=r"summary\.json: No space left on device; make room"):
            folder.write("summary.json", b"new")
        monkeypatch.undo()
        assert (tmp_path / "summary.json").read_bytes() == b"old"
        assert not list(tmp_path.glob(".summary*")), "a half-written file would keep the disk full"


def test_another_problem_than_a_full_disk_is_not_said_to_want_room(tmp_path, monkeypatch):
    with RunFolder(tmp_path) as folder:

        def read_only(_descriptor: int) -> None:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(os, "fsync", read_only)
        with pytest.raises(DiskProblem, match="Read-only file system; give this user write access and start"):
            folder.write("summary.json", b"new")


def test_a_file_system_without_locks_is_not_taken_for_another_agent(tmp_path, monkeypatch):
    def no_locks(_file, _operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", no_locks)
    with pytest.raises(RunFolderProblem, match="can lock files, got: No locks available; give another --run-dir"):
        RunFolder(tmp_path)


def test_tensors_are_read_onto_the_cpu_wherever_they_were_written(tmp_path, monkeypatch):
    """A checkpoint of a GPU that this machine does not have is still a checkpoint."""
    asked: list[object] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (asked.append(k["map_location"]), load(*a, **k))[1])
    with RunFolder(tmp_path) as folder:
        folder.write_tensors("x.pt", {"step": 4})
        folder.read_tensors("x.pt")
    assert asked == ["cpu"]


def test_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    order: list[str] = []
    sync, replace = os.fsync, os.replace
    with RunFolder(tmp_path) as folder:
        monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("sync"), sync(descriptor)))
        monkeypatch.setattr(
            type(tmp_path), "replace", lambda self, target: (order.append("rename"), replace(self, target))
        )
        folder.write("a", b"content")
    assert order == ["sync", "rename", "sync"]  # the file, its name, the folder


def test_generators_and_checkpoints_are_for_the_owners_eyes_before_anything_is_in_them(tmp_path, monkeypatch):
    seen = []
    fchmod = os.fchmod

    def noting(descriptor, mode):
        seen.append((os.fstat(descriptor).st_size, mode))
        fchmod(descriptor, mode)

    monkeypatch.setattr(os, "fchmod", noting)
    with RunFolder(tmp_path) as folder:
        folder.write_tensors("generator.pt", {"a": torch.ones(1)})
    assert seen == [(0, 0o600)]
    assert (tmp_path / "generator.pt").stat().st_mode & 0o777 == 0o600


def test_tensors_read_back_and_a_damaged_file_is_one_line(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.write_tensors("x.pt", {"weights": torch.arange(3), "step": 4})
        back = folder.read_tensors("x.pt")
        assert back["step"] == 4 and back["weights"].tolist() == [0, 1, 2]
        (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:100])
        with pytest.raises(RunFolderProblem, match=r"x\.pt: expected a file of this project[^\n]*$"):
            folder.read_tensors("x.pt")


def test_file_with_code_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    with RunFolder(tmp_path) as folder:
        torch.save({"trap": Trap()}, tmp_path / "x.pt")
        with pytest.raises(RunFolderProblem):
            folder.read_tensors("x.pt")
    assert not (tmp_path / "sprung").exists()


def test_memory_above_its_limit_is_refused(tmp_path):
    with RunFolder(tmp_path) as folder, pytest.raises(ValueError, match="at most 4194304 bytes"):
        folder.write_arrays("memory.npz", {"x": np.random.default_rng(0).random(10**6)})


def test_checkpoint_is_saved_when_due_and_seen_by_the_same_inputs_alone(tmp_path, monkeypatch):
    with RunFolder(tmp_path) as folder:
        checkpoint = folder.checkpoint("distill", "inputs")
        assert checkpoint.load() is None
        checkpoint.save_if_due(lambda: {"step": 1})
        assert checkpoint.load() is None, "not due yet"
        later = time.monotonic() + runs.CHECKPOINT_SECONDS
        monkeypatch.setattr(time, "monotonic", lambda: later)
        checkpoint.save_if_due(lambda: {"step": 2})
        assert folder.checkpoint("distill", "inputs").load() == {"step": 2}
        assert folder.checkpoint("distill", "others").load() is None
        folder.finish("distill", "inputs")
        assert folder.checkpoint("distill", "inputs").load() is None
        assert folder.done("distill", "inputs") and not folder.done("distill", "others")


def test_a_kill_costs_at_most_a_minute_of_computing():
    assert runs.CHECKPOINT_SECONDS <= 60


def test_clock_adds_up_over_starts_even_when_they_fail(tmp_path):
    with RunFolder(tmp_path) as folder:
        with folder.clock("distill"):
            time.sleep(0.05)
        with pytest.raises(RuntimeError), folder.clock("distill"):
            time.sleep(0.05)
            raise RuntimeError
        assert 0.1 <= folder.seconds("distill") < 5
        assert folder.seconds("adapt") is None


def test_clocks_are_kept_while_they_run_since_a_kill_stops_them_without_another_word(tmp_path, monkeypatch):
    with RunFolder(tmp_path) as folder, folder.clock("distill"), folder.clock("assistant"):
        checkpoint = folder.checkpoint("assistant", "inputs")
        checkpoint.save_if_due(dict)
        assert folder.seconds("distill") is None  # not after every step
        time.sleep(0.05)
        monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0.05)
        checkpoint.save_if_due(dict)
        assert 0.05 <= folder.seconds("distill") < 5 and 0.05 <= folder.seconds("assistant") < 5


def test_metrics_are_json_lines(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.metric(phase="adapt", changed=3)
        folder.metric(phase="adapt", changed=4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["changed"] for line in lines] == [3, 4]


def test_digest_does_not_hang_on_order_but_on_values():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": [3]})


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_path_that_cannot_be_a_folder_is_no_full_disk(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderProblem, match=r"expected a folder to write in[^\n]*--run-dir"):
        RunFolder(tmp_path / name)


def test_results_without_the_journal_that_knows_what_they_cost_are_no_new_run(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.write("student.pt", b"paid for")
    (tmp_path / "journal.db").unlink()
    for _ in range(2):  # and no journal was made meanwhile
        with pytest.raises(RunFolderProblem, match=r"has student\.pt and no journal\.db, .*; put it back, or give"):
            RunFolder(tmp_path)
    (tmp_path / "student.pt").unlink()
    with RunFolder(tmp_path):
        pass


def test_damaged_generator_is_to_be_put_back_once_answers_were_paid_for_and_a_student_made_again(tmp_path):
    with RunFolder(tmp_path) as folder:
        for name in ("generator.pt", "student.pt"):
            folder.write(name, b"damaged")
        with pytest.raises(RunFolderProblem, match=r"generator\.pt: .*; remove it to make it again"):
            folder.read_tensors("generator.pt")
        folder.journal.plan("distill", Batch(slot=0, batch_id="a", picture_count=1, request=b"", latents=b""))
        with pytest.raises(RunFolderProblem, match=r"generator\.pt: .*; put a copy of it back"):
            folder.read_tensors("generator.pt")
        with pytest.raises(RunFolderProblem, match=r"student\.pt: .*; remove it, and --phase distill makes it again"):
            folder.read_network("student.pt")
