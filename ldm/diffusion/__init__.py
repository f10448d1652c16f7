"""The noise process and its samplers."""
