"""The one supervisor: start, watch, retry and stop servers, and note what they serve."""
