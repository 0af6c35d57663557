"""The tiers that hold versions: device slots, host memory and disk."""
