"""What the loop of a training script calls."""
