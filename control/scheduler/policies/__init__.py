"""Policies: what each is (`base`), all of them by name (`registry`)."""
