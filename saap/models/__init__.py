"""Models as we need them: families, uneven classes, coupled groups, reading and writing checkpoints."""
