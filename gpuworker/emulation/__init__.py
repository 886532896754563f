"""Workers that sleep by a profile, for tests and benchmarks of the control plane."""
