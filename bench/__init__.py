"""Benchmarks: optimizer steps beside other libraries, with ceilings measured in the same run."""
