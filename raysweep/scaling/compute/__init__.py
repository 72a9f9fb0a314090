"""What the loss says of compute: how to split it, what experts save, what serving costs."""
