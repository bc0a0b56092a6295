"""The examples for apps without Python, checked by their compilers."""
