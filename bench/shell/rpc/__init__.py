"""Simulated gRPC calls: channels, and servers that run in their processes."""
