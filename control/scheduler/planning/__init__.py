"""From policies to starts: by windows, at events; and when a request will be done."""
