"""The demo's own folder: emptied where a demo made it, and nobody else's."""

from pathlib import Path

import pytest

from benchmarks.demo import LOG, empty
from benchmarks.services import ServiceError


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(ServiceError, match="expected a new folder or a former demo's"):
        empty(tmp_path)
    assert (tmp_path / "holiday.jpg").is_file()


@pytest.mark.parametrize("files", [(), (LOG, "journal.db", "student.pt")])
def test_a_former_demos_folder_is_emptied(files: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).touch()
    empty(folder)
    assert list(folder.iterdir()) == []
