"""What the scheduler does about workers that fail, hang, or leave."""
