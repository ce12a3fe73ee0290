"""Exports: merged FP16, GGUF, Modelfile, and the reference answers."""
