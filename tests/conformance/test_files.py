"""The kind `file`: what lies at an allowed path is taken, by identity; nothing that looks like it is, and no look waits."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from entries import entry_of
from luod import verify
from luod.handlers import handler_of, kinds
from luod.handlers.base import Handler, Mismatch, Probe
from luod.handlers.file import AllowedFiles, File
from luod.handlers.kernel import cached_stat
from luod.handlers.recognizer import Recognizer
from luod.manifest import Entry
from luod_protocol import wire
from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import OwnedFd, duplicate
from processes import Talk, spawn_client, until
from things import eventfd, memfd


@contextmanager
def opened(path: Path | str, flags: int = os.O_RDWR) -> Generator[int]:
    with OwnedFd(os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o600)) as fd:
        yield fd.fileno()


def taken(fd: int, *allowed: object) -> Handler:
    return Recognizer(kinds=kinds(), files=map(str, allowed)).recognize(Probe(fd))


def refused(fd: int, *allowed: object) -> str:
    with pytest.raises(Refusal) as caught:
        taken(fd, *allowed)
    assert caught.value.code is Code.KIND_NOT_SUPPORTED
    return caught.value.message


def check(entry: Entry, fd: int, *, same_kernel: bool = True) -> None:
    with duplicate(fd) as copy:
        verify.entries([entry], [copy], same_kernel=same_kernel)


# ---- what is taken


def test_a_regular_file_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with opened(path) as fd:
        handler = taken(fd, "/dev/null", path)
        assert handler.kind == "file"
        assert handler.record(Probe(fd)) == {"path": str(path), "type": "regular", "access": "rw", "device": ""}


def test_a_device() -> None:
    with opened("/dev/zero", os.O_RDONLY) as fd:
        assert taken(fd, "/dev/zero").record(Probe(fd)) == {"path": "/dev/zero", "type": "character", "access": "r", "device": "1:5"}


@pytest.mark.root
def test_a_block_device(tmp_path: Path) -> None:
    node = tmp_path / "disk"
    os.mknod(node, 0o600 | stat.S_IFBLK, os.makedev(7, 0))
    try:
        fd = OwnedFd(os.open(node, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        pytest.skip(f"no loop devices here: {error.strerror}")
    with fd:
        assert taken(fd.fileno(), node).record(Probe(fd.fileno()))["device"] == "7:0"


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("disk.img", True),
        ("*.img", True),
        ("d?sk.im[fgh]", True),
        ("*", True),
        ("*.IMG", False),
        ("*.im", False),
        ("disk.img/*", False),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, fits: bool) -> None:
    with opened(tmp_path / "disk.img") as fd:
        if fits:
            assert taken(fd, tmp_path / pattern).record(Probe(fd))["path"] == f"{tmp_path}/disk.img"
        else:
            assert "([files])" in refused(fd, tmp_path / pattern)


def test_a_star_is_one_component(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    with opened(tmp_path / "below" / "disk.img") as fd:
        refused(fd, tmp_path / "*.img", tmp_path / "*")
        assert taken(fd, tmp_path / "*" / "*.img").kind == "file"


def test_a_path_that_is_written_out_may_be_a_symlink(tmp_path: Path) -> None:
    link = tmp_path / "link.img"
    link.symlink_to(tmp_path / "disk.img")
    with opened(tmp_path / "disk.img") as fd:
        assert taken(fd, link).record(Probe(fd))["path"] == str(link)


# ---- what isn't


def test_by_default_nothing_is_allowed(tmp_path: Path) -> None:
    with opened(tmp_path / "file") as fd:
        message = refused(fd)
        assert f"{tmp_path}/file, a regular file" in message
        assert "whoever runs luod can change that" in message
    assert "file" not in Recognizer(kinds=kinds(), files=()).kinds
    assert "file" in Recognizer(kinds=kinds(), files=("/dev/null",)).kinds


def test_the_kind_can_be_denied(tmp_path: Path) -> None:
    recognizer = Recognizer(kinds={"memfd"}, files=("/dev/null",))
    assert set(recognizer.kinds) == {"memfd"}
    with opened("/dev/null") as fd, pytest.raises(Refusal, match="by its path"):
        recognizer.recognize(Probe(fd))


def test_another_file_that_has_the_path_now(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with opened(path) as fd:
        path.rename(tmp_path / "old.img")
        path.touch()
        refused(fd, path)
        assert taken(fd, tmp_path / "*.img").record(Probe(fd))["path"] == f"{tmp_path}/old.img"


def test_a_file_that_was_removed(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with opened(path) as fd:
        path.unlink()
        refused(fd, path, tmp_path / "*")
        (tmp_path / "disk.img (deleted)").touch()
        refused(fd, path, tmp_path / "*")


def test_another_node_of_the_same_device() -> None:
    with opened("/dev/zero") as fd:
        refused(fd, "/dev/null")


def test_a_symlink_put_in_the_way_leads_nowhere(tmp_path: Path) -> None:
    """The kernel tells a path without symlinks; what is found there through one isn't what it told."""
    there = tmp_path / "guest" / "disk.img"
    there.parent.mkdir()
    with opened(there) as fd:
        assert cached_stat(f"{there}", follow=False) is not None
        (tmp_path / "guest").rename(tmp_path / "moved")
        (tmp_path / "guest").symlink_to(tmp_path / "moved")
        # A busy kernel may have to be asked again, or have forgotten.
        until(lambda: there.exists() and cached_stat(f"{there}", follow=True) is not None, "it is known what lies there")
        assert cached_stat(f"{there}", follow=False) is None
        refused(fd, tmp_path / "gues?" / "disk.img")


