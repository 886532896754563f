"""A mesh on one machine: its processes, their files, what starts them again."""
