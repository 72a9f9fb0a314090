"""The laws of the loss: their mathematics, their fit, and which of them answers."""
