"""Finds out whether a run fits into memory, by compiling it, and searches for a memory plan."""
