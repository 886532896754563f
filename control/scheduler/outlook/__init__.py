"""What a policy looks at: works, seats, windows, places."""
