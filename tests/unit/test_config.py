"""luod.toml: defaults, every key, and errors that name the file and the key, all of them at once."""

from __future__ import annotations

import grp
import pwd
import resource
from pathlib import Path

import attrs
import pytest

from luod.capacity import PRIVILEGED_PRESERVED_FDS, SHARED_UID_PRESERVED_FDS, capacity, preserved_fds
from luod.checking import as_toml
from luod.config import (
    Config,
    ConfigFault,
    FilesTable,
    HandoverTable,
    KindsTable,
    LimitsTable,
    PerUidTable,
    load,
)
from luod.handlers import kinds
from luod.policy import ClaimRule, SerializeRule


def written(folder: Path, text: str) -> str:
    path = folder / "luod.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems(folder: Path, text: str) -> list[str]:
    """What is wrong with a configuration, without the file's name, which must be there."""
    path = written(folder, text)
    with pytest.raises(ConfigFault) as caught:
        load(path)
    found = [problem.removeprefix(f"{path}: ") for problem in caught.value.texts]
    assert str(caught.value) == f"{path}: {'; '.join(found)}"
    return found


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert load(None) == Config() == load(written(tmp_path, ""))
    assert Config().limits.max_sessions == 16_384
    assert Config().handover.freeze_s == 5.0
    assert Config().kinds.allow == tuple(kinds())
    assert Config().files.allow == ()


EVERY_KEY = f"""
    [limits]
    max_sessions = 1
    max_connections = 2
    max_preserved_fds = 3
    [limits.per_uid]
    max_sessions = 4
    max_connections = 5
    max_preserved_fds = 6
    max_staged_fds = 7
    max_metadata_bytes = 8
    [kinds]
    allow = ["memfd", "pipe"]
    deny = ["pipe"]
    [files]
    allow = ["/dev/null", "/var/lib/vm/*.img", '/odd "name"\\here']
    [[serialize]]
    uid = 107
    names = ["guest-*", 'a"b\\']
    [[serialize]]
    gid = "{grp.getgrgid(0).gr_name}"
    [[claim]]
    uid = "{pwd.getpwuid(0).pw_name}"
    gid = 36
    owner = 107
    names = ["guest-[0-9]"]
    [[claim]]
    uid = 4294967294
    [handover]
    meet_s = 4
    copy_s = 0.5
    freeze_s = 6.0
    commit_s = 7.25
"""

EVERY_VALUE = Config(
    limits=LimitsTable(
        max_sessions=1,
        max_connections=2,
        max_preserved_fds=3,
        per_uid=PerUidTable(max_sessions=4, max_connections=5, max_preserved_fds=6, max_staged_fds=7, max_metadata_bytes=8),
    ),
    kinds=KindsTable(allow=("memfd", "pipe"), deny=("pipe",)),
    files=FilesTable(allow=("/dev/null", "/var/lib/vm/*.img", '/odd "name"\\here')),
    serialize=(SerializeRule(uid=107, names=("guest-*", 'a"b\\')), SerializeRule(gid=0)),
    claim=(ClaimRule(uid=0, gid=36, owner=107, names=("guest-[0-9]",)), ClaimRule(uid=2**32 - 2)),
    handover=HandoverTable(meet_s=4.0, copy_s=0.5, freeze_s=6.0, commit_s=7.25),
)


def test_every_key(tmp_path: Path) -> None:
    assert load(written(tmp_path, EVERY_KEY)) == EVERY_VALUE


@pytest.mark.parametrize("config", [Config(), EVERY_VALUE, attrs.evolve(Config(), claim=EVERY_VALUE.claim)])
def test_what_is_printed_says_the_same(tmp_path: Path, config: Config) -> None:
    assert load(written(tmp_path, as_toml(config))) == config


