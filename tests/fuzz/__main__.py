"""``python -m tests.fuzz READER [options of libFuzzer]``: one campaign against one reader.

``python -m tests.fuzz --seconds N [READER...]`` does one after the other and prints a table. New
inputs go into a folder of their own; a crash is written to ``crash-*`` and ends its campaign.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

LIMITS = ("-timeout=10", "-rss_limit_mb=2048", "-max_len=8192", "-print_final_stats=1")
"""Ten seconds and two gigabytes for an input, PyTorch included; both are crashes if exceeded."""

CORPUS = Path(__file__).with_name("corpus")


def fuzz(name: str, given: list[str]) -> None:
    """Run libFuzzer; it does not return."""
    import atheris

    with atheris.instrument_imports(include=["converter"]):
        from tests.fuzz import readers
    from tests.fuzz.mutate import change_json, change_safetensors

    def plain(data: bytes, size: int) -> bytes:
        return bytes(atheris.Mutate(data, max(size, len(data))))[:size]

    mutators = {
        "json": lambda data, size, seed: change_json(data, size, seed, plain),
        "safetensors": lambda data, size, seed: change_safetensors(data, size, seed, plain),
    }
    seeds = CORPUS / name
    folders = [tempfile.mkdtemp(prefix="gloss-corpus-")] + [str(seeds)] * seeds.is_dir()
    form = readers.FORMS[name]
    more = {"custom_mutator": mutators[form]} if form in mutators else {}
    atheris.Setup(
        [sys.argv[0], *LIMITS, *given, *folders], lambda data: void(readers.run(name, data)), **more
    )
    atheris.Fuzz()


def void(_: object) -> None:
    """libFuzzer takes what a target returns for a wish."""


def campaign(seconds: int, names: list[str]) -> int:
    """All of them in turn; the number of those that crashed."""
    from tests.fuzz.readers import READERS

    crashed = total = 0
    print(f"{'reader':<16}{'executions':>12}{'inputs kept':>13}  crash")
    for name in names or sorted(READERS):
        command = [sys.executable, "-m", "tests.fuzz", name, f"-max_total_time={seconds}"]
        done = subprocess.run(command, capture_output=True, errors="replace", check=False)
        runs = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
        kept = re.findall(r"new_units_added: +(\d+)", done.stderr)
        last = done.stderr.strip().splitlines()[-1:]
        found = re.findall(r"Test unit written to (\S+)", done.stderr)
        crash = found[-1] if found else ""
        if done.returncode and not found:
            crash = f"exit code {done.returncode}: {last}"
        crashed += bool(crash)
        total += int(runs[-1]) if runs else 0
        print(f"{name:<16}{runs[-1] if runs else '?':>12}{kept[-1] if kept else '?':>13}  {crash}")
        sys.stdout.flush()
    print(f"{total:,} executions, {crashed} readers with a crash")
    return crashed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--seconds"]:
        sys.exit(min(campaign(int(sys.argv[2]), sys.argv[3:]), 1))
    fuzz(sys.argv[1], sys.argv[2:])
