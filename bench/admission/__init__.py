"""How fast the door is: bursts of callers, a steady thousand a second, 2,000 open streams.

Only the public API is used, and the mesh is started from a source tree of one's choice, so that the
same script measures an older Hocket (`--tree`) and this one. Generator, probe and mesh share the
machine.
"""
