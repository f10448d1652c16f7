"""What every other folder stands on: files, messages, ranks, signals, schemas, checkpoints."""
