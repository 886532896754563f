"""What makes a replica the leader, and what a leader owns: key, promises stream, term."""
