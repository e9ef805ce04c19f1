"""Writes report.html, the report of a run, from the other files in the run's directory."""
