"""The step loop: an assignment from the inbox to its report."""
