"""Images: where they come from (sources), how batches are made (pipeline, augment)."""
