"""A Case through the live mesh, in real time or by a manual clock, beside the simulator."""