def test_what_the_kernel_has_not_cached_is_not_looked_up() -> None:
    with spawn_client(_wait) as client:
        path = f"/proc/{client.pid}/limits"
        assert cached_stat(path, follow=False) is None, "nobody has looked at it yet"
        assert os.stat(path).st_mode == 0o100444
    assert cached_stat("/", follow=False) is not None


def _wait(talk: Talk) -> None:
    talk.hear()


def _serve_fuse(talk: Talk, where: str) -> None:
    import errno
    import os
    import select
    import stat
    import threading
    from contextlib import suppress

    from fuse import LOOKUP, NoFuse, Server
    from luod.handlers.kernel import cached_stat

    try:
        server = Server(where, stat.S_IFDIR)
    except NoFuse as none:
        talk.tell(str(none))
        return
    poll = select.poll()
    poll.register(server.fd, select.POLLIN)
    found = [cached_stat(f"{where}/disk.img", follow=follow) for follow in (True, False)]
    talk.tell((found, bool(poll.poll(0))))

    def look() -> None:
        with suppress(OSError):
            os.stat(f"{where}/disk.img")

    thread = threading.Thread(target=look)
    thread.start()
    opcode, unique = server.asked()
    server.answer(unique, error=errno.ENOENT)
    thread.join()
    talk.tell(opcode == LOOKUP)
    os.close(server.fd)


@pytest.mark.root
def test_a_fuse_server_is_not_asked(tmp_path: Path) -> None:
    """It may be a hostile client's, and never answer."""
    with spawn_client(_serve_fuse, str(tmp_path)) as client:
        said = client.hear()
        if isinstance(said, str):
            pytest.skip(said)
        assert said == ([None, None], False)
        assert client.hear(), "stat(2) does ask"


def _open_fuse(talk: Talk, where: str) -> None:
    import os
    import stat
    import struct
    import threading
    from contextlib import suppress

    from fuse import OPEN, NoFuse, Server
    from luod.handlers.base import Probe
    from luod.handlers.file import AllowedFiles
    from luod.handlers.kernel import cached_stat

    try:
        server = Server(where, stat.S_IFREG)
    except NoFuse as none:
        talk.tell(str(none))
        return
    opened: list[int] = []
    thread = threading.Thread(target=lambda: opened.append(os.open(where, os.O_RDONLY)))
    thread.start()
    opcode, unique = server.asked()
    assert opcode == OPEN
    server.answer(unique, body=struct.pack("<QII", 1, 0, 0))  # struct fuse_open_out
    thread.join()
    probe = Probe(opened[0])
    talk.tell((cached_stat(where, follow=False) == probe.stat, AllowedFiles([where]).path_of(probe)))
    os.close(server.fd)
    with suppress(OSError):  # nobody is there to flush it
        os.close(opened[0])


