"""Fuzz the readers of untrusted files for a given time each, with a new seed a round.

    python benchmarks/fuzz.py --seconds 600
    python benchmarks/fuzz.py --seconds 60 gguf env

Prints the number of inputs tried; ends with exit code 1 and the smallest breaking input when one is found.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "tests"),
    str(Path(__file__).parents[1] / "tests" / "support"),
]


def main() -> int:
    from fuzzing.targets import TARGETS, run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], help="default: all")
    parser.add_argument("--seconds", type=float, default=600, help="time for each target")
    parser.add_argument("--examples", type=int, default=300, help="inputs a round")
    parser.add_argument("--seed", type=int, default=1, help="seed of the first round")
    args = parser.parse_args()
    failed = 0
    for name in args.targets or TARGETS:
        rounds, until = 0, time.monotonic() + args.seconds
        try:
            while time.monotonic() < until:
                run(name, args.examples, args.seed + rounds)
                rounds += 1
            print(f"{name}: nothing in {rounds * args.examples} inputs", flush=True)
        except Exception as error:
            failed = 1
            print(f"{name}: broken by seed {args.seed + rounds}: {type(error).__name__}: {error}", flush=True)
            for note in getattr(error, "__notes__", []):
                print(f"    {note}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
