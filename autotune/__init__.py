"""What was measured to be fastest, kept in stamped tables."""
