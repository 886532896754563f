"""Where calls and messages come in: who may, what makes sense, who answers."""
