"""What is written to disk and read again: records, journals, fingerprints, result files."""
