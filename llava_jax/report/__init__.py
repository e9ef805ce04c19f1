"""Makes the report of a run, report.html, from the files of the run."""
