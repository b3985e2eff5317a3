"""From a score per coupled group to a smaller model."""