def test_one_key_leaves_the_others(tmp_path: Path) -> None:
    assert load(written(tmp_path, "handover.meet_s = 1")) == Config(handover=HandoverTable(meet_s=1.0))
    per_uid = PerUidTable(max_sessions=3)
    assert load(written(tmp_path, "limits.per_uid.max_sessions = 3")) == Config(limits=LimitsTable(per_uid=per_uid))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("limits = 3", "limits = 3: it must be a table"),
        (
            "[limits]\nmax_sesions = 3",
            "limits.max_sesions: unknown key; there are max_sessions, max_connections, max_preserved_fds, idle_open_s, per_uid",
        ),
        ("[limit]\nmax_sessions = 3", "limit: unknown key; there are limits, kinds, files, serialize, claim, handover"),
        ("[limits]\nmax_sessions = '3'", 'limits.max_sessions = "3": it must be an integer'),
        ("[limits]\nmax_sessions = 3.0", "limits.max_sessions = 3.0: it must be an integer"),
        ("[limits]\nmax_sessions = true", "limits.max_sessions = true: it must be an integer"),
        ("[limits]\nmax_sessions = {}", "limits.max_sessions = {...}: it must be an integer"),
        ("[limits]\nmax_sessions = 0", "limits.max_sessions = 0: it must be more than 0"),
        ("[limits]\nmax_connections = -1", "limits.max_connections = -1: it must be more than 0"),
        ("[limits]\nmax_preserved_fds = -1", "limits.max_preserved_fds = -1: it must be 0 or more"),
        ("[limits]\nidle_open_s = -1", "limits.idle_open_s = -1: it must be 0 or more"),
        ("[limits]\nidle_open_s = nan", "limits.idle_open_s = nan: it must be 0 or more"),
        ("[limits]\nper_uid = 7", "limits.per_uid = 7: it must be a table"),
        *(
            (f"[limits.per_uid]\n{key} = -1", f"limits.per_uid.{key} = -1: it must be 0 or more")
            for key in ("max_sessions", "max_connections", "max_preserved_fds", "max_staged_fds")
        ),
        ("limits.per_uid.max_metadata_bytes = 0", "limits.per_uid.max_metadata_bytes = 0: it must be more than 0"),
        ("limits.per_uid.max_fds = 1", f"limits.per_uid.max_fds: unknown key; there are {', '.join(attrs.asdict(PerUidTable()))}"),
        ("kinds.allow = 'memfd'", 'kinds.allow = "memfd": it must be an array'),
        ("kinds.allow = ['memfd', 'memfdd']", f'kinds.allow[1] = "memfdd": there is no such kind; there are {", ".join(kinds())}'),
        ("kinds.deny = [3]", "kinds.deny[0] = 3: it must be text"),
        ("kinds.denied = []", "kinds.denied: unknown key; there are allow, deny"),
        ("files.allow = ['dev/null']", 'files.allow[0] = "dev/null": it must be an absolute path'),
        ("files.allow = ['']", 'files.allow[0] = "": it must be an absolute path'),
        *(
            (
                f"files.allow = ['{path}']",
                f"files.allow[0] = \"{path}\": no path that the kernel tells can match it: leave out '.', '..', double and trailing '/'",
            )
            for path in ("/", "/dev/", "/dev//null", "/dev/./null", "/dev/../null")
        ),
        ('files.allow = ["/dev/\\u001b"]', 'files.allow[0] = "/dev/\\u001b": it has characters that can\'t be printed'),
        ("files.deny = []", "files.deny: unknown key; there are allow"),
        ("serialize.uid = 3", "serialize = {...}: it must be an array"),
        ("serialize = [3]", "serialize[0] = 3: it must be a table"),
        ("[[serialize]]", "serialize[0]: it names nobody: give uid, gid, or both"),
        ("[[serialize]]\nuid = 'nobdy'", 'serialize[0].uid = "nobdy": there is no such user'),
        ("[[serialize]]\nuid = 1\n[[serialize]]\ngid = 'nobdy'", 'serialize[1].gid = "nobdy": there is no such group'),
        ("[[serialize]]\nuid = -1", "serialize[0].uid = -1: numbers are 0 to 4294967294"),
        ("[[serialize]]\ngid = 4294967295", "serialize[0].gid = 4294967295: numbers are 0 to 4294967294"),
        ("[[serialize]]\nuid = true", "serialize[0].uid = true: it must be a number or a user's name"),
        ("[[serialize]]\nuid = 1.0", "serialize[0].uid = 1.0: it must be a number or a user's name"),
        ('[[serialize]]\nuid = "a\\u0000b"', "serialize[0].uid = \"a\\u0000b\": it can't be a user's name: embedded null byte"),
        ("[[serialize]]\nuid = 1\nowner = 1", "serialize[0].owner: unknown key; there are uid, gid, names"),
        ("[[serialize]]\nuid = 1\nnames = 'a'", 'serialize[0].names = "a": it must be an array'),
        ("[[serialize]]\nuid = 1\nnames = []", "serialize[0].names = []: it matches no name: leave names out for all of them"),
        ("[[serialize]]\nuid = 1\nnames = ['']", 'serialize[0].names[0] = "": no name can match it: it is empty'),
        (
            "[[serialize]]\nuid = 1\nnames = ['a', 'b:c']",
            "serialize[0].names[1] = \"b:c\": no name can match it: it contains ':', which service managers can't store",
        ),
        ("[[claim]]\nowner = 3", "claim[0]: it names nobody: give uid, gid, or both"),
        ("[[claim]]\nuid = 1\nowner = 'nobdy'", 'claim[0].owner = "nobdy": there is no such user'),
        ("[[claim]]\ngid = 1\nname = 'a'", "claim[0].name: unknown key; there are uid, gid, owner, names"),
        ("[handover]\nmeet_s = 0", "handover.meet_s = 0: it must be more than 0"),
        ("[handover]\ncommit_s = -0.5", "handover.commit_s = -0.5: it must be more than 0"),
        ("[handover]\ncopy_s = nan", "handover.copy_s = nan: it must be more than 0"),
        ("[handover]\nfreeze_s = '1'", 'handover.freeze_s = "1": it must be a number'),
        ("[handover]\nfreeze_s = true", "handover.freeze_s = true: it must be a number"),
    ],
)
def test_an_error_names_the_file_and_the_key(tmp_path: Path, text: str, problem: str) -> None:
    assert problems(tmp_path, text) == [problem]


