"""An elastic pool of workers over a simulated day: the scaling signal against other rules."""
