"""Training, measuring and comparing segmentation models: losses, the run of a configuration, the search."""
