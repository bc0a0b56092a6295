"""One folder per runtime, all of the same shape; `table` has one row for each."""
