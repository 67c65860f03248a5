"""The work of `scripts/bench`: one subject a file."""
