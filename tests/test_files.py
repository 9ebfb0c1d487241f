"""Staged files and folders are whole or absent, a manifest finds every change, a lock keeps others out."""

import json
import os
import random
import stat
import subprocess
import sys
import textwrap
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from localdit.files import MANIFEST, STAGED, flush, locked, problems, staged_file, staged_folder


def fill(folder: Path) -> dict[str, bytes]:
    """Files of random content, one empty, one in a folder of its own."""
    contents = {"a.bin": random.randbytes(1000), "empty": b"", "part/b c.json": b"[1]"}
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return contents


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- Folders ------------------------------------------------------------------------------------------------


def test_a_staged_folder_appears_whole_with_a_manifest_of_its_files(tmp_path):
    target = tmp_path / "new" / "deep" / "target"
    with staged_folder(target) as staged:
        assert staged.parent == target.parent
        assert staged.name == f"target.tmp-{os.getpid()}"
        contents = fill(staged)
        assert not target.exists()
    assert names(target.parent) == ["target"]
    assert json.loads((target / MANIFEST).read_text())["files"] == {
        name: {"bytes": len(content), "sha256": sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    assert all((target / name).read_bytes() == content for name, content in contents.items())
    assert problems(target) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path, error):
    def fail() -> None:
        with staged_folder(tmp_path / "target") as staged:
            fill(staged)
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == []


def test_what_is_there_is_never_overwritten(tmp_path):
    target = tmp_path / "target"
    with staged_folder(target) as staged:
        before = fill(staged)
    with pytest.raises(FileExistsError, match=r"is there already and is never overwritten.*target"):
        staged_folder(target).__enter__()
    assert (target / "a.bin").read_bytes() == before["a.bin"]


def test_what_another_process_made_in_the_meantime_is_not_overwritten(tmp_path, monkeypatch):
    target = tmp_path / "target"
    staging = staged_folder(target)
    fill(staging.__enter__())
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with staged_folder(target) as faster:
        theirs = fill(faster)
    with pytest.raises(FileExistsError):
        staging.__exit__(None, None, None)
    assert (target / "a.bin").read_bytes() == theirs["a.bin"]
    assert names(tmp_path) == ["target"]


def test_what_a_killed_process_of_the_same_number_left_is_not_mixed_in(tmp_path):
    left = tmp_path / f"target.tmp-{os.getpid()}"
    left.mkdir()
    (left / "stale").touch()
    with staged_folder(tmp_path / "target") as staged:
        (staged / "fresh").touch()
    assert names(tmp_path / "target") == [MANIFEST, "fresh"]


def replacement(target: Path, name: str, content: str) -> AbstractContextManager[Path]:
    """A folder in the place of another, with one file, about to be finished."""
    staging = staged_folder(target, replace=True)
    (staging.__enter__() / name).write_text(content)
    return staging


def test_a_folder_gives_way_to_its_replacement_whole_and_at_the_end(tmp_path):
    target = tmp_path / "target"
    for name in ("first", "second"):
        staging = replacement(target, name, name)
        assert target.exists() == (name == "second")
        assert name == "first" or names(target) == [MANIFEST, "first"]
        staging.__exit__(None, None, None)
        assert names(target) == [MANIFEST, name]
        assert names(tmp_path) == ["target"]
    assert problems(target) == []


def test_a_failed_replacement_leaves_the_old_folder(tmp_path, monkeypatch):
    """Whether it fails while it is written, or at the last rename."""
    target = tmp_path / "target"
    replacement(target, "file", "old").__exit__(None, None, None)
    with pytest.raises(KeyboardInterrupt), staged_folder(target, replace=True):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["target"]

    rename = Path.rename

    def full(self, new):
        if self.name == f"target.tmp-{os.getpid()}":
            raise OSError("disk full")
        return rename(self, new)

    staging = replacement(target, "file", "new")
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="disk full"):
        staging.__exit__(None, None, None)
    assert names(tmp_path) == ["target"]
    assert (target / "file").read_text() == "old"
    assert problems(target) == []


