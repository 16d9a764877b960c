"""Files that are whole once they exist: nothing half-written, and permissions by the umask."""

import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rf_core.writing import WriteError, whole_file, write_text


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full after so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(each.name for each in folder.iterdir())


def test_a_file_takes_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_what_breaks_off_leaves_the_old_file_alone(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as part:
        part.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path: Path) -> None:
    weights, text = tmp_path / "a.safetensors", tmp_path / "a.json"
    save_file({"a": torch.ones(3)}, weights)
    text.write_text("old")
    with files_of_at_most(10_000):
        full = pytest.raises(WriteError, match=r"a\.safetensors could not be written \(.*too large")
        with full, whole_file(weights) as part:
            save_file({"a": torch.zeros(100_000)}, part)  # its error is no OSError
        with pytest.raises(WriteError, match=r"a\.json could not be written") as caught:
            write_text(text, "new" * 10_000)
    assert caught.value.errno == errno.EFBIG
    assert "\n" not in str(caught.value)
    assert load_file(weights)["a"].tolist() == [1, 1, 1]
    assert text.read_text() == "old"
    assert names(tmp_path) == ["a.json", "a.safetensors"]


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"a\.txt could not be written \(No such file"):
        write_text(tmp_path / "none" / "a.txt", "text")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_what_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "a.safetensors") as part:
            save_file({"a": torch.ones(3)}, part)
        write_text(tmp_path / "a.txt", "text")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()} == {mode}
