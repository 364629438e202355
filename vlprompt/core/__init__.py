"""What every other package needs: errors, seeds, registries, files, names, options, the version."""
