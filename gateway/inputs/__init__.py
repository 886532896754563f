"""Files that callers upload: received, decoded, stored."""
