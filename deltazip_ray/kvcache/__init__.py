"""KV blocks of the device: who has which."""
