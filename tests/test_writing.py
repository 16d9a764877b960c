"""Files that are whole once they exist: nothing half-written, and permissions by the umask."""

import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from rf_core.model import WanModel
from rf_core.video import VideoFormat, VideoWriter, remux
from rf_core.weights.checkpoint import write_checkpoint
from rf_core.writing import WriteError, whole_file, write_text
from training.data.pairs import Origin, PairsConfig, Trajectories, write_shard
from training.run import checkpointing
from training.run.folder import create_run_folder

ROOT = Path(__file__).parents[1]


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


def test_what_a_killed_writer_left_is_gone_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    command = (
        "import os, sys; from rf_core.writing import whole_file\n"
        "with whole_file(sys.argv[1]) as part: part.write_text('half'); os._exit(9)"
    )
    killed = subprocess.run([sys.executable, "-c", command, str(path)], cwd=ROOT)
    assert killed.returncode == 9 and len(names(tmp_path)) == 1 and not path.exists()
    write_text(path, "whole")
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


def write_everything(folder: Path) -> None:
    """A file of every kind that is written."""
    config = tiny.CONFIG
    weights = WanModel(config).state_dict()
    write_checkpoint(folder / "student.safetensors", weights, config, None, None)
    stream = tiny.stream()
    stream.step()
    stream.snapshot(compact=True).save(folder / "snapshot.safetensors")
    write_text(folder / "settings.json", "{}")
    video = folder / "video.mp4"
    with VideoWriter(video, VideoFormat(width=32, height=32)) as writer:
        writer.write(torch.zeros(4, 32, 32, 3, dtype=torch.uint8))
    remux(video)
    trajectories = Trajectories(
        points=torch.ones(1, 2), clean=torch.ones(1, 2), embeds=torch.ones(1, 2), prompts=["a"],
        numbers=[0],
    )  # fmt: skip
    write_shard(
        folder / "pairs.safetensors", trajectories, PairsConfig(), 0, Origin(teacher="teacher")
    )
    checkpointing.save({"average": {"a": torch.ones(3)}}, folder / "update_000001")
    create_run_folder(PairsConfig(), folder / "run")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_every_writer_leaves_permissions_to_the_umask(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        write_everything(tmp_path)
    finally:
        os.umask(before)
    modes = {
        str(path.relative_to(tmp_path)): oct(stat.S_IMODE(path.stat().st_mode))
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert len(modes) >= 8
    assert set(modes.values()) == {oct(mode)}, modes


def test_where_folders_cannot_be_synced_files_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system_open = os.open

    def windows(path: Path, *how: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return system_open(path, *how)

    with monkeypatch.context() as system:
        system.setattr(os, "open", windows)
        write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
