"""A Ray cluster of two machines on one: namespaces of their own for host name, PIDs, mounts and network, joined by a cable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import sweeps

_UNSHARE = ("unshare", "--uts", "--pid", "--mount", "--net", "--fork", "--kill-child", "--mount-proc")
# the first process of a machine: it has a name and a temporary folder of its own for Ray, and collects who ends
_INIT = """
import signal, subprocess, sys, time
open("/proc/sys/kernel/hostname", "w").write(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", sys.argv[2]], check=True)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("up", flush=True)
while True:
    time.sleep(3600)
"""
_STARTS = 4
_HEAD, _OTHER = "10.213.0.1", "10.213.0.2"


@dataclass
class Node:
    """One machine."""

    name: str
    address: str
    scratch: Path
    env: Mapping[str, str]
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        words = [*_UNSHARE, sys.executable, "-c", _INIT, self.name, str(self.scratch)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=dict(self.env))
        assert self.process.stdout
        assert self.process.stdout.readline().strip() == "up"

    @property
    def inside(self) -> list[str]:
        """The words before a command that run it on this machine."""
        (first,) = psutil.Process(self.process.pid).children()
        return ["nsenter", "-t", str(first.pid), "-u", "-p", "-m", "-n"]

    def do(self, words: Sequence[str], **more: object) -> subprocess.CompletedProcess[str]:
        """Run a command on it."""
        return subprocess.run(
            [*self.inside, *words], env=dict(self.env), capture_output=True, text=True, check=False, timeout=300
        )

    def cut_off(self) -> None:
        """Take its network away without a word to anybody; it works on."""
        listed = self.do(["ip", "-o", "link", "show", "type", "veth"]).stdout
        device = listed.split(": ")[1].partition("@")[0]
        done = self.do(["ip", "link", "set", device, "down"])
        assert done.returncode == 0, done.stderr

    def off(self) -> None:
        """Switch it off."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


@contextmanager
def two_nodes(folder: Path, *, cpus: int = 1, path: Path | None = None, **more: str) -> Iterator[tuple[Node, Node]]:
    """A head and another machine, each with so many CPUs; a token is asked for, and homes are empty folders.

    ``path`` is looked in for modules first, and ``more`` is in the environment of both machines.
    """
    scratch = Path(tempfile.mkdtemp(prefix="gp-ray-", dir="/tmp"))  # sockets below it: short, also where pytest's folders are not
    (folder / "token").write_text("a-token-of-this-test-alone-" + "0" * 32)
    home = folder / "home"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_USAGE_STATS_ENABLED": "0"}
    env = sweeps.environment(home, **token, RAY_ADDRESS=f"{_HEAD}:6379", **more)
    env["PYTHONPATH"] = os.pathsep.join([*([str(path)] if path else []), env["PYTHONPATH"]])
    nodes: list[Node] = []
    try:
        for name, address in (("node-a", _HEAD), ("node-b", _OTHER)):
            nodes.append(Node(name, address, scratch, env))
        _join(*nodes)
        start_ray(nodes[0], "--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={scratch}", cpus=cpus)
        start_ray(nodes[1], f"--address={_HEAD}:6379", cpus=cpus)
        yield nodes[0], nodes[1]
    finally:
        for node in nodes:
            node.off()
        shutil.rmtree(scratch, ignore_errors=True)


def _join(one: Node, other: Node) -> None:
    """A cable between two machines."""
    cable = [f"gp{os.getpid() % 100000}{end}" for end in "ab"]
    subprocess.run(["ip", "link", "add", cable[0], "type", "veth", "peer", "name", cable[1]], check=True)
    for node, end in zip((one, other), cable, strict=True):
        subprocess.run(["ip", "link", "set", end, "netns", str(node.process.pid)], check=True)
        # on lo too: the cable goes with the other machine, and the address must not go with the cable
        given = (f"addr add {node.address}/24 dev {end}", f"addr add {node.address}/32 dev lo")
        for words in (*given, f"link set {end} up", "link set lo up"):
            done = node.do(["ip", *words.split()])
            assert done.returncode == 0, done.stderr


def start_ray(node: Node, *words: str, cpus: int) -> None:
    """Start a machine's part of the cluster: Ray gives it 30 s, which a busy machine may need several times."""
    fixed = [f"--node-ip-address={node.address}", f"--num-cpus={cpus}", "--object-store-memory=80000000", "--disable-usage-stats"]
    for left in reversed(range(_STARTS)):
        env = {name: value for name, value in node.env.items() if name != "RAY_ADDRESS"}
        command = [*node.inside, sys.executable, "-m", "ray.scripts.scripts", "start", *words, *fixed]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode == 0:
            return
        assert left, done.stdout + done.stderr
        node.do([sys.executable, "-m", "ray.scripts.scripts", "stop", "--force"])
        time.sleep(2)
