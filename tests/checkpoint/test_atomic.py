"""New files and folders appear complete or not at all, and never replace what exists."""

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

from fluxjax.checkpoint import atomic
from fluxjax.checkpoint.atomic import new_file, new_folder


def write_file(path, content=b"new"):
    with new_file(path) as file:
        file.write(content)


def test_a_file_appears_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "image.png"
    with new_file(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["image.png"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_file(tmp_path / "a") as file:
        file.write(b"half")
        raise RuntimeError
    with pytest.raises(RuntimeError), new_folder(tmp_path / "b") as folder:
        (folder / "inside").write_bytes(b"half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_what_exists_stays(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileExistsError, match="already exists"):
        write_file(tmp_path / "a")
    with pytest.raises(FileExistsError, match="already exists"), new_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("links", [True, False])
def test_what_is_created_meanwhile_stays(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", _refuse_link)
    with pytest.raises(FileExistsError, match="already exists"), new_file(tmp_path / "a") as file:
        file.write(b"late")
        (tmp_path / "a").write_bytes(b"first")
    with (
        pytest.raises(FileExistsError, match="already exists"),
        new_folder(tmp_path / "b") as folder,
    ):
        (folder / "inside").write_bytes(b"late")
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "theirs").write_bytes(b"first")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path / "b") == ["theirs"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def _refuse_link(*arguments, **options):
    raise OSError(errno.EOPNOTSUPP, "no hard links here")


def test_a_file_system_without_hard_links_works_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", _refuse_link)
    write_file(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    assert os.listdir(tmp_path) == ["a"]


def test_overwrite_replaces_a_file_at_once(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with new_file(path, overwrite=True) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_a_link_at_the_target_is_not_followed(tmp_path):
    mine = tmp_path / "mine"
    mine.write_bytes(b"precious")
    (tmp_path / "a").symlink_to(mine)
    (tmp_path / "b").symlink_to(tmp_path / "nowhere")
    for name in ("a", "b"):
        with pytest.raises(FileExistsError):
            write_file(tmp_path / name)
    assert mine.read_bytes() == b"precious"
    assert not (tmp_path / "nowhere").exists()


def test_files_get_the_mode_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_file(tmp_path / "a")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


# The module is run alone: it needs nothing of the package, whose import takes seconds.
_KILLED = """
import os, runpy, signal, sys
from pathlib import Path
atomic = runpy.run_path(sys.argv[2])
new_file, new_folder = atomic["new_file"], atomic["new_folder"]
with new_file(Path(sys.argv[1]) / "a") as file, new_folder(Path(sys.argv[1]) / "b") as folder:
    file.write(b"half")
    (folder / "half").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_process_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    command = [sys.executable, "-c", _KILLED, str(tmp_path), atomic.__file__]
    process = subprocess.run(command)
    assert process.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    (tmp_path / ".a.part").write_bytes(b"a user's")
    with new_file(tmp_path / "a") as file:  # another writer of the same name lives
        file.write(b"alive")
        with new_file(tmp_path / "other") as other:
            other.write(b"x")
        assert sum(name.startswith(".a.") for name in os.listdir(tmp_path)) == 2
        with pytest.raises(FileExistsError), new_file(tmp_path / "a") as second:
            second.write(b"second")
            (tmp_path / "a").write_bytes(b"first")
        (tmp_path / "a").unlink()
    with new_folder(tmp_path / "b") as folder:
        (folder / "whole").write_bytes(b"x")
    assert sorted(os.listdir(tmp_path)) == [".a.part", "a", "b", "other"]
    assert (tmp_path / "a").read_bytes() == b"alive"
    assert os.listdir(tmp_path / "b") == ["whole"]


def test_of_many_writers_of_one_path_one_succeeds_with_its_own_bytes(tmp_path):
    for number in range(20):
        path, won = tmp_path / str(number), []

        def write(writer, path=path, won=won):
            try:
                write_file(path, bytes([writer]) * 100_000)
            except FileExistsError:
                return
            won.append(writer)

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert path.read_bytes() == bytes(won) * 100_000
    assert len(os.listdir(tmp_path)) == 20


def test_a_path_with_the_longest_name_can_be_written(tmp_path):
    write_file(tmp_path / ("é" * 127))
    assert len(os.listdir(tmp_path)) == 1
