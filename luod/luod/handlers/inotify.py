"""inotify instances (inotify(7)).

Preserved: the watches and the queue of events. Watches refer to inodes and go on while luod has it; the client keeps its own table of watch
descriptors and paths in the metadata, or in a memfd, for the kernel does not tell the paths again.

Nothing is told of one: its fdinfo has a line for each watch (a million, if the administrator allows), written all at once. The queue is
bounded (fs.inotify.max_queued_events) and ends with IN_Q_OVERFLOW, after which the client must look at everything again.
"""

from __future__ import annotations

from typing import ClassVar

from luod.handlers.anonymous import Anonymous


class Inotify(Anonymous):
    """inotify instances."""

    kind: ClassVar[str] = "inotify"
    compatible: ClassVar[str] = "inotify-v1"
    inode: ClassVar[str] = "inotify"