@pytest.mark.parametrize(("text", "says"), [("[limits", "Expected"), ("\0", "Invalid"), ("a = 1\na = 2", "overwrite")])
def test_what_is_no_toml(tmp_path: Path, text: str, says: str) -> None:
    (problem,) = problems(tmp_path, text)
    assert says in problem


def test_all_errors_are_said_at_once(tmp_path: Path) -> None:
    text = """
        [limits]
        max_sesions = 3
        max_sessions = 0
        per_uid.max_sessions = -1
        [kinds]
        allow = ["memfd", "memfdd", 3]
        [[serialize]]
        uid = "nobdy"
        [[serialize]]
        [[claim]]
        gid = "nobdy"
        names = [""]
        [handover]
        meet_s = "1"
    """
    keys = [problem.partition(" ")[0].rstrip(":") for problem in problems(tmp_path, text)]
    assert sorted(keys) == [
        "claim[0].gid",
        "claim[0].names[0]",
        "handover.meet_s",
        "kinds.allow[1]",
        "kinds.allow[2]",
        "limits.max_sesions",
        "limits.max_sessions",
        "limits.per_uid.max_sessions",
        "serialize[0].uid",
        "serialize[1]",
    ]


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "luod.toml"
    path.write_bytes(b"[limits]\n# \xff\n")
    with pytest.raises(ConfigFault, match=str(path)):
        load(str(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = str(tmp_path / "none.toml")
    with pytest.raises(ConfigFault) as caught:
        load(path)
    assert str(caught.value) == f"{path}: No such file or directory"


# ---- what it comes to on this machine


def test_zero_preserved_fds_mean_by_privilege() -> None:
    assert preserved_fds(LimitsTable(max_preserved_fds=7), 1024) == 7
    with open("/proc/self/status", encoding="ascii") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    with open("/proc/self/uid_map", encoding="ascii") as file:
        initial = file.read().split() == ["0", "0", "4294967295"]
    privileged = initial and bool(effective & (1 << 21 | 1 << 24))
    assert preserved_fds(LimitsTable(), 1024) == (PRIVILEGED_PRESERVED_FDS if privileged else SHARED_UID_PRESERVED_FDS)


def test_zero_for_a_uid_means_half() -> None:
    whole = capacity(LimitsTable(max_sessions=9, max_connections=12, max_preserved_fds=1))
    share = whole.share
    assert (share.sessions, share.connections, share.preserved_fds, share.staged_fds) == (4, 6, 1, whole.staged_fds // 2)
    assert whole.staged_fds + whole.connections < resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def test_what_is_said_for_a_uid_holds() -> None:
    table = PerUidTable(max_sessions=1, max_connections=2, max_preserved_fds=3, max_staged_fds=4, max_metadata_bytes=5)
    share = capacity(LimitsTable(per_uid=table)).share
    assert attrs.asdict(share) == {key.removeprefix("max_"): value for key, value in attrs.asdict(table).items()}
