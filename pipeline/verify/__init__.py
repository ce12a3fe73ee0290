"""Question every backend and judge the answers."""
