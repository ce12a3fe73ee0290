"""Package, serve and verify fine-tuned Granite models; imports on a laptop without torch."""

__version__ = "0.1.0"
