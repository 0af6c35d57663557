"""Where the bytes of versions are: device slots and host memory."""
