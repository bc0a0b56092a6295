"""The eager torch module: see backend.py for what the runtime can do."""
