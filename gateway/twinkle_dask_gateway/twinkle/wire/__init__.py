"""Bodies of requests, by subject. Names of classes are unlike those of every other face."""
