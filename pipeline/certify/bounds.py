"""Every bound of the certificate that is not a definition, and how it was measured (benchmarks/certify_bounds.py)."""

from __future__ import annotations

FINISH_SHARE = 0.99
FINISH_SLACK = 0.02
CANARY_SHARE = 0.8
