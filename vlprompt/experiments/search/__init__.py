"""Searching what a configuration leaves open, on validation data, with Optuna: options, study, trials, the search."""
