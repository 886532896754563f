"""What is known of the workers, and what they say."""
