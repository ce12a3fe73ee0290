"""What is installed, read from metadata: here, and in another Python."""

from __future__ import annotations

import json
import subprocess
import sys

from pipeline.machine import packages as installed


def test_packages_are_read_without_importing_them() -> None:
    code = "import sys, pipeline.machine.packages as i; i.here(); print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    found = installed.here()
    assert found.versions["pydantic"]
    assert installed.of("/no/such/python") is None
    script = subprocess.run([sys.executable, "-I", installed.__file__], capture_output=True, text=True, check=True)
    assert json.loads(script.stdout)["versions"]["pydantic"] == found.versions["pydantic"]
