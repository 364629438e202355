"""What a number means: pure functions of predictions and truth."""
