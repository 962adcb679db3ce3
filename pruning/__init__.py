"""Greedy structured pruning: gates, visiting order and targets, scores, search, transplant, cost, journal."""
