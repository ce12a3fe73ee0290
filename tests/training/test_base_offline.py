"""A hub base without a network: in a namespace that has nothing but this machine, with a cache as the hub's client leaves it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
from places import offline

ID, COMMIT = "owner/tiny", "a" * 40
RESOLVE = """
import json, sys, time
from pathlib import Path
from pipeline.errors import PipelineError
from pipeline.runs.folder import RunFolder
from training import base
begun = time.monotonic()
try:
    found = base.BaseModel.of_run(RunFolder("r", Path(sys.argv[2]))) if len(sys.argv) > 2 else base.resolve(sys.argv[1], Path("base"))
    said = [str(found.folder), found.revision, found.sha256]
except PipelineError as error:
    said = [type(error).__name__, error.message, error.remedy]
print(json.dumps([*said, time.monotonic() - begun]))
"""


def _cached(hub: Path) -> Path:
    """A snapshot laid out as the hub's client does: files are links to blobs."""
    model = hub / "hub" / "models--owner--tiny"
    snapshot, blobs = model / "snapshots" / COMMIT, model / "blobs"
    made = tiny.published_base("3.3", hub.parent / "made")
    for folder in (snapshot, blobs, model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(made.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


@pytest.mark.parametrize("variables", [{}, {"HF_HUB_OFFLINE": "1"}, {"https_proxy": "http://127.0.0.1:9"}])
def test_a_cached_base_is_found_at_once_and_said_so_in_a_line(variables: dict[str, str], tmp_path: Path) -> None:
    snapshot = _cached(tmp_path / "hf")
    done = offline("-c", RESOLVE, ID, cwd=tmp_path, HF_HOME=str(tmp_path / "hf"), **variables)
    assert done.returncode == 0, done.stderr
    folder, revision, _, seconds = json.loads(done.stdout)
    assert (folder, revision) == (str(snapshot), COMMIT)
    assert seconds < 20  # imports, no retries
    told = [line for line in done.stderr.splitlines() if line]
    assert len(told) == ("HF_HUB_OFFLINE" not in variables)
    assert all("is taken from the local cache" in line for line in told)
    assert all("the proxy http://127.0.0.1:9 (https_proxy)" in line for line in told) or "https_proxy" not in variables


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    ("variables", "words", "remedy"),
    [
        ({}, "does not answer", "connect"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
        ({"https_proxy": "http://127.0.0.1:9"}, "the proxy http://127.0.0.1:9", "unset https_proxy"),
        ({"https_proxy": "ftp://127.0.0.1:9"}, "https_proxy=ftp://127.0.0.1:9 is no proxy", "write https_proxy="),
    ],
)
def test_a_base_that_is_not_cached_is_one_line(
    variables: dict[str, str], words: str, remedy: str, partial: bool, tmp_path: Path
) -> None:
    if partial:  # what an interrupted download leaves
        (_cached(tmp_path / "hf") / "model.safetensors").unlink()
    done = offline("-c", RESOLVE, ID, cwd=tmp_path, HF_HOME=str(tmp_path / "hf"), **variables)
    assert done.returncode == 0, done.stderr
    kind, message, said, _ = json.loads(done.stdout)
    assert kind == "EnvironmentFailure"
    assert message.startswith("owner/tiny is not whole in the local hub cache") and words in message and remedy in said
    assert "\n" not in message and done.stderr == ""


def test_the_snapshot_that_was_trained_is_used_though_the_cache_is_elsewhere_now(tmp_path: Path) -> None:
    snapshot, run = _cached(tmp_path / "hf"), tmp_path / "out" / "r"
    noted = """
import sys
from pathlib import Path
from pipeline.runs.hashes import sha256_tree
from pipeline.runs.manifest import Manifest
folder = Path(sys.argv[1])
base = {"id": "owner/tiny", "revision": "a" * 40, "sha256": sha256_tree(folder), "note": ""}
inputs = {"base": base, "data": {}, "parameters": {"base": "owner/tiny"}}
Manifest(Path(sys.argv[2]) / "manifest.json").record("finetune", inputs, [], {"base_folder": str(folder)}, 1)
"""
    assert offline("-c", noted, str(snapshot), str(run), cwd=tmp_path).returncode == 0
    done = offline("-c", RESOLVE, ID, str(tmp_path / "out"), cwd=tmp_path, HF_HOME=str(tmp_path / "empty"))
    assert json.loads(done.stdout)[:2] == [str(snapshot), COMMIT], done.stderr
    assert done.stderr == ""
    blob = (snapshot / "config.json").resolve()
    blob.write_text(blob.read_text() + "\n")  # not what was trained on any more
    time.sleep(0.01)
    done = offline("-c", RESOLVE, ID, str(tmp_path / "out"), cwd=tmp_path, HF_HOME=str(tmp_path / "empty"))
    assert json.loads(done.stdout)[0] == "EnvironmentFailure"


@contextmanager
def _hub(model: Path, slow: float = 0) -> Iterator[tuple[str, list[str]]]:
    """A hub with one model, which answers a HEAD of its first page after ``slow`` seconds; its URL and the files it sent."""
    files, sent = {path.name: path.read_bytes() for path in model.iterdir()}, list[str]()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            if self.path == "/":
                time.sleep(slow)
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            name, given = self.path.rpartition("/")[2], b"{}"
            if self.path.startswith("/api/models/owner/tiny/tree"):
                given = json.dumps([{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in files.items()]).encode()
            elif self.path.startswith("/api/models/owner/tiny"):
                given = json.dumps({"id": ID, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}).encode()
            elif "/resolve/" in self.path:
                given = files[name]
                sent.extend([name] if body else [])
            self.send_response(200)
            self.send_header("Content-Length", str(len(given)))
            self.send_header("ETag", f'"{hashlib.sha256(given).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(given)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()


def _resolve(cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GRANITE_"))} | env
    return subprocess.run([sys.executable, "-c", RESOLVE, ID], capture_output=True, text=True, timeout=120, env=given, cwd=cwd, check=False)  # fmt: skip


@pytest.mark.parametrize("cached", [False, True])
def test_a_slow_hub_is_waited_for_where_the_base_is_in_no_cache(cached: bool, tmp_path: Path) -> None:
    if cached:
        _cached(tmp_path / "hf")
    model = tiny.published_base("3.3", tmp_path / "published")
    with _hub(model, slow=7) as (url, sent):
        done = _resolve(tmp_path, HF_HOME=str(tmp_path / "hf"), HF_ENDPOINT=url)
    folder, revision, *_ = json.loads(done.stdout)
    assert revision == COMMIT, done.stdout + done.stderr
    assert (Path(folder) / "model.safetensors").is_file()
    assert ("model.safetensors" in sent) is not cached
    assert ("is waited for" in done.stderr, "is taken from the local cache" in done.stderr) == (not cached, cached)


@pytest.mark.parametrize("connected", [False, True])
def test_an_old_cache_that_cannot_be_written_is_read_and_what_is_new_goes_elsewhere(connected: bool, tmp_path: Path) -> None:
    snapshot = _cached(tmp_path / "old")
    env = {"HF_HOME": str(tmp_path / "new"), "GRANITE_PIPELINE_OLD_HUB_CACHE": str(tmp_path / "old" / "hub")}
    with _hub(snapshot) as (url, sent):
        done = _resolve(tmp_path, HF_ENDPOINT=url if connected else "http://127.0.0.1:9", **env)
        assert json.loads(done.stdout)[:2] == [str(snapshot), COMMIT], done.stderr
        assert "model.safetensors" not in sent
        if connected:  # what the old cache lacks is downloaded to the new one
            (snapshot / "model.safetensors").unlink()
            done = _resolve(tmp_path, HF_ENDPOINT=url, **env)
            assert json.loads(done.stdout)[0].startswith(str(tmp_path / "new")), done.stdout + done.stderr
            assert "model.safetensors" in sent
