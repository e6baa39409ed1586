"""What things cost on this machine: `kdgqa bench train`, `eval`, `data` and `convert`."""
