"""A sweep on a real Ray cluster of two machines: what happens to the runs, which are stand-ins here (tests/faults has real ones)."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import clusters
import machines
import psutil
import pytest
import sweeps

from pipeline.errors import EnvironmentFailure, InputError
from pipeline.sweep import rays
from pipeline.sweep.spec import Resources

# a package named pipeline: the run's name says what it does
STAND_IN = """
import pathlib, signal, socket, sys, time
words = sys.argv
name, output = words[words.index("--name") + 1], pathlib.Path(words[words.index("--output") + 1])
def stop(*_):
    (output / f"{name}.saved").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
with (output / f"{name}.started").open("a") as out:
    out.write(f"{socket.gethostname()}\\n")
while name.startswith(("wait", "sleep")) and not (name.startswith("wait") and (output / "go").exists()):
    time.sleep(0.05)
print(f"error: {name} said why", flush=True)
sys.exit(int(name[-1]))
"""
_SITE = """
import os, pathlib
if "python" in os.path.basename(os.sys.executable) and os.environ.get("STAND_IN"):
    from pipeline.sweep import guarded
    guarded._ROOT, guarded.PAUSE_SECONDS = pathlib.Path(os.environ["STAND_IN"]), 0.05
"""


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "http://10.0.0.1:8265"])
def test_an_address_of_another_kind_is_refused(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match="is not HEAD:6379"):
        next(rays.map([], Resources(), aside=tmp_path / "ray.log"))


def test_what_libraries_say_goes_aside_and_what_we_say_does_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with rays._apart(tmp_path / "ray.log"):
        os.write(2, b"a state dump\n")
        sys.stderr.write("ours\n")
        told = threading.Thread(target=print, args=("a machine is dead",), name="ray_listen_error_messages")
        told.start()
        told.join()
        print("ours too")
    os.write(2, b"as before\n")
    assert capfd.readouterr() == ("ours too\n", "ours\nas before\n")
    assert (tmp_path / "ray.log").read_text() == "a state dump\na machine is dead\n"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[clusters.Node, clusters.Node, Path]]:
    machines.require_machines()
    if importlib.util.find_spec("ray") is None:
        pytest.fail("ray is not installed: make setup brings it")
    folder = tmp_path_factory.mktemp("nodes")
    stand_in = folder / "stand-in" / "pipeline"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    (stand_in / "__main__.py").write_text(STAND_IN)
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(_SITE)
    with clusters.two_nodes(folder, path=folder / "site", STAND_IN=str(stand_in.parent)) as (head, other):
        yield head, other, folder


def _driver(head: clusters.Node, output: Path, *names: str) -> subprocess.Popen[str]:
    output.mkdir()
    (output / "spec.yaml").write_text("resources: {cpus: 1}\nruns:\n" + "".join(f"  {name}: {{}}\n" for name in names))
    words = [sys.executable, "-m", "pipeline", "sweep", str(output / "spec.yaml"), "--on", "ray", "--output", str(output)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*head.inside, *words], text=True, env=dict(head.env), cwd=sweeps.ROOT, **pipes)


def _wait(driver: subprocess.Popen[str], *files: Path, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline, files
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.wide
def test_ctrl_c_lets_the_runs_save(nodes: tuple[clusters.Node, clusters.Node, Path], tmp_path: Path) -> None:
    head, _, folder = nodes
    output = tmp_path / "out"
    driver = _driver(head, output, "sleep-a0", "sleep-b0", "c0")
    _wait(driver, output / "sleep-a0.started", output / "sleep-b0.started")
    for inner in psutil.Process(driver.pid).children():
        inner.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=200)
    assert driver.returncode == 130, err
    assert [(output / f"sleep-{name}0.saved").exists() for name in "ab"] == [True, True]
    assert not (output / "c0.started").exists()
    assert [run["state"] for run in json.loads((output / "sweep.json").read_text())["runs"]] == ["stopped", "stopped", "waiting"]
    assert [path for path in (folder / "home").rglob("*") if path.is_file()] == []


@pytest.mark.slow
@pytest.mark.wide
def test_no_run_outlives_the_driver(nodes: tuple[clusters.Node, clusters.Node, Path], tmp_path: Path) -> None:
    head, _, _ = nodes
    output = tmp_path / "out"
    driver = _driver(head, output, "sleep-a0")
    _wait(driver, output / "sleep-a0.started")
    for inner in psutil.Process(driver.pid).children():
        inner.kill()
    driver.communicate(timeout=100)
    assert sweeps.gone(output, 60) == []


@pytest.mark.slow
@pytest.mark.wide
def test_a_lost_machines_run_is_done_on_another(nodes: tuple[clusters.Node, clusters.Node, Path], tmp_path: Path) -> None:
    head, other, _ = nodes
    output = tmp_path / "out"
    driver = _driver(head, output, "wait-a0", "wait-b0", "c0", "d2", "e3")
    _wait(driver, output / "wait-a0.started", output / "wait-b0.started")
    hosts = {name: (output / f"wait-{name}0.started").read_text().split() for name in "ab"}
    assert sorted(hosts.values()) == [["node-a"], ["node-b"]]
    other.off()
    (output / "go").touch()
    _, err = driver.communicate(timeout=400)
    assert driver.returncode == 3, err
    told = {run["name"]: (run["exit_code"], run["tries"]) for run in json.loads((output / "sweep.json").read_text())["runs"]}
    assert told == {"wait-a0": (0, 1), "wait-b0": (0, 1), "c0": (0, 1), "d2": (2, 1), "e3": (3, 4)}
    lost = next(name for name, host in hosts.items() if host == ["node-b"])
    assert (output / f"wait-{lost}0.started").read_text().split()[-1] == "node-a"
    assert "1 of 5 runs could not be done here: e3" in err
    assert "raylet" not in err


@pytest.mark.slow
@pytest.mark.wide
def test_without_a_cluster_it_says_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(EnvironmentFailure, match="no Ray cluster could be joined at auto") as refused:
        next(rays.map([], Resources(), aside=tmp_path / "ray.log"))
    assert "ray start --head" in refused.value.remedy
