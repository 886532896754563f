"""What a worker holds: weights, latents, and the budget for both."""
