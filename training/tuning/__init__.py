"""Fine-tuning: labels, trainers, checkpoints, the stage."""
