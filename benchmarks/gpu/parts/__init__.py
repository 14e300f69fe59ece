"""One module a part: ``measure(machine, sheet)``. What is heavy they import inside functions."""
