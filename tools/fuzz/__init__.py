"""Broken and hostile input, thousands of it: what comes of each is a result or one clear error."""
