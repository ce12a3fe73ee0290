"""Datasets: read, converted, checked, split, summarised; the SOC alerts."""
