"""The deploykit command, one file a subcommand."""
