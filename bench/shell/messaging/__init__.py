"""A simulated broker, and the part of nats-py's surface that the shell uses."""
