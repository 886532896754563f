"""What the scheduler knows: requests, workers, assignments, who holds what, who failed."""
