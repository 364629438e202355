"""What was learned, as files: prompts and weight masks."""
