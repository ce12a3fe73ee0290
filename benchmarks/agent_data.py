"""Two example sets for agents, made anew by anyone: SOC alerts answered with tool calls, and questions answered from documents.

``python -m benchmarks.agent_data tools FOLDER`` and ``... documents FOLDER`` write ``train.jsonl`` and ``heldout.jsonl`` there. What is
right follows from the alert or the document alone, and every name, address and hash has to be copied from it.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.runs.files import write_atomic

SEED = 20262
Row = dict[str, Any]


def _tool(name: str, description: str, **properties: Any) -> Row:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


_TEXT = {"type": "string"}
TOOLS = [
    _tool("block_ip", "Block an address at the firewall", ip=_TEXT),
    _tool("isolate_host", "Cut a host off the network", host=_TEXT),
    _tool("lookup_ioc", "Ask threat intelligence", value=_TEXT, kind={"type": "string", "enum": ["hash", "domain"]}),
]
_BLOCK = [
    "Brute force on VPN from {ip}",
    "Port scan from {ip} against the DMZ",
    "Beacon to command server {ip}",
    "SQL injection attempts from {ip}",
    "Password spray from {ip} on OWA",
    "Exploit kit traffic from {ip}",
]
_ISOLATE = [
    "Ransom note written on {host}",
    "Credential dump with mimikatz on {host}",
    "{host} encrypts files on a share",
    "Web shell started cmd on {host}",
    "Worm spreads from {host}",
    "Rootkit found on {host}",
]
_BOTH = ["{host} infected, beacons to {ip}", "Ransomware on {host} talks to {ip}", "{host} sends stolen files to {ip}"]
_HASH = ["Unknown binary with hash {hash} was started", "New driver seen, hash {hash}", "Mail attachment with hash {hash}"]
_DOMAIN = ["First visit to {domain} from the office", "DNS asks for {domain} every minute", "Link to {domain} in a mail"]
_NONE = {
    "Planned backup on {host} finished": "No action: planned work.",
    "Approved scan from {ip} by the red team": "No action: approved test.",
    "{host} rebooted for its monthly patch": "No action: planned work.",
    "EICAR test file on {host}": "No action: approved test.",
}
_VERDICTS = {"malicious": "{value} is malicious. Block it.", "clean": "{value} is clean. Close the alert."}
_HOSTS, _DOMAINS = ("WS", "SRV", "DC", "WEB", "DB"), ("shop", "mail", "cdn", "login", "news")
# one of ten alerts of each kind; the kinds are dealt in turn, so that any beginning of the file is balanced
KINDS = ("block", "isolate", "hash", "none", "both", "block", "isolate", "domain", "none", "result")


def _facts(rng: random.Random) -> dict[str, str]:
    """An address of the ranges kept for documentation, a host, a short hash and a domain."""
    return {
        "ip": f"{rng.choice(('192.0.2', '198.51.100', '203.0.113'))}.{rng.randint(1, 254)}",
        "host": f"{rng.choice(_HOSTS)}-{rng.randint(10, 99)}",
        "hash": "".join(rng.choice("0123456789abcdef") for _ in range(8)),
        "domain": f"{rng.choice(_DOMAINS)}{rng.randint(10, 99)}.example",
    }


def _call(name: str, **arguments: str) -> Row:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tools_row(kind: str, rng: random.Random) -> Row:
    """One alert of a kind of KINDS and what is to be done: a call, two calls, none, or a sentence about a call's result."""
    facts = _facts(rng)
    wordings = {"block": _BLOCK, "isolate": _ISOLATE, "both": _BOTH, "hash": _HASH, "domain": _DOMAIN, "result": _DOMAIN}
    text = rng.choice(wordings.get(kind, list(_NONE)))
    calls = {
        "block": [_call("block_ip", ip=facts["ip"])],
        "isolate": [_call("isolate_host", host=facts["host"])],
        "both": [_call("isolate_host", host=facts["host"]), _call("block_ip", ip=facts["ip"])],
        "hash": [_call("lookup_ioc", value=facts["hash"], kind="hash")],
    }
    looked_up = [_call("lookup_ioc", value=facts["domain"], kind="domain")]
    turns: list[Row] = [{"role": "user", "content": text.format(**facts)}]
    if kind == "none":
        turns.append({"role": "assistant", "content": _NONE[text]})
    else:
        turns.append({"role": "assistant", "content": "", "tool_calls": calls.get(kind, looked_up)})
    if kind == "result":
        verdict = rng.choice(list(_VERDICTS))
        turns.append({"role": "tool", "content": json.dumps({"verdict": verdict})})
        turns.append({"role": "assistant", "content": _VERDICTS[verdict].format(value=facts["domain"])})
    return {"messages": turns, "tools": TOOLS}


