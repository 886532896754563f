"""The simulator: the real scheduler under a simulated clock and simulated workers."""
