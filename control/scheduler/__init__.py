"""The scheduler as a library: facts in, plans out. Open `core.py` first."""
