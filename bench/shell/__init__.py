"""The live shell (control, gateway, worker agents) in simulated time over a broker that breaks."""
