"""Where the bytes of versions are: device slots, host memory and disk."""
