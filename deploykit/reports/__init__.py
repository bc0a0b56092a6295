"""A report on bundles for people: one HTML page, or Markdown for a pull request."""
