"""Group-wise codes: quantising, adapters that merge into them, fast products."""
