"""The one trainer and what it needs: options, schedules, batches, checkpoints, callbacks."""
