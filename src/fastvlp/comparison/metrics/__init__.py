"""Metrics by which the arms of a comparison are scored, one in a file."""
