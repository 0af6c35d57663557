"""The commands that need no cluster: compress, eval, inspect, merge, publish, settings, variants."""
