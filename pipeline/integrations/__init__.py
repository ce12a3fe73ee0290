"""Agent frameworks: the configured backend as the model object each of them wants."""
