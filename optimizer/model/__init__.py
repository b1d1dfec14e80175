"""What is read: checkpoints, captured graphs, weights, donors, text."""
