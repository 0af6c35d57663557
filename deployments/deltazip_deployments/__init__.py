"""Everything Ray: router, replicas, node stores."""
