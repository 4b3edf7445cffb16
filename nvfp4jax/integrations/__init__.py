"""Models of other libraries, each in a file that is imported by whoever uses it."""
