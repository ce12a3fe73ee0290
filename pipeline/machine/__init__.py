"""The machine: detected, named, or described; and the packages on it."""
