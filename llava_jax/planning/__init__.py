"""Tells whether a run fits into memory, by compiling it for the device, and searches a plan."""
