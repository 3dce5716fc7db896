"""Measures how fast recipes train on this device: steps in turns, memory, the largest batch, the loader, steps of other
libraries."""
