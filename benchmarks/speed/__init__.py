"""Timings of single calls: the cases, the workloads, who takes turns, and the rows of results."""
