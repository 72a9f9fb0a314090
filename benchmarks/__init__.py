"""What is measured, against peers."""
