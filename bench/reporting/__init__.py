"""Reports of benchmark runs: rows in, statistics, charts and pages out. Needs the `bench` extra."""