_SHEETS = {"owner": "Owner: {value}", "site": "Site: {value}", "restart": "Restart: {value}"}
_ASKED = {"owner": "Who owns {host}?", "site": "Where does {host} stand?", "restart": "When may {host} be restarted?"}
_VALUES = {
    "owner": ("team red", "team blue", "team green", "the help desk", "the night shift", "payroll"),
    "site": ("hall 1", "hall 2", "hall 3", "the depot", "the north wing", "the cellar"),
    "restart": ("at 02:00", "on Sunday", "at noon", "never", "after the backup", "at 23:30"),
}
UNKNOWN = "The documents do not say."


def documents_row(number: int, rng: random.Random) -> Row:
    """Two sheets about hosts and a question that one of them answers, or (every sixth) none."""
    hosts = rng.sample([f"{kind}-{n}" for kind in _HOSTS for n in range(10, 99)], 3)
    sheets = [{key: rng.choice(values) for key, values in _VALUES.items()} for _ in range(2)]
    documents = [
        {
            "doc_id": str(n),
            "title": host,
            "text": " ".join(f"{_SHEETS[key].format(value=value)}." for key, value in sheet.items()),
        }
        for n, (host, sheet) in enumerate(zip(hosts, sheets, strict=False), 1)
    ]
    asked, which = rng.choice(list(_ASKED)), 2 if number % 6 == 5 else rng.randrange(2)
    answer = UNKNOWN if which == 2 else f"{hosts[which]}: {sheets[which][asked]}."
    turns = [{"role": "user", "content": _ASKED[asked].format(host=hosts[which])}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "documents": documents}


def generate(what: str, train: int, held_out: int, seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of ``tools`` or ``documents``; no held-out prompt is in training."""
    made: dict[str, Callable[[int, random.Random], Row]] = {
        "tools": lambda number, rng: tools_row(KINDS[number % len(KINDS)], rng),
        "documents": documents_row,
    }
    rng, seen, rows = random.Random(seed), set[str](), list[Row]()
    while len(rows) < train + held_out:
        row = made[what](len(rows), rng)
        key = json.dumps([row["messages"][0], row.get("documents")])
        if key not in seen or row["messages"][-1]["content"].startswith("No action"):
            seen.add(key)
            rows.append(row)
    return rows[held_out:], _unseen(rows[:held_out], rows[held_out:])


def _unseen(held_out: list[Row], train: list[Row]) -> list[Row]:
    """Those held-out rows whose prompt is not in training as well (the few wordings that need no action repeat)."""
    known = {json.dumps([row["messages"][0], row.get("documents")]) for row in train}
    return [row for row in held_out if json.dumps([row["messages"][0], row.get("documents")]) not in known]


def main() -> None:
    """Write the two files of a set."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agent_data", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("tools", "documents"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=400, help="rows to train on (default 400)")
    parser.add_argument("--held-out", type=int, default=100, help="rows held out (default 100)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "heldout"), generate(args.what, args.train, args.held_out), strict=True):
        write_atomic(args.folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{args.folder / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
