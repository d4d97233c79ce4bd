"""Libraries of others behind our ops: AITER. Each is optional, is imported at the first question
about it, and keeps what it promises or refuses in a sentence; an exception of a library reaches the
caller as it is."""
