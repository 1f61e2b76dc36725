"""The production path in pure torch: the row chain from maps, and from queries and keys."""
