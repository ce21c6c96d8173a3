"""Forms in processes of their own that take turns, so that a busy moment of the machine hits all.

A process says `ready` when it can begin; then it answers each line with a line of JSON, a lap.
"""

import json
import subprocess
import sys
from collections.abc import Mapping

Lap = dict[str, float]


def take_turns(
    serving: Mapping[str, "subprocess.Popen[str]"], turns: int, request: str
) -> dict[str, list[Lap]]:
    """Return the laps of every form that can be opened here; the others are named on stderr.

    Args:
        serving: the form's processes, with pipes for stdin and stdout; ended here.
        turns: laps of each form; every other turn goes the other way round.
        request: the line that asks for a lap.
    """
    laps: dict[str, list[Lap]] = {}
    try:
        for form, process in serving.items():
            if _said(process) == "ready":
                laps[form] = []
            else:
                print(f"{form}: cannot be opened here, left out", file=sys.stderr)
        for turn in range(turns):
            for form in list(laps)[:: 1 if turn % 2 else -1]:
                process = serving[form]
                assert process.stdin is not None
                process.stdin.write(f"{request}\n")
                process.stdin.flush()
                laps[form].append(json.loads(_said(process)))
    finally:
        for process in serving.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
    return laps


def _said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()
