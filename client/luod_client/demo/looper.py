"""A client that asks luod something over and over on one connection: what an upgrade looks like from outside."""

from __future__ import annotations

import select
import statistics
import sys
import time
from typing import Final

import luod_client
from luod_client.demo.processes import await_word, played, report

_BETWEEN_S: Final = 0.0002
_WARM_UP: Final = 50


def main() -> None:
    """Told `loop`: begin, report `looping`; told `stop`: report `looped`, the round trips, their times, and what went wrong if it did."""
    (runtime_dir,) = played(sys.argv[1:])
    times: list[float] = []
    fault = ""
    await_word("loop")
    with luod_client.deserialize(runtime_dir=runtime_dir) as connection:
        for _ in range(_WARM_UP):
            connection.status()
        report("looping")
        try:
            while not select.select([sys.stdin], [], [], _BETWEEN_S)[0]:
                began = time.perf_counter()
                connection.status()
                times.append(time.perf_counter() - began)
        except luod_client.LuodError as error:
            fault = str(error)
    await_word("stop")
    report("looped", round_trips=len(times), usual_s=statistics.median(times or [0.0]), longest_s=max(times, default=0.0), fault=fault)


if __name__ == "__main__":
    main()
