"""What no schedule can exceed: the relaxation behind `bench.bound`, in seconds and GPU seconds."""
