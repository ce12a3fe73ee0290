"""Ollama's Modelfile: its grammar, and a TEMPLATE derived from the chat template."""
