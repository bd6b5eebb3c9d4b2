"""Files that store data for later runs: journals, record files, fingerprints and result files."""
