"""The networks; each returns (logits, last feature map)."""
