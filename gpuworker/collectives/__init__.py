"""Groups of workers: how they meet, how they talk, how they share a step."""
