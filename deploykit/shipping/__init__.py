"""Bundles on the way: pushed to a model hub or into an OCI image layout, and pulled from there as they were."""
