"""How long a call takes: profiles, what was measured, what is expected."""
