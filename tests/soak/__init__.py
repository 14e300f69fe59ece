"""Each module tries one promise: ``python -m tests.soak.NAME [--size small|full]`` prints its table, then its bars."""
