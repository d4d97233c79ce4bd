"""Sets of measurements that belong together, one file each: `dsa-hal bench --suite NAME` runs
`run(options)` of the file NAME, which returns the exit code. Names that start with an underscore
are what suites share."""
