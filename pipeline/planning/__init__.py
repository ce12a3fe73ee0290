"""Plans: which flags fit a model on a machine, with reasons and predicted memory."""
