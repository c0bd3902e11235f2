"""Files that are written whole: what a save leaves behind, and what its errors say."""

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from jquant.host.whole_files import replacing, write_figure


def write(path: str | os.PathLike[str], content: bytes = b"new") -> None:
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_of_the_umask(tmp_path: Path, mask: int, expected: int) -> None:
    with umask(mask):
        write(tmp_path / "net.jq")
    assert mode(tmp_path / "net.jq") == expected


@pytest.mark.parametrize("expected", [0o600, 0o640, 0o666, 0o444, 0o200])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path, expected: int) -> None:
    path = tmp_path / "net.jq"
    path.write_bytes(b"old")
    path.chmod(expected)
    with umask(0o022):
        write(path)
    assert mode(path) == expected
    path.chmod(0o600)
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("to", ["absolute", "relative", "not there yet"])
def test_a_symbolic_link_stays_and_the_file_behind_it_is_replaced(tmp_path: Path, to: str) -> None:
    (tmp_path / "far").mkdir()
    file, link = tmp_path / "far" / "real.jq", tmp_path / "link.jq"
    if to != "not there yet":
        file.write_bytes(b"old")
    link.symlink_to("far/real.jq" if to == "relative" else file)
    write(link)
    assert link.is_symlink()
    assert file.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["far", "link.jq"]
    assert os.listdir(tmp_path / "far") == ["real.jq"]


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to("missing/c")
    for name in "ac":
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the text is checked below
            write(tmp_path / name)
        assert str(caught.value).endswith(repr(str(tmp_path / name)))
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_what_is_no_file_is_written_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write(tmp_path / "pipe")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    write("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


KILLED = """
import os, sys
from jquant.host.whole_files import replacing, write_figure
with replacing(sys.argv[1]) as partial:
    partial.write_bytes(b"half")
    print("written", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of a save of net.jq."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "net.jq")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    yield process
    process.kill()
    process.communicate()


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".net.jq.")
    write(tmp_path / "other.jq")
    assert left in os.listdir(tmp_path)
    write(tmp_path / "net.jq")
    assert sorted(os.listdir(tmp_path)) == ["net.jq", "other.jq"]


def test_a_save_that_goes_on_is_left_alone(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    write(tmp_path / "net.jq")
    assert (tmp_path / "net.jq").read_bytes() == b"new"
    writer.communicate("", timeout=30)
    assert writer.returncode == 0
    assert (tmp_path / "net.jq").read_bytes() == b"half"
    assert os.listdir(tmp_path) == ["net.jq"]


def test_files_of_the_users_are_never_removed(tmp_path: Path) -> None:
    names = [".net.jq.partial", ".net.jq.x.partial", "net.jq.1-2.partial", ".net.jq.1-2.partial.bak"]
    for name in names:
        (tmp_path / name).touch()
    write(tmp_path / "net.jq")
    assert sorted(os.listdir(tmp_path)) == sorted(["net.jq", *names])


def test_content_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, fsync, replace = [], os.fsync, os.replace
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder"}

    def synced(opened: int) -> None:
        calls.append(kinds[stat.S_IFMT(os.fstat(opened).st_mode)])
        fsync(opened)

    def replaced(old: Path, new: Path) -> None:
        calls.append("name")
        replace(old, new)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.replace", replaced)
    write(tmp_path / "net.jq")
    assert calls == ["file", "name", "folder"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    name = "ä" * 125 + ".jq"  # 253 bytes; 255 is the longest
    write(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        OSError(errno.EIO, os.strerror(errno.EIO)),
        OSError("the disk is gone"),
    ],
)
@pytest.mark.parametrize("when", ["write", "sync"])
def test_a_full_disk_is_said_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, when: str
) -> None:
    (tmp_path / "net.jq").write_bytes(b"old")

    def fails(*_: object) -> None:
        raise error

    if when == "sync":
        monkeypatch.setattr("os.fsync", fails)
    else:
        monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the text is checked below
        write(tmp_path / "net.jq")
    monkeypatch.undo()
    assert str(tmp_path / "net.jq") in str(caught.value)
    assert (error.strerror or "gone") in str(caught.value)
    assert "partial" not in str(caught.value)
    assert caught.value.errno == error.errno
    assert (tmp_path / "net.jq").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["net.jq"]


def test_a_full_device_is_said_with_the_path() -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        write("/dev/full")


def test_a_folder_that_cannot_be_written_is_said_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere; the system's answer to others is made here."""

    def denied(path: Path, *_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("os.open", denied)
    with pytest.raises(PermissionError) as caught:
        write(tmp_path / "net.jq")
    monkeypatch.undo()
    assert str(caught.value) == f"[Errno 13] Permission denied: '{tmp_path / 'net.jq'}'"


def test_an_error_of_another_path_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), replacing(tmp_path / "net.jq"):
        Path("/elsewhere").read_bytes()
    assert os.listdir(tmp_path) == []


def test_an_interrupt_as_the_temporary_file_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "net.jq", os.open
    path.write_bytes(b"old")

    def interrupted(name: Path, *options: int) -> int:
        os.close(opened(name, *options))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(path)
    assert {found.name: found.read_bytes() for found in tmp_path.iterdir()} == {"net.jq": b"old"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_what_stops_a_save_leaves_nothing(tmp_path: Path, stop: type[BaseException]) -> None:
    saves = ExitStack()
    saves.enter_context(replacing(tmp_path / "net.jq")).write_bytes(b"half")
    with pytest.raises(stop), saves:
        raise stop
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a", b"\x89PNG")]
)
def test_a_figure_has_the_format_of_its_name(tmp_path: Path, name: str, start: bytes) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    write_figure(tmp_path / "new" / name, figure, dpi=20)
    (made,) = (tmp_path / "new").iterdir()
    assert made.name == (name if "." in name else f"{name}.png")
    assert made.read_bytes().startswith(start)


def test_a_figure_of_no_format_replaces_nothing(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    (tmp_path / "a.xyz").write_bytes(b"old")
    with pytest.raises(ValueError, match="xyz"):
        write_figure(tmp_path / "a.xyz", figure, dpi=20)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.xyz": b"old"}
