"""A client dies right behind its request, before luod has answered: whoever asks again is told what came of it, and it has come of it once.

The supervisor is held meanwhile, where luod shall be in the middle: it waits for it before it acts.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager

import pytest

import luod_client
from harness import Talk, folder_for, spawn_client, until
from integration.test_supervised import serving, supervised
from luod_client import Code, Refusal
from luod_protocol import messages as m
from raw import Raw
from things import let_go, preserve_pipe, state

ID = bytes(range(1, 17))

pytestmark = pytest.mark.slow


def _dies_finalizing(talk: Talk, where: str, session_id: bytes) -> None:
    """Preserves the end to write of a pipe, and is killed as soon as it has sent finalize."""
    import os
    import signal

    from luod_protocol import messages as m
    from raw import Raw

    raw = Raw(where)
    raw.open("guest", session_id)
    raw.preserve(pipe=talk.hear())
    talk.tell("preserved")
    talk.hear()
    raw.say(m.Finalize(seq=4, session_id=session_id))
    os.kill(os.getpid(), signal.SIGKILL)


def _dies_finishing(talk: Talk, where: str, session_id: bytes) -> None:
    """Claims, and is killed as soon as it has sent finish."""
    import os
    import signal

    from luod_protocol import messages as m
    from luod_protocol.messages import Endpoint
    from raw import Raw

    raw = Raw(where, Endpoint.DESERIALIZE)
    claimed = raw.ask(m.Claim(seq=2, session_id=session_id))
    assert isinstance(claimed, m.Claimed), claimed
    talk.tell("claimed")
    talk.hear()
    raw.say(m.Finish(seq=3, session_id=session_id))
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def held(pid: int, *, held: bool) -> Generator[None]:
    """A process that is stopped meanwhile."""
    if held:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def finalized_again(where: str) -> m.Reply:
    """What somebody is told who asks again."""
    with Raw(where) as raw:
        return raw.ask(m.Finalize(seq=2, session_id=ID))


def code_of(reply: m.Reply) -> str:
    return reply.code if isinstance(reply, m.Refused) else reply.type


@pytest.mark.parametrize("in_the_middle", [False, True])
def test_finalize(in_the_middle: bool) -> None:
    with folder_for() as where, supervised(where) as (supervisor, said):
        first = serving(said, 1)
        read, write = os.pipe2(os.O_CLOEXEC)
        with os.fdopen(read) as end, spawn_client(_dies_finalizing, where, ID, pass_fds=[write]) as client:
            client.tell(write)
            assert client.hear() == "preserved"
            os.close(write)
            with held(supervisor.pid, held=in_the_middle):
                client.tell("go on")
                assert client.wait() == -signal.SIGKILL
                client.kill()  # as it was meant to be
                if in_the_middle:
                    # luod is in the middle of it, and isn't kept from others' requests.
                    assert code_of(finalized_again(where)) == Code.OUT_OF_ORDER
                    assert state(where) == "open"
            answer = until(lambda: (reply := finalized_again(where)).type == "finalized" and reply, "it was never finalized")
            assert isinstance(answer, m.Finalized)
            assert "daemon-crash" in answer.survives
            os.kill(first, signal.SIGKILL)
            serving(said, 2)
            with luod_client.deserialize(runtime_dir=where) as looker:
                assert [(each.session, each.state, each.entries) for each in looker.list()] == [("guest", "preserved", 1)]
                looker.discard("guest")
            assert os.read(end.fileno(), 1) == b"", "somebody still has it"


@pytest.mark.parametrize("in_the_middle", [False, True])
def test_finish(in_the_middle: bool) -> None:
    with folder_for() as where, supervised(where) as (supervisor, said):
        first = serving(said, 1)
        end, session_id = preserve_pipe(where)
        with end, spawn_client(_dies_finishing, where, session_id) as client:
            assert client.hear() == "claimed"
            with held(supervisor.pid, held=in_the_middle), luod_client.deserialize(runtime_dir=where) as looker:
                client.tell("go on")
                assert client.wait() == -signal.SIGKILL
                client.kill()  # as it was meant to be
                if in_the_middle:
                    with pytest.raises(Refusal) as caught:
                        looker.finish(session_id)
                    assert caught.value.code is Code.OUT_OF_ORDER
                    assert not let_go(end, 0)
            with luod_client.deserialize(runtime_dir=where) as looker:
                until(lambda: state(where) == "gone", "it was never finished")
                looker.finish(session_id)
                assert let_go(end, 0)
            os.kill(first, signal.SIGKILL)
            serving(said, 2)
            with luod_client.deserialize(runtime_dir=where) as looker:
                assert not looker.list()
                looker.finish(session_id)
