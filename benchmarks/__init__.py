"""Each module measures one claim: ``python -m benchmarks.NAME [--quick]`` prints its table, then its bars."""
