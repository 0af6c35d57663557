"""The commands that need no cluster: compress, inspect, merge, publish, variants."""
