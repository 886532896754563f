"""Whether promises hold while processes die: one mesh, many callers, faults drawn by a seed.

faults    what is done to whom, when (pure)
wishes    what callers want and how they behave (pure)
callers   the callers, over the public API
strikes   faults done to the processes of a mesh
history   what callers saw, and how long it took to go on (pure)
pictures  a file beside the undisturbed one
ledger    what the cluster has written down about its requests
leftovers what is there before the load and after it
checks    what must hold in the end (pure)
command   `python -m bench chaos`
"""
