"""Probes of memory: tasks whose answers are known, so that a score can be held against closed-form floors."""
