"""What a number means: metrics, protocols, statistics over seeds, tables and the report."""
