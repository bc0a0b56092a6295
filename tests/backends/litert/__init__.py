"""The LiteRT runtime."""
