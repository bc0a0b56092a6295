"""Named graph passes, each numerically proved."""
