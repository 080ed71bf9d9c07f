"""`luod --supervised`: a parent that keeps the daemon's stored descriptors while the daemon crashes and starts again.

Theory. Under systemd a session survives a crash of luod because it lies, as one descriptor, in the service manager's store. A container
or a user session has no such manager, so luod brings one: a parent that speaks the same protocol (sd_notify(3), sd_listen_fds(3)). To the
daemon both are one code path. The parent touches no client, knows no message and imports nothing of the daemon: what a guest's memory
hangs on must be small enough to be seen not to crash. `luod --supervised` turns into it with execve, so that nothing else stays in its
memory.

Happy path: start the daemon with what is stored, store and remove what it says, see it die, kill what it left, start it again.

Unhappy paths:
1. The daemon dies, hangs (watchdog) or doesn't become ready: its processes are killed, and it starts again, later each time. What it had
   sent before its death still counts.
2. It can't start at all: it was never ready, nothing is stored, and it ended by itself. The parent ends with the same status. In every
   other case the parent goes on: with descriptors in the store its end would be their end.
3. It ends by itself, with 0 or not, without a signal to the parent: it starts again, as with systemd's Restart=always. Who wants an end
   tells the parent.
4. The store is full: the descriptor is closed, and a line is logged. The daemon isn't told (nor does systemd); it counts against FDSTORE.
5. The parent is told to end: the daemon gets SIGTERM, whatever is left after a bound SIGKILL. The stored descriptors end with the parent.
6. The parent is killed: the daemon goes on, with all that it holds, but can't store any more.
7. A bug in the parent: an exception is logged, and the round goes on with its next part.

Invariants: only the main process is listened to, and a process becomes that by being started by the parent or named by its predecessor. A
descriptor that came is stored or closed, and a close that may block is made in a thread. All modules are imported before the daemon
starts: a later import would load the next version's code. Nothing that the parent has open reaches the daemon but 0, 1, 2 and what is
stored.
"""
