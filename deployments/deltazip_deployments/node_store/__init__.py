"""One store of deltas per host, shared by the replicas there."""
