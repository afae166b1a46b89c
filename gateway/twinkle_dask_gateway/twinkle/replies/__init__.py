"""Bodies of answers, by subject. Names of classes are unlike those of every other face."""
