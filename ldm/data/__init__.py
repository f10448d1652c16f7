"""From a folder of scans to batches."""
