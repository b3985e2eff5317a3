"""What each coupled group contributes: importance, statistics, fluctuation."""
