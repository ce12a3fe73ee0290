"""A model folder or GGUF: its shape and bytes, read from headers without torch."""
