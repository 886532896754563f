"""NATS and JetStream: subjects, messages, streams, buckets."""
