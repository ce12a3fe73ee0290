"""``python -m pipeline`` is ``granite-pipeline``."""

from pipeline.cli import main

main()
