"""The campaign: ``python -m tests.faults`` tries all operations and prints what it counted."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.campaign import (
    FAILING,
    Count,
    bad_reads,
    errors,
    half_writes,
    kills,
    power_cuts,
    slow_devices,
)
from tests.faults.scenes import Scene, make_root, scenes, working_folder
from tests.faults.zygote import Zygote

def main() -> int:
    """Parse, loop, sum up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scene", action="append", help="only this one; may be repeated")
    parser.add_argument("--campaign", action="append", help="only those whose name begins so")
    parser.add_argument("--sample", type=int, help="operations tried of each kind; all without")
    parser.add_argument("--folder", type=Path, help="where to work")
    given = parser.parse_args()
    total, start = Count(), time.monotonic()
    with working_folder(given.folder) as folder, Zygote() as zygote:
        made = scenes(make_root(folder, zygote), zygote)
        for name in given.scene or made:
            made[name].prepare()
            operations = len(made[name].undisturbed.trace)
            print(f"{name}: {operations} operations", flush=True)
            for title, campaign in _campaigns().items():
                if given.campaign and not any(title.startswith(c) for c in given.campaign):
                    continue
                count = campaign(made[name], given.sample)
                print(f"  {title}: {count.text()}", flush=True)
                for broken in count.broken[:20]:
                    print(f"    BROKEN {broken}", flush=True)
                total.add(count)
    print(f"all: {total.text()}; {len(total.broken)} broken; {time.monotonic() - start:.0f} s")
    return 1 if total.broken else 0


def _campaigns() -> dict[str, Callable[[Scene, int | None], Count]]:
    def failing(what: str) -> Callable[[Scene, int | None], Count]:
        return lambda scene, size: errors(scene, what, size)

    found: dict[str, Callable[[Scene, int | None], Count]] = {
        "killed before each operation": kills,
        "killed within each write": half_writes,
        "power lost before each operation": power_cuts,
    }
    found |= {what: failing(what) for what in FAILING}
    found["EIO at reading"] = bad_reads
    found["slow devices and signals"] = lambda scene, size: slow_devices(scene)
    return found


if __name__ == "__main__":
    sys.exit(main())
