"""Suites of probes of memory: train each core on each probe over several seeds, evaluate, report."""
