"""The language that luod and its clients speak: messages, codec, connection, fds, wire and box.

Nothing here knows the daemon or a client, and nothing imports trio. `docs/protocol.md` says the same for a client in another language.
"""
