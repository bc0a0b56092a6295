"""torch.compile's ahead-of-time form: see backend.py for what the runtime can do."""
