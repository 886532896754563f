"""Model folders as they come: where one is, which of its files count, what its weights are."""
