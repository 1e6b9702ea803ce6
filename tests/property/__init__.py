"""Claims about unbounded input, tried by hypothesis."""
