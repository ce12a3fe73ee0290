"""Measure what the certificate's bounds are set by: distances of untampered runs over seeds, and of runs that are not the same.

    python benchmarks/certify_bounds.py --seeds 10 --out DIR                # tiny models, llama.cpp: false alarms
    python benchmarks/certify_bounds.py --run generic --output training/output   # an existing run, from its evidence

Prints one line a run and the largest figure of each kind; the distances between different seeds say how far apart the bounds
may be and still tell two trainings apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import certified

from pipeline.certify.certificate import Certificate
from pipeline.certify.distributions import Reference, compare_tops
from pipeline.config import Settings
from pipeline.files import read_json
from pipeline.runs import RunFolder
from training.certifying import Scope, certify

KINDS = ("merge.logits", "merge.cast_logits", "gguf.logits", "served.vllm_logprobs")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--variant", default="3.x-dense")
    options.add_argument("--backends", default="llamacpp")
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/certify"))
    options.add_argument("--run")
    options.add_argument("--output", type=Path, default=Path("training/output"))
    args = options.parse_args()
    scope = Scope(tuple(args.backends.split(",")), keep=False)
    if args.run:
        report([(args.run, certify(RunFolder(args.run, args.output), Settings(), scope))])
        return
    runs = [certified.make(args.out / args.variant, seed=seed, variant=args.variant) for seed in range(1, args.seeds + 1)]
    report([(run.name, certify(run, Settings(), scope)) for run in runs])
    between(runs)


def report(certificates: list[tuple[str, Certificate]]) -> None:
    """One line a run, then the largest of each figure and the number of false alarms."""
    largest: dict[str, dict[str, float]] = {}
    for name, certificate in certificates:
        print(name, "certified" if certificate.passed else [f"{f.id}: {f.figure}" for f in certificate.broken])
        for finding in (f for link in certificate.links for f in link.findings if f.id in KINDS):
            print("  ", finding.id, finding.figure)
            for key in ("kl", "gap", "max_difference"):
                if key in finding.data:
                    seen = largest.setdefault(finding.id, {})
                    seen[key] = max(seen.get(key, 0.0), float(finding.data[key]))
            largest[finding.id]["top1_least"] = min(largest[finding.id].get("top1_least", 1.0), float(finding.data["top1"]))
    alarms = sum(not certificate.passed for _, certificate in certificates)
    print(f"{len(certificates)} untampered runs, {alarms} false alarms; largest:")
    print(json.dumps(largest, indent=1))


def between(runs: list[RunFolder]) -> None:
    """Distance of one seed's model from another's, on the first one's positions that both were asked."""
    references: dict[str, Any] = {run.name: Reference.from_json(read_json(run.probes)) for run in runs}
    found = []
    for a, b in itertools.combinations(references, 2):
        theirs = {probe.ids: probe.top for probe in references[b].held_out}
        shared = [(probe.top, theirs[probe.ids]) for probe in references[a].held_out if probe.ids in theirs]
        if shared:
            found.append((compare_tops([x for x, _ in shared], [y for _, y in shared])[0], a, b))
    if found:
        least = min(found, key=lambda one: one[0].gap)
        print(f"nearest pair of {len(found)} different seeds: {least[1]}, {least[2]}: {least[0]}")


if __name__ == "__main__":
    main()
