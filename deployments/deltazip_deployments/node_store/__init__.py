"""One store of deltas for each host, shared by the replicas there."""
