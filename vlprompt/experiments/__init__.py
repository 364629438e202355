"""What the experiments of all tasks share: configurations, folders, cells, statistics, tables, figures, pages."""
