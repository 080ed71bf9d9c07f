"""BPF objects (bpf(2)): maps, programs, links, type information.

Preserved: the object. A map keeps its contents (programs and other holders go on changing them), a program stays loaded, a link keeps its
program attached, and so what it does goes on while luod has it. That is what a client wants who gives it, and luod gains no right by it: it
never calls bpf(2). Pinning in a bpffs is another way, and outlives luod.

A link tells nothing of itself: its fdinfo waits, by the type of link, for the lock of all network configuration or of all cgroups
(net/core/dev.c: bpf_xdp_link_show_fdinfo, kernel/bpf/cgroup.c). Ids are the kernel's, and never used twice while the object lives.
"""

from __future__ import annotations

from typing import ClassVar

from luod.handlers.anonymous import Anonymous, Told, number, text


class BpfMap(Anonymous):
    """Maps. Told: the id, the type (enum bpf_map_type), the sizes of a key and a value in bytes, and how many entries fit."""

    kind: ClassVar[str] = "bpf-map"
    compatible: ClassVar[str] = "bpf-map-v1"
    inode: ClassVar[str] = "bpf-map"
    told: ClassVar[dict[str, Told]] = {
        "id": Told("map_id", number, 0),
        "type": Told("map_type", number, -1),
        "key_size": Told("key_size", number, -1),
        "value_size": Told("value_size", number, -1),
        "max_entries": Told("max_entries", number, -1),
    }


class BpfProg(Anonymous):
    """Programs. Told: the id, the type (enum bpf_prog_type) and the tag, a hash of its instructions."""

    kind: ClassVar[str] = "bpf-prog"
    compatible: ClassVar[str] = "bpf-prog-v1"
    inode: ClassVar[str] = "bpf-prog"
    told: ClassVar[dict[str, Told]] = {
        "id": Told("prog_id", number, 0),
        "type": Told("prog_type", number, -1),
        "tag": Told("prog_tag", text, ""),
    }


class BpfLink(Anonymous):
    """Links."""

    kind: ClassVar[str] = "bpf-link"
    compatible: ClassVar[str] = "bpf-link-v1"
    inode: ClassVar[str] = "bpf_link"


class BpfBtf(Anonymous):
    """Type information (BTF). Told: the id."""

    kind: ClassVar[str] = "bpf-btf"
    compatible: ClassVar[str] = "bpf-btf-v1"
    inode: ClassVar[str] = "btf"
    told: ClassVar[dict[str, Told]] = {"id": Told("btf_id", number, 0)}