@pytest.mark.parametrize("calls", range(5))
def test_a_kill_at_any_rename_leaves_the_old_folder_or_the_new_one_whole(tmp_path, calls):
    """A kill before each rename and after the last; then another process clears up, and replaces again."""
    target = tmp_path / "target"
    replacement(target, "file", "old").__exit__(None, None, None)
    script = f"""
        import os, shutil
        from pathlib import Path
        from localdit.files import staged_folder

        calls = []

        def dying(act):
            def call(*args, **kwargs):
                if len(calls) == {calls}:
                    os._exit(9)
                calls.append(act)
                return act(*args, **kwargs)
            return call

        with staged_folder(Path("target"), replace=True) as staged:
            (staged / "file").write_text("new")
            os.rename = dying(os.rename)
            shutil.rmtree = dying(shutil.rmtree)
        os._exit(9)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, check=False)
    assert killed.returncode == 9
    left = sorted(path for path in tmp_path.iterdir() if not STAGED.fullmatch(path.name))
    assert left[0].name.split("-")[0] == ("target.replaced" if calls == 2 else "target")
    assert (left[0] / "file").read_text() == ("new" if calls > 2 else "old")
    assert problems(left[0]) == []
    if calls == 2:
        (new,) = (path for path in tmp_path.iterdir() if path not in left)
        assert (new / "file").read_text() == "new"
        assert problems(new) == []

    with locked(tmp_path):
        replacement(target, "file", "newer").__exit__(None, None, None)
    assert (target / "file").read_text() == "newer"


def test_what_is_no_folder_is_not_replaced(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            staged_folder(tmp_path / name, replace=True).__enter__()
    assert names(tmp_path) == ["file", "folder", "link"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_files_can_be_read_by_those_who_may_read_new_files(tmp_path):
    """safetensors makes its files private."""
    before = os.umask(0o027)
    try:
        with staged_folder(tmp_path / "folder") as staged:
            save_file({}, staged / "empty.safetensors")
        with staged_file(tmp_path / "alone.safetensors") as staged:
            save_file({}, staged)
    finally:
        os.umask(before)
    for path in (*(tmp_path / "folder").iterdir(), tmp_path / "alone.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


# --- Files --------------------------------------------------------------------------------------------------


def test_a_staged_file_replaces_its_target_or_leaves_it(tmp_path):
    target = tmp_path / "new" / "latest"
    with staged_file(target) as staged:
        staged.write_text("one")
        assert not target.exists()
    staging = staged_file(target)
    half = staging.__enter__()
    half.write_text("two")
    assert half.name == f".latest.tmp-{os.getpid()}"
    assert STAGED.fullmatch(half.name)
    assert staging.__exit__(OSError, OSError("full"), None) is not True
    assert target.read_text() == "one"
    assert names(target.parent) == ["latest"]
    with staged_file(target) as staged:
        staged.write_text("three")
        assert target.read_text() == "one"
    assert target.read_text() == "three"
    assert names(target.parent) == ["latest"]


def test_a_file_and_a_folder_can_be_flushed(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    flush(tmp_path / "file")
    flush(tmp_path)
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "nothing")


# --- Manifests ----------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path) -> Path:
    with staged_folder(tmp_path / "whole") as staged:
        fill(staged)
    return tmp_path / "whole"


def test_every_change_is_found_and_its_file_named(whole):
    (whole / "a.bin").unlink()
    (whole / "empty").write_bytes(b"x")
    (whole / "part" / "b c.json").write_bytes(b"[2]")
    (whole / "part" / "new").touch()
    assert problems(whole) == [
        "a.bin is missing",
        "empty has 1 bytes, must have 0",
        "part/b c.json is damaged: its SHA-256 is another",
        "part/new is not in the manifest",
    ]


def test_hidden_files_do_not_count(whole):
    (whole / ".DS_Store").write_bytes(b"x")
    (whole / "part" / ".nfs0001").write_bytes(b"x")
    assert problems(whole) == []


def test_a_file_that_cannot_be_read_is_a_problem_and_no_error(whole, monkeypatch):
    def fail(file, kind):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("localdit.files.hashlib.file_digest", fail)
    assert "a.bin cannot be read: Input/output error" in problems(whole)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe",
        b"{}",
        b'{"files": []}',
        b'{"files": {"a": 1}}',
        b'{"files": {"a": {"bytes": 1}}}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_manifest_is_a_problem_and_no_error(whole, content):
    (whole / MANIFEST).write_bytes(content)
    (problem,) = problems(whole)
    assert problem.startswith(f"{MANIFEST} is damaged (")


def test_a_folder_without_a_manifest_was_never_finished(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert problems(folder) == [f"{MANIFEST} is missing: the folder was never finished"]


def test_a_manifest_reads_no_file_outside_its_folder(whole, tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    content = {"bytes": 1, "sha256": sha256(b"x").hexdigest()}
    manifest = {"files": {"../secret": content, str(tmp_path / "secret"): content}}
    (whole / MANIFEST).write_text(json.dumps(manifest))
    assert f"{tmp_path / 'secret'} is missing" in problems(whole)
    assert "../secret is missing" in problems(whole)


# --- Locks --------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from localdit.files import locked
try:
    with locked(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except BlockingIOError as error:
    print(error.filename, error.strerror)
"""


def hold(folder: Path) -> subprocess.Popen:
    """Another process that holds the lock until it is killed or its input ends."""
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_one_process_at_a_time_holds_a_folder_and_a_killed_one_no_more(tmp_path):
    folder = tmp_path / "new" / "run"
    with hold(folder) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(BlockingIOError, match="in use by another process, which must end first"),
            locked(folder),
        ):
            pass
        other.kill()
    with locked(folder), hold(folder) as other:
        assert other.stdout.readline() == f"{folder} is in use by another process, which must end first\n"
    with hold(folder) as other:
        assert other.stdout.readline() == "held\n"
        other.stdin.close()


def test_who_takes_the_lock_clears_away_what_killed_processes_left(tmp_path):
    (tmp_path / "step-1.tmp-123" / "part").mkdir(parents=True)
    (tmp_path / "step-1.tmp-123" / "part" / "file").touch()
    for name in ("latest.tmp-9", "notes.tmp", "x.tmp-12a", "final"):
        (tmp_path / name).touch()
    with locked(tmp_path):
        assert names(tmp_path) == [".lock", "final", "notes.tmp", "x.tmp-12a"]
