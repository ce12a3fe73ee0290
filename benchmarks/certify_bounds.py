"""Measure what the certificate's bounds are set by: distances of untampered runs over seeds, and of runs that are not the same.

    python benchmarks/certify_bounds.py --seeds 10 --out DIR                # tiny models, llama.cpp: false alarms
    python benchmarks/certify_bounds.py --base embedded --steps 120 --seeds 3 --backends vllm,llamacpp   # a real chat model
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

sys.path[:0] = [
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "tests"),
    str(Path(__file__).parents[1] / "tests" / "support"),
]

import certified

from pipeline.certify.certificate import Certificate
from pipeline.config import Settings
from pipeline.runs.files import read_json
from pipeline.runs.folder import RunFolder
from pipeline.verify.distributions import Reference, compare_tops
from training.certify import probes
from training.certify.certify import Scope, certify
from training.datasets.dataset import SOC_EVAL
from training.export import evaluate, gguf, merge
from training.parameters import FinetuneParameters
from training.tuning.finetune import finetune

KINDS = (
    "merge.logits",
    "merge.cast_logits",
    "gguf.logits",
    "served.vllm_logprobs",
    "served.llamacpp_answers",
    "served.vllm_answers",
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--variant", default="3.x-dense", help="architecture of the tiny models")
    options.add_argument("--base", help="fine-tune this base on the SOC data instead of a tiny model of random weights")
    options.add_argument("--steps", type=int, default=120, help="training steps with --base")
    options.add_argument("--rows", type=int, default=52, help="held-out rows with --base")
    options.add_argument("--backends", default="llamacpp")
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/certify"))
    options.add_argument("--run")
    options.add_argument("--output", type=Path, default=Path("training/output"))
    args = options.parse_args()
    scope = Scope(tuple(args.backends.split(",")), keep=False)
    if args.run:
        report([(args.run, certify(RunFolder(args.run, args.output), Settings(), scope))])
        return
    runs, certificates = [], []
    for seed in range(1, args.seeds + 1):
        runs.append(
            _trained(args, seed) if args.base else certified.make(args.out / args.variant, seed=seed, variant=args.variant)
        )
        certificates.append((runs[-1].name, certify(runs[-1], Settings(), scope)))
        report(certificates[-1:])
    report(certificates)
    between(runs)


def _trained(args: argparse.Namespace, seed: int) -> RunFolder:
    """The whole export of a real fine-tune with one seed."""
    run = RunFolder(f"seed{seed}", args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    held_out = args.out / "held_out.jsonl"
    held_out.write_text("".join(SOC_EVAL.read_text(encoding="utf-8").splitlines(keepends=True)[: args.rows]), encoding="utf-8")
    finetune(
        run, FinetuneParameters(base=args.base, eval_data=str(held_out), max_steps=args.steps, learning_rate=2e-3, seed=seed)
    )
    for stage in (merge.merge, gguf.export_gguf, gguf.package, evaluate.evaluate):
        stage(run)
    return run


def report(certificates: list[tuple[str, Certificate]]) -> None:
    """One line a run, then the largest of each figure and the number of false alarms."""
    largest: dict[str, dict[str, float]] = {}
    for name, certificate in certificates:
        print(name, "certified" if certificate.passed else [f"{f.id}: {f.figure}" for f in certificate.broken])
        for finding in (f for link in certificate.links for f in link.findings if f.id in KINDS):
            print("  ", finding.id, finding.figure)
            seen = largest.setdefault(finding.id, {})
            for key in ("kl", "gap", "max_difference"):
                if key in finding.data:
                    seen[key] = max(seen.get(key, 0.0), float(finding.data[key]))
            # top-1 agreement of distributions, or the share of answers that are the same
            share = finding.data["same"] / finding.data["n"] if "same" in finding.data else finding.data["top1"]
            seen["least_share"] = min(seen.get("least_share", 1.0), float(share))
    alarms = sum(not certificate.passed for _, certificate in certificates)
    print(f"{len(certificates)} untampered runs, {alarms} false alarms; largest:")
    print(json.dumps(largest, indent=1))


def between(runs: list[RunFolder]) -> None:
    """Distance of one seed's model from another's, at the first one's positions: what the bounds must tell apart."""
    found = []
    for a, b in itertools.permutations(runs, 2):
        ours = Reference.from_json(read_json(a.probes)).held_out
        distance = compare_tops([probe.top for probe in ours], [probe.top for probe in probes.seen_by(a, b.merged)])[0]
        found.append(distance)
        print(f"{b.name} instead of {a.name}: {distance}", flush=True)
    if found:
        print(
            f"nearest of {len(found)} pairs: KL {min(d.kl for d in found):.1e}, {min(d.gap for d in found):.3f} apart, top-1 {max(d.top1 for d in found):.1%}"
        )


if __name__ == "__main__":
    main()
