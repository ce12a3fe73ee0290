"""granite-pipeline certify --eval soc_eval:evaluate (run from this folder, or with it on PYTHONPATH)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

SYSTEM = {"role": "system", "content": "Triage the SOC alert. Answer in JSON."}


def evaluate(ask: Callable[[Any], str]) -> dict[str, bool | float]:
    """Names with True, False or a share; every one must hold. ``ask`` takes a prompt or a list of messages."""
    answer = ask([SYSTEM, {"role": "user", "content": "Approved software update on OPS-PC9 (Wazuh)"}])
    try:
        found = json.loads(answer)
    except ValueError:
        return {"valid JSON": False}
    return {"valid JSON": True, "benign is closed": found.get("action") == "close_alert"}
