"""What probes of fds were told on other kernels, for kinds that a machine may lack.

Obtained by opening each of them, as root, in virtual machines of QEMU, and printing what `Probe` asks the kernel; the handlers themselves
ran there too and took or refused the real fds as is said here. `KERNEL_7` is Linux 7.3.4 with CONFIG_VFIO_GROUP, CONFIG_VFIO_DEVICE_CDEV,
CONFIG_VFIO_NOIOMMU, CONFIG_IOMMUFD and QEMU's `edu` device bound to vfio-pci, without an IOMMU (`noiommu`) and with an emulated Intel one.
`KERNEL_6` is Debian 12's 6.1.0-56-amd64 with the same device behind an Intel IOMMU. The macvtap is of a machine with Linux 6.18.44.
"""

from __future__ import annotations

import os
from typing import Final

import attrs

from luod.handlers.base import Probe, fields_of
from luod.handlers.kernel import Stat
from luod_protocol.records import Fact

KERNEL_7: Final = "7.3.4"
KERNEL_6: Final = "6.1.192"


@attrs.frozen(kw_only=True)
class Record:
    """What was said of a fd.

    Attributes:
        kind: the handler that must take it, empty when none may.
        facts: what must be recorded of it.
        words: what must be in the reason when it is refused.
        info: its fdinfo.
        driver, sysfs: as in `Probe`.
    """

    name: str
    kernel: str
    kind: str = ""
    facts: dict[str, Fact] = attrs.Factory(dict[str, Fact])
    words: tuple[str, ...] = ()
    stat: Stat
    flags: int
    link: str
    info: bytes
    driver: str = ""
    sysfs: str = ""


class RecordedProbe(Probe):
    """A probe that asks the record instead of the kernel."""

    def __init__(self, record: Record) -> None:
        self.fd = -1
        self.stat = record.stat
        self.flags = record.flags
        self.link = record.link
        self.info = fields_of(record.info)
        self.driver = record.driver
        self.sysfs = record.sysfs