@pytest.mark.root
def test_a_file_of_a_fuse_server_is_not_taken(tmp_path: Path) -> None:
    """Its server can give it another inode number while luod has it, and stop an upgrade with that."""
    path = tmp_path / "disk.img"
    path.touch()
    with spawn_client(_open_fuse, str(path)) as client:
        said = client.hear()
        if isinstance(said, str):
            pytest.skip(said)
        assert said == (True, None)


def test_other_kinds_are_not_files(tmp_path: Path) -> None:
    with memfd() as ram, eventfd() as event, opened(tmp_path / "file") as file:
        for fd in (ram.fileno(), event.fileno()):
            handler = handler_of(Probe(fd))
            assert handler is not None
            assert taken(fd, tmp_path / "*").kind == handler.kind
        with OwnedFd(os.open(f"/proc/self/fd/{file}", os.O_PATH | os.O_CLOEXEC)) as place:
            refused(place.fileno(), tmp_path / "*")
        with OwnedFd(os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)) as folder:
            refused(folder.fileno(), tmp_path)


def _fake(talk: Talk, where: str, number: int) -> None:
    import ctypes
    import os
    import socket

    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts = 0x10000000, 0x00020000
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(new_user | new_mounts):
        talk.tell(os.strerror(ctypes.get_errno()))
        return
    for name, content in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(content)
    if libc.mount(b"none", where.encode(), b"tmpfs", 0, None):
        talk.tell(os.strerror(ctypes.get_errno()))
        return
    fd = os.open(f"{where}/disk.img", os.O_RDWR | os.O_CREAT)
    with socket.socket(fileno=number) as sock:
        socket.send_fds(sock, [b"fd"], [fd])
    os.close(fd)
    talk.tell("sent")


def test_a_path_made_up_in_another_mount_namespace(tmp_path: Path) -> None:
    """There a client may mount what it likes where it likes, and /proc tells the path as it is there."""
    path = tmp_path / "disk.img"
    path.touch()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, spawn_client(_fake, str(tmp_path), theirs.fileno(), pass_fds=[theirs.fileno()]) as client:
        said = client.hear()
        if said != "sent":
            pytest.skip(f"no user namespaces here: {said}")
        packet = wire.receive(ours)
    assert packet is not None
    with packet:
        fd = packet.fds[0].fileno()
        # From there it is the root of the mount.
        assert Probe(fd).link.endswith("/disk.img")
        assert AllowedFiles([str(path), f"{tmp_path}/*", "/disk.img", "/*"]).path_of(Probe(fd)) is None


# ---- on the other side


def test_a_successor_verifies_what_nobody_can_change(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with opened(path) as fd:
        entry = entry_of(fd, handler=taken(fd, path))
        check(entry, fd)
        os.write(fd, b"more")
        path.rename(tmp_path / "elsewhere")
        check(entry, fd)
        (tmp_path / "elsewhere").unlink()
        check(entry, fd)


def test_a_successor_takes_nothing_else_for_it(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with opened(path) as fd, opened(path, os.O_RDONLY) as reader, opened("/dev/zero") as zero, opened("/dev/null") as null, memfd() as ram:
        entry = entry_of(fd, handler=taken(fd, path))
        with pytest.raises(Mismatch, match="access is r, it was rw"):
            check(entry, reader)
        with pytest.raises(Mismatch, match="another object"):
            check(entry, zero)
        with pytest.raises(Mismatch, match="type is character, it was regular"):
            check(entry, zero, same_kernel=False)
        with pytest.raises(Mismatch, match=r"device is 1:3, it was 1:5"):
            check(entry_of(zero, handler=taken(zero, "/dev/zero")), null, same_kernel=False)
        with eventfd() as event, pytest.raises(Mismatch, match="is no file"):
            check(entry, event.fileno(), same_kernel=False)
        assert not isinstance(taken(ram.fileno(), path), File)
