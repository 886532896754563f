"""How well calls are predicted, and how soon a slow worker is found."""