RECORDED: Final = (
    Record(
        name="vfio-container",
        kernel=KERNEL_7,
        kind="vfio-container",
        facts={},
        stat=Stat(st_mode=0o20666, st_ino=18, st_size=0, st_dev=os.makedev(0, 8), st_rdev=os.makedev(10, 196)),
        flags=0o100002,
        link="/dev/vfio/vfio",
        info=b"pos:\t0\nflags:\t02100002\nmnt_id:\t20\nino:\t18\n",
        driver="misc/vfio",
        sysfs="virtual/misc/vfio",
    ),
    Record(
        name="vfio-group",
        kernel=KERNEL_7,
        kind="vfio-group",
        facts={"device": "virtual/vfio/3"},
        stat=Stat(st_mode=0o20600, st_ino=20, st_size=0, st_dev=os.makedev(0, 8), st_rdev=os.makedev(254, 0)),
        flags=0o100002,
        link="/dev/vfio/3",
        info=b"pos:\t0\nflags:\t02100002\nmnt_id:\t20\nino:\t20\n",
        driver="vfio",
        sysfs="virtual/vfio/3",
    ),
    Record(
        name="vfio-group-noiommu",
        kernel=KERNEL_7,
        kind="vfio-group",
        facts={"device": "virtual/vfio/noiommu-0"},
        stat=Stat(st_mode=0o20600, st_ino=20, st_size=0, st_dev=os.makedev(0, 8), st_rdev=os.makedev(254, 0)),
        flags=0o100002,
        link="/dev/vfio/noiommu-0",
        info=b"pos:\t0\nflags:\t02100002\nmnt_id:\t20\nino:\t20\n",
        driver="vfio",
        sysfs="virtual/vfio/noiommu-0",
    ),
    Record(
        name="vfio-group-6.1",
        kernel=KERNEL_6,
        kind="vfio-group",
        facts={"device": "virtual/vfio/3"},
        stat=Stat(st_mode=0o20600, st_ino=107, st_size=0, st_dev=os.makedev(0, 5), st_rdev=os.makedev(245, 0)),
        flags=0o100002,
        link="/dev/vfio/3",
        info=b"pos:\t0\nflags:\t02100002\nmnt_id:\t24\nino:\t107\n",
        driver="vfio",
        sysfs="virtual/vfio/3",
    ),
    Record(
        name="vfio-device",
        kernel=KERNEL_7,
        kind="vfio-device",
        facts={"device": "pci0000:00/0000:00:03.0"},
        stat=Stat(st_mode=0o600, st_ino=5, st_size=0, st_dev=os.makedev(0, 12)),
        flags=0o2,
        link="anon_inode:[vfio-device]",
        info=b"pos:\t0\nflags:\t02000002\nmnt_id:\t14\nino:\t5\nvfio-device-syspath: /sys/devices/pci0000:00/0000:00:03.0\n",
    ),
    Record(
        name="vfio-device-6.1",
        kernel=KERNEL_6,
        kind="vfio-device",
        facts={"device": ""},
        stat=Stat(st_mode=0o600, st_ino=10650, st_size=0, st_dev=os.makedev(0, 14)),
        flags=0o2,
        link="anon_inode:[vfio-device]",
        info=b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t10650\n",
    ),
    Record(
        name="vfio-cdev",
        kernel=KERNEL_7,
        kind="vfio-cdev",
        facts={"device": "pci0000:00/0000:00:03.0/vfio-dev/vfio0"},
        stat=Stat(st_mode=0o20600, st_ino=22, st_size=0, st_dev=os.makedev(0, 8), st_rdev=os.makedev(253, 0)),
        flags=0o100002,
        link="/dev/vfio/devices/vfio0",
        info=b"pos:\t0\nflags:\t02100002\nmnt_id:\t20\nino:\t22\nvfio-device-syspath: /sys/devices/pci0000:00/0000:00:03.0\n",
        driver="vfio-dev",
        sysfs="pci0000:00/0000:00:03.0/vfio-dev/vfio0",
    ),
    Record(
        name="vfio-cdev-noiommu",
        kernel=KERNEL_7,
        kind="vfio-cdev",
        facts={"device": "pci0000:00/0000:00:04.0/vfio-dev/noiommu-vfio0"},
        stat=Stat(st_mode=0o20600, st_ino=22, st_size=0, st_dev=os.makedev(0, 8), st_rdev=os.makedev(253, 0)),
        flags=0o100002,
        link="/dev/vfio/devices/noiommu-vfio0",
        info=b"pos:\t0\nflags:\t02100002\nmnt_id:\t20\nino:\t22\nvfio-device-syspath: /sys/devices/pci0000:00/0000:00:04.0\n",
        driver="vfio-dev",
        sysfs="pci0000:00/0000:00:04.0/vfio-dev/noiommu-vfio0",
    ),
    Record(
        name="vfio-cdev-unplugged",
        kernel=KERNEL_7,
        kind="vfio-cdev",
        facts={"device": ""},
        stat=Stat(st_mode=0o20000, st_ino=22, st_size=0, st_dev=os.makedev(0, 8), st_rdev=os.makedev(253, 0)),
        flags=0o100002,
        link="/dev/vfio/devices/vfio0 (deleted)",
        info=b"pos:\t0\nflags:\t02100002\nmnt_id:\t20\nino:\t22\nvfio-device-syspath: /sys/devices/pci0000:00/0000:00:03.0\n",
        driver="vfio-dev",
    ),
    Record(
        name="iommufd",
        kernel=KERNEL_7,
        kind="iommufd",
        facts={},
        stat=Stat(st_mode=0o20660, st_ino=16, st_size=0, st_dev=os.makedev(0, 8), st_rdev=os.makedev(10, 256)),
        flags=0o100002,
        link="/dev/iommu",
        info=b"pos:\t0\nflags:\t02100002\nmnt_id:\t20\nino:\t16\n",
        driver="misc/iommu",
        sysfs="virtual/misc/iommu",
    ),
    Record(
        name="timerfd-6.1",
        kernel=KERNEL_6,
        kind="timerfd",
        facts={"clock": "monotonic"},
        stat=Stat(st_mode=0o600, st_ino=10650, st_size=0, st_dev=os.makedev(0, 14)),
        flags=0o2,
        link="anon_inode:[timerfd]",
        info=b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t10650\nclockid: 1\nticks: 0\nsettime flags: 00\n"
        b"it_value: (0, 0)\nit_interval: (0, 0)\n",
    ),
    Record(
        name="signalfd-6.1",
        kernel=KERNEL_6,
        kind="signalfd",
        facts={"signals": "0000000000000200"},
        stat=Stat(st_mode=0o600, st_ino=10650, st_size=0, st_dev=os.makedev(0, 14)),
        flags=0o2,
        link="anon_inode:[signalfd]",
        info=b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t10650\nsigmask:\t0000000000000200\n",
    ),
    Record(
        name="inotify-6.1",
        kernel=KERNEL_6,
        kind="inotify",
        facts={},
        stat=Stat(st_mode=0o600, st_ino=10650, st_size=0, st_dev=os.makedev(0, 14)),
        flags=0o0,
        link="anon_inode:inotify",
        info=b"pos:\t0\nflags:\t02000000\nmnt_id:\t15\nino:\t10650\n",
    ),
    Record(
        name="pidfd-6.1",
        kernel=KERNEL_6,
        kind="pidfd",
        facts={"pid": 120},
        stat=Stat(st_mode=0o600, st_ino=10650, st_size=0, st_dev=os.makedev(0, 14)),
        flags=0o2,
        link="anon_inode:[pidfd]",
        info=b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t10650\nPid:\t120\nNSpid:\t120\n",
    ),
    Record(
        name="pidfd",
        kernel=KERNEL_7,
        kind="pidfd",
        facts={"pid": 49},
        stat=Stat(st_mode=0o700, st_ino=4103, st_size=0, st_dev=os.makedev(0, 7)),
        flags=0o2,
        link="anon_inode:[pidfd]",
        info=b"pos:\t0\nflags:\t02000002\nmnt_id:\t7\nino:\t4103\nPid:\t49\nNSpid:\t49\n",
    ),
    Record(
        name="eventfd-6.1",
        kernel=KERNEL_6,
        kind="eventfd",
        facts={"semaphore": -1},
        stat=Stat(st_mode=0o600, st_ino=10650, st_size=0, st_dev=os.makedev(0, 14)),
        flags=0o2,
        link="anon_inode:[eventfd]",
        info=b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t10650\neventfd-count:                1\neventfd-id: 0\n",
    ),
    Record(
        name="pty-master-6.1",
        kernel=KERNEL_6,
        kind="pty",
        facts={"end": "master", "index": 0},
        stat=Stat(st_mode=0o20666, st_ino=86, st_size=0, st_dev=os.makedev(0, 5), st_rdev=os.makedev(5, 2)),
        flags=0o100002,
        link="/dev/ptmx",
        info=b"pos:\t0\nflags:\t02100002\nmnt_id:\t24\nino:\t86\ntty-index:\t0\n",
        sysfs="virtual/tty/ptmx",
    ),
    Record(
        name="pty-slave-6.1",
        kernel=KERNEL_6,
        kind="pty",
        facts={"end": "slave", "index": 0},
        stat=Stat(st_mode=0o20600, st_ino=3, st_size=0, st_dev=os.makedev(0, 26), st_rdev=os.makedev(136, 0)),
        flags=0o2,
        link="/dev/pts/0",
        info=b"pos:\t0\nflags:\t02000002\nmnt_id:\t29\nino:\t3\n",
        driver="pts",
    ),
    Record(
        name="tap-6.1",
        kernel=KERNEL_6,
        kind="tap",
        facts={},
        stat=Stat(st_mode=0o20600, st_ino=100, st_size=0, st_dev=os.makedev(0, 5), st_rdev=os.makedev(10, 200)),
        flags=0o100002,
        link="/dev/net/tun",
        info=b"pos:\t0\nflags:\t02100002\nmnt_id:\t24\nino:\t100\niff:\ttapx0\n",
        driver="misc/tun",
        sysfs="virtual/misc/tun",
    ),
    Record(
        name="bpf-map-6.1",
        kernel=KERNEL_6,
        kind="bpf-map",
        facts={"id": 1, "type": 2, "key_size": 4, "value_size": 8, "max_entries": 1},
        stat=Stat(st_mode=0o600, st_ino=10650, st_size=0, st_dev=os.makedev(0, 14)),
        flags=0o2,
        link="anon_inode:bpf-map",
        info=b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t10650\nmap_type:\t2\nkey_size:\t4\nvalue_size:\t8\nmax_entries:\t1\nmap_flags:\t0x0\nmap_extra:\t0x0\nmemlock:\t4096\nmap_id:\t1\nfrozen:\t0\n",
    ),
    Record(
        name="bpf-prog-6.1",
        kernel=KERNEL_6,
        kind="bpf-prog",
        facts={"id": 1, "type": 1, "tag": "a04f5eef06a7f555"},
        stat=Stat(st_mode=0o600, st_ino=10650, st_size=0, st_dev=os.makedev(0, 14)),
        flags=0o2,
        link="anon_inode:bpf-prog",
        info=b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t10650\nprog_type:\t1\nprog_jited:\t1\nprog_tag:\ta04f5eef06a7f555\nmemlock:\t4096\nprog_id:\t1\nrun_time_ns:\t0\nrun_cnt:\t0\nrecursion_misses:\t0\nverified_insns:\t2\n",
    ),
    Record(
        name="bpf-link-6.1",
        kernel=KERNEL_6,
        kind="bpf-link",
        facts={},
        stat=Stat(st_mode=0o600, st_ino=10650, st_size=0, st_dev=os.makedev(0, 14)),
        flags=0o0,
        link="anon_inode:bpf_link",
        info=b"pos:\t0\nflags:\t02000000\nmnt_id:\t15\nino:\t10650\nlink_type:\traw_tracepoint\nlink_id:\t1\nprog_tag:\ta04f5eef06a7f555\nprog_id:\t2\ntp_name:\tsys_enter\n",
    ),
    Record(
        name="bpf-btf-6.1",
        kernel=KERNEL_6,
        kind="bpf-btf",
        facts={"id": 33},
        stat=Stat(st_mode=0o600, st_ino=10650, st_size=0, st_dev=os.makedev(0, 14)),
        flags=0o0,
        link="anon_inode:btf",
        info=b"pos:\t0\nflags:\t02000000\nmnt_id:\t15\nino:\t10650\nbtf_id:\t33\n",
    ),
    Record(
        name="macvtap",
        kernel="6.18.44",
        kind="macvtap",
        facts={"device": "virtual/net/mvt0/macvtap/tap3"},
        stat=Stat(st_mode=0o20644, st_ino=2146429, st_size=0, st_dev=os.makedev(254, 0), st_rdev=os.makedev(246, 1)),
        flags=0o100002,
        link="/tmp/tap",
        info=b"pos:\t0\nflags:\t02100002\nmnt_id:\t70\nino:\t2146429\n",
        driver="macvtap",
        sysfs="virtual/net/mvt0/macvtap/tap3",
    ),
)

RECORDED_REFUSED: Final = (
    Record(
        name="kvm-vm",
        kernel=KERNEL_7,
        words=("a KVM virtual machine",),
        stat=Stat(st_mode=0o600, st_ino=5, st_size=0, st_dev=os.makedev(0, 12)),
        flags=0o2,
        link="anon_inode:kvm-vm",
        info=b"pos:\t0\nflags:\t02000002\nmnt_id:\t14\nino:\t5\n",
    ),
    Record(
        name="kvm-vcpu",
        kernel=KERNEL_7,
        words=("a KVM vCPU", "in a memfd"),
        stat=Stat(st_mode=0o600, st_ino=5, st_size=0, st_dev=os.makedev(0, 12)),
        flags=0o2,
        link="anon_inode:kvm-vcpu:0",
        info=b"pos:\t0\nflags:\t02000002\nmnt_id:\t14\nino:\t5\n",
    ),
    Record(
        name="kvm-device",
        kernel=KERNEL_7,
        words=("a device of a KVM",),
        stat=Stat(st_mode=0o600, st_ino=5, st_size=0, st_dev=os.makedev(0, 12)),
        flags=0o2,
        link="anon_inode:kvm-vfio",
        info=b"pos:\t0\nflags:\t02000002\nmnt_id:\t14\nino:\t5\n",
    ),
    Record(
        name="guest-memfd",
        kernel=KERNEL_7,
        words=("a guest_memfd", "in a memfd"),
        stat=Stat(st_mode=0o100600, st_ino=76, st_size=4096, st_dev=os.makedev(0, 15)),
        flags=0o100002,
        link="/[kvm-gmem] (deleted)",
        info=b"pos:\t0\nflags:\t0100002\nmnt_id:\t17\nino:\t76\n",
    ),
    Record(
        name="vhost-net",
        kernel=KERNEL_6,
        words=("a vhost device", "VHOST_SET_OWNER", "open the device again"),
        stat=Stat(st_mode=0o20600, st_ino=102, st_size=0, st_dev=os.makedev(0, 5), st_rdev=os.makedev(10, 238)),
        flags=0o100002,
        link="/dev/vhost-net",
        info=b"pos:\t0\nflags:\t02100002\nmnt_id:\t24\nino:\t102\n",
        driver="misc/vhost-net",
        sysfs="virtual/misc/vhost-net",
    ),
    Record(
        name="vhost-vsock",
        kernel=KERNEL_6,
        words=("a vhost device", "open the device again"),
        stat=Stat(st_mode=0o20600, st_ino=103, st_size=0, st_dev=os.makedev(0, 5), st_rdev=os.makedev(10, 241)),
        flags=0o100002,
        link="/dev/vhost-vsock",
        info=b"pos:\t0\nflags:\t02100002\nmnt_id:\t24\nino:\t103\n",
        driver="misc/vhost-vsock",
        sysfs="virtual/misc/vhost-vsock",
    ),
    Record(
        name="epoll",
        kernel=KERNEL_7,
        words=("an epoll", "make a new one"),
        stat=Stat(st_mode=0o600, st_ino=5, st_size=0, st_dev=os.makedev(0, 12)),
        flags=0o2,
        link="anon_inode:[eventpoll]",
        info=b"pos:\t0\nflags:\t02000002\nmnt_id:\t14\nino:\t5\n",
    ),
    Record(
        name="userfaultfd",
        kernel=KERNEL_6,
        words=("a userfaultfd",),
        stat=Stat(st_mode=0o600, st_ino=11879, st_size=0, st_dev=os.makedev(0, 14)),
        flags=0o0,
        link="anon_inode:[userfaultfd]",
        info=b"pos:\t0\nflags:\t02000000\nmnt_id:\t15\nino:\t11879\npending:\t0\ntotal:\t0\nAPI:\taa:0:80000000000000df\n",
    ),
    Record(
        name="io-uring",
        kernel=KERNEL_6,
        words=("an io_uring",),
        stat=Stat(st_mode=0o600, st_ino=11882, st_size=0, st_dev=os.makedev(0, 14)),
        flags=0o2,
        link="anon_inode:[io_uring]",
        info=b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t11882\nSqMask:\t0x3\nSqHead:\t0\nSqTail:\t0\nCachedSqHead:\t0\nCqMask:\t0x7\nCqHead:\t0\nCqTail:\t0\nCachedCqTail:\t0\nSQEs:\t0\nCQEs:\t0\nSqThread:\t-1\nSqThreadCpu:\t-1\nUserFiles:\t0\nUserBufs:\t0\nPollList:\nCqOverflowList:\n",
    ),
    Record(
        name="cuse-called-vfio-dev",
        kernel=KERNEL_6,
        words=("CUSE",),
        stat=Stat(st_mode=0o20644, st_ino=2, st_size=0, st_dev=os.makedev(0, 23), st_rdev=os.makedev(244, 0)),
        flags=0o100002,
        link="/tmp/c",
        info=b"pos:\t0\nflags:\t02100002\nmnt_id:\t26\nino:\t2\n",
        driver="cuse",
        sysfs="virtual/cuse/vfio-dev",
    ),
    Record(
        name="cuse-that-is-gone",
        kernel=KERNEL_6,
        words=("a character device",),
        stat=Stat(st_mode=0o20644, st_ino=3, st_size=0, st_dev=os.makedev(0, 23), st_rdev=os.makedev(244, 0)),
        flags=0o100002,
        link="/tmp/c",
        info=b"pos:\t0\nflags:\t02100002\nmnt_id:\t26\nino:\t3\n",
    ),
)
